from __future__ import annotations

import shutil

import pytest
import tiny
import torch
from texts import LENGTH, LIMIT, windows_of, write

from optimum_prune import Source, Text
from optimum_prune.errors import RecipeError, TextError
from optimum_prune.text.drawing import Reader, characters_read, draw, evaluation_windows


def positions(windows, tokens, bos):
    """Where in the tokens of the text the windows were cut."""
    for window in windows.tokens[:, int(bos) :]:
        found = (tokens.unfold(0, len(window), 1) == window).all(1).nonzero().flatten().tolist()
        assert len(found) == 1, found
        yield range(found[0], found[0] + len(window))


def test_windows_are_the_text_tokenized_once_and_begin_as_the_tokenizer_begins(counting, tokenizer, sources):
    windows, _ = windows_of(counting, tokenizer, sources, samples=1000)
    starts = tokenizer("a")["input_ids"][0] == tiny.BOS
    assert windows.bos == starts
    assert ((windows.tokens == tiny.BOS).sum(1) == int(starts)).all()
    assert ((windows.tokens[:, 0] == tiny.BOS) == starts).all()
    tokens = torch.tensor(tokenizer(counting.read_text(), add_special_tokens=False)["input_ids"])
    spans = sorted(positions(windows, tokens, starts), key=lambda span: span.start)
    body = LENGTH - starts
    assert [span.start for span in spans] == list(range(0, len(tokens) // body * body, body))
    assert windows.mask.all()
    assert windows.mask.shape == windows.tokens.shape == (len(spans), LENGTH)


@pytest.mark.parametrize("evaluation", [{}, {"samples": 7}, {"length": 40}, {"length": 9, "samples": 30}], ids=str)
def test_windows_to_report_on_share_no_token_with_those_to_choose_by(evaluation, counting, tokenizer, sources):
    for seed in range(3):
        windows, reported = windows_of(counting, tokenizer, sources, Text(**evaluation), seed, samples=50)
        tokens = torch.tensor(tokenizer(counting.read_text(), add_special_tokens=False)["input_ids"])
        chosen = [place for span in positions(windows, tokens, windows.bos) for place in span]
        told = [place for span in positions(reported, tokens, reported.bos) for place in span]
        assert len({*chosen, *told}) == len(chosen) + len(told)
        assert max(chosen) < min(told)
        assert reported.source == "the end of counting.txt"
        assert reported.tokens.shape[1] == evaluation.get("length", LENGTH)
        assert len(reported.tokens) == evaluation.get("samples", len(reported.tokens))


def test_the_seed_draws_the_windows_to_choose_by_and_not_those_to_report_on(counting, plain, sources):
    first, again, other = (windows_of(counting, plain, sources, Text(), seed, samples=5) for seed in (3, 3, 4))
    assert torch.equal(first[0].tokens, again[0].tokens)
    assert not torch.equal(first[0].tokens, other[0].tokens)
    assert torch.equal(first[1].tokens, other[1].tokens)


def test_drawing_leaves_the_global_generator_alone(counting, plain, sources):
    state = torch.get_rng_state()
    windows_of(counting, plain, sources, Text())
    assert torch.equal(torch.get_rng_state(), state)


def test_another_text_to_report_on_is_read_from_its_beginning(counting, tmp_path, tokenizer, sources):
    other = write(tmp_path, ".txt")
    _windows, reported = windows_of(counting, tokenizer, sources, Text(text=str(other), samples=3), samples=1000)
    tokens = tokenizer(other.read_text(), add_special_tokens=False)["input_ids"]
    body = LENGTH - reported.bos
    assert reported.tokens[:, int(reported.bos) :].flatten().tolist() == tokens[: 3 * body]
    assert reported.source == "corpus.txt"
    alone = evaluation_windows(Text(text=str(other), samples=3, length=LENGTH), Reader(tokenizer, sources, LIMIT))
    assert torch.equal(alone.tokens, reported.tokens)


def test_without_a_length_windows_are_as_long_as_the_model_takes(counting, plain, sources):
    drawn = draw(Text(text=str(counting)), Text(), Reader(plain, sources, 50), seed=0)
    windows, reported = drawn.calibration, drawn.evaluation
    assert windows.tokens.shape[1] == reported.tokens.shape[1] == 50


@pytest.mark.parametrize("texts", [{"calibration": 51}, {"calibration": 9, "evaluation": 51}], ids=str)
def test_windows_longer_than_the_model_takes_are_refused(texts, counting, plain, sources):
    calibration = Text(text=str(counting), length=texts["calibration"])
    with pytest.raises(RecipeError, match=r"51 tokens .* at most 50"):
        draw(calibration, Text(length=texts.get("evaluation")), Reader(plain, sources, 50), seed=0)


def test_how_much_is_read_is_known_before_a_text_is_read(counting, text_file, monkeypatch):
    calibration = Text(text=str(counting), samples=3, length=8)
    assert characters_read(calibration, Text(text=str(text_file)), LIMIT) == (2399, text_file.stat().st_size)
    assert characters_read(calibration, Text(text=str(text_file), samples=0), LIMIT) == (2399, 0)
    monkeypatch.setattr("optimum_prune.text.drawing.CHARACTERS", 100)
    assert characters_read(calibration, Text(samples=2), LIMIT) == (16 * (3 * 8 + 2 * 8), 0)


def same_path(file, folder):
    return file


def relative_path(file, folder):
    return file.parent / ".." / file.parent.name / file.name


def symlink(file, folder):
    (folder / "link.txt").symlink_to(file)
    return folder / "link.txt"


def hard_link(file, folder):
    (folder / "hard.txt").hardlink_to(file)
    return folder / "hard.txt"


def identical_copy(file, folder):
    return shutil.copy(file, folder / "copy.txt")


def copy_of_another_kind(file, folder):
    return write(folder, ".jsonl", [file.read_text()])


@pytest.mark.parametrize("alias", [same_path, relative_path, symlink, hard_link, identical_copy, copy_of_another_kind])
def test_one_text_for_both_uses_is_refused(alias, counting, tmp_path, plain, sources):
    other = Text(text=str(alias(counting, tmp_path)))
    with pytest.raises((RecipeError, TextError), match="must not be what"):
        windows_of(counting, plain, sources, other)


def test_one_text_for_both_uses_is_fine_when_nothing_is_reported(counting, plain, sources):
    _, reported = windows_of(counting, plain, sources, Text(text=str(counting), samples=0))
    assert reported is None


def test_a_text_too_short_for_both_uses_is_refused(tmp_path, plain, sources):
    file = tmp_path / "short.txt"
    file.write_text(tiny.text(12))
    with pytest.raises(TextError, match="too few to calibrate on one window of 16 and to evaluate on 9"):
        windows_of(file, plain, sources, Text(samples=9))


def test_no_window_to_choose_by_is_refused(counting, plain, sources):
    with pytest.raises(RecipeError, match="0 calibration windows"):
        windows_of(counting, plain, sources, samples=0)


def test_no_more_is_read_than_the_windows_can_need(tmp_path, plain, monkeypatch):
    monkeypatch.setattr("optimum_prune.text.drawing.CHARACTERS", 2000)
    read = []

    def endless(text):
        for number in range(10**6):
            read.append(number)
            yield f"document number {number}"

    source = {"endless": Source("endless", endless)}
    drawn = draw(Text(dataset="endless", samples=2, length=8), Text(samples=2), Reader(plain, source, 64), seed=0)
    windows, reported = drawn.calibration, drawn.evaluation
    assert (len(windows.tokens), len(reported.tokens)) == (2, 2)
    assert len(read) < 200


def test_more_windows_than_there_are_is_said(text_file, caplog, plugins):
    wanted = Text(text=str(text_file), samples=10_000, length=64)
    windows = draw(wanted, Text(samples=0), Reader(tiny.tokenizer(), plugins.sources, 128), seed=0).calibration
    assert f"10000 windows of {text_file.name} are asked for, and its text has {len(windows.tokens)}" in caplog.text

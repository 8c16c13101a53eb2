from __future__ import annotations

import json
import shutil

import pyarrow
import pyarrow.parquet
import pytest
import tiny
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from optimum_prune import Source, Text, calibration
from optimum_prune.calibration import draw, evaluation_windows
from optimum_prune.errors import RecipeError, TextError

LENGTH, LIMIT = 16, 128
DOCUMENTS = ["Gou fanfan ki vinoulis ku lis.", "Tis tis ne se gowo.", tiny.text(400), tiny.text(300, seed=2)]


@pytest.fixture(scope="module", params=[True, False], ids=["bos", "no-bos"])
def tokenizer(request):
    return tiny.tokenizer(request.param)


@pytest.fixture(scope="module")
def plain():
    return tiny.tokenizer(bos=False)


@pytest.fixture
def sources(plugins):
    return plugins.sources


def write(folder, suffix, documents=DOCUMENTS, column="text", name="corpus"):
    file = folder / f"{name}{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"number": range(len(documents)), column: documents}), file)
    elif suffix == ".jsonl":
        file.write_text(
            "\n".join(json.dumps({column: document, "number": 1}) for document in documents), encoding="utf-8"
        )
    else:
        file.write_text("\n\n".join(documents), encoding="utf-8")
    return file


def windows_of(calibration, tokenizer, sources, evaluation=None, seed=0, **options):
    text = Text(text=str(calibration), length=LENGTH, **options)
    return draw(text, evaluation or Text(samples=0), tokenizer, sources, seed=seed, limit=LIMIT)


def positions(windows, tokens, bos):
    """Where in the tokens of the text the windows were cut."""
    for window in windows.tokens[:, int(bos) :]:
        found = (tokens.unfold(0, len(window), 1) == window).all(1).nonzero().flatten().tolist()
        assert len(found) == 1, found
        yield range(found[0], found[0] + len(window))


@pytest.fixture(scope="module")
def counting(tmp_path_factory):
    """A text in which no two windows are alike."""
    file = tmp_path_factory.mktemp("counting") / "counting.txt"
    file.write_text(" ".join(str(number) for number in range(10_000, 10_400)), encoding="utf-8")
    return file


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_every_kind_of_file_gives_the_same_windows(suffix, tmp_path, tokenizer, sources):
    windows, reported = windows_of(write(tmp_path, suffix), tokenizer, sources, samples=1000)
    expected, _ = windows_of(write(tmp_path, ".md"), tokenizer, sources, samples=1000)
    assert torch.equal(windows.tokens, expected.tokens)
    assert len(windows.tokens) > 20
    assert windows.source == f"corpus{suffix}"
    assert reported is None


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_another_column_can_hold_the_text(suffix, tmp_path, plain, sources):
    named, _ = windows_of(write(tmp_path, suffix, column="body"), plain, sources, column="body")
    usual, _ = windows_of(write(tmp_path, suffix), plain, sources)
    assert torch.equal(named.tokens, usual.tokens)


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
    alone = evaluation_windows(Text(text=str(other), samples=3, length=LENGTH), tokenizer, sources, LIMIT)
    assert torch.equal(alone.tokens, reported.tokens)


def test_without_a_length_windows_are_as_long_as_the_model_takes(counting, plain, sources):
    windows, reported = draw(Text(text=str(counting)), Text(), plain, sources, seed=0, limit=50)
    assert windows.tokens.shape[1] == reported.tokens.shape[1] == 50


@pytest.mark.parametrize("texts", [{"calibration": 51}, {"calibration": 9, "evaluation": 51}], ids=str)
def test_windows_longer_than_the_model_takes_are_refused(texts, counting, plain, sources):
    calibration = Text(text=str(counting), length=texts["calibration"])
    with pytest.raises(RecipeError, match=r"51 tokens .* at most 50"):
        draw(calibration, Text(length=texts.get("evaluation")), plain, sources, seed=0, limit=50)


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


@pytest.mark.parametrize(
    ("content", "suffix", "why"),
    [
        ("", ".txt", "is empty"),
        (" \n\n ", ".txt", "is empty"),
        ("", ".jsonl", "is empty"),
        ("Gou fanfan.", ".txt", r"has \d+ tokens, too few for one window of 16"),
        ("[1, 2]", ".jsonl", "Line 1 .* is not a JSON object with a text in 'text'"),
        ('{"text": "a"}\n\n{"body": "b"}', ".jsonl", "Line 3 "),
        ('{"text": 7}', ".jsonl", "Line 1 "),
        ("{", ".jsonl", "Line 1 "),
        ("not parquet", ".parquet", "is not a Parquet file"),
        ("a,b", ".csv", r"No kind of text file is called '\.csv'"),
    ],
    ids=str,
)
def test_texts_that_cannot_be_used_are_refused(content, suffix, why, tmp_path, plain, sources):
    file = tmp_path / f"broken{suffix}"
    file.write_text(content)
    with pytest.raises(TextError, match=why):
        windows_of(file, plain, sources)


def test_a_text_that_is_not_utf8_is_refused_with_the_place(tmp_path, plain, sources):
    file = tmp_path / "latin.txt"
    file.write_bytes(b"tr\xe8s bien " * 100)
    with pytest.raises(TextError, match="not UTF-8 at byte 2"):
        windows_of(file, plain, sources)


def test_a_text_too_short_for_both_uses_is_refused(tmp_path, plain, sources):
    file = tmp_path / "short.txt"
    file.write_text(tiny.text(12))
    with pytest.raises(TextError, match="too few to calibrate on one window of 16 and to evaluate on 9"):
        windows_of(file, plain, sources, Text(samples=9))


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_a_column_that_is_not_there_is_named(suffix, tmp_path, plain, sources):
    with pytest.raises(TextError, match=r"'txt'"):
        windows_of(write(tmp_path, suffix), plain, sources, column="txt")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"text": "/nowhere/a.txt"}, "does not exist"),
        ({"text": "/"}, "is a folder"),
        ({"text": "a.txt", "dataset": "b"}, "Name one of them"),
        ({"length": 1}, "at least 2"),
        ({"samples": -1}, "-1 windows"),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused(options, why):
    with pytest.raises((RecipeError, TextError), match=why):
        Text(**options)


def test_no_window_to_choose_by_is_refused(counting, plain, sources):
    with pytest.raises(RecipeError, match="0 calibration windows"):
        windows_of(counting, plain, sources, samples=0)


def test_no_more_is_read_than_the_windows_can_need(tmp_path, plain, monkeypatch):
    monkeypatch.setattr("optimum_prune.calibration.CHARACTERS", 2000)
    read = []

    def endless(text):
        for number in range(10**6):
            read.append(number)
            yield f"document number {number}"

    source = {"endless": Source("endless", endless)}
    windows, reported = draw(
        Text(dataset="endless", samples=2, length=8), Text(samples=2), plain, source, seed=0, limit=64
    )
    assert (len(windows.tokens), len(reported.tokens)) == (2, 2)
    assert len(read) < 200


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "dataset"
    folder.mkdir()
    write(folder, ".jsonl", DOCUMENTS[:3], name="train")
    write(folder, ".jsonl", [DOCUMENTS[3]], name="test")
    return folder


@pytest.mark.parametrize("named", ["{}", "{}:default", "{}:default:train", "{}::train"])
def test_a_dataset_is_named_by_name_config_and_split(named, dataset, tmp_path, plain, sources):
    text = Text(dataset=named.format(dataset), length=LENGTH, samples=1000)
    windows, _ = draw(text, Text(samples=0), plain, sources, seed=0, limit=LIMIT)
    expected, _ = windows_of(write(tmp_path, ".txt", DOCUMENTS[:3]), plain, sources, samples=1000)
    assert torch.equal(windows.tokens, expected.tokens)
    assert windows.source.startswith(str(dataset))
    assert windows.source.endswith(":train")


def test_one_split_to_choose_by_and_one_to_report_on(dataset, plain, sources):
    calibration = Text(dataset=str(dataset), length=LENGTH)
    _, reported = draw(calibration, Text(dataset=f"{dataset}::test"), plain, sources, seed=0, limit=LIMIT)
    assert plain.decode(reported.tokens[0]) == DOCUMENTS[3][: len(plain.decode(reported.tokens[0]))]
    with pytest.raises(RecipeError, match="must not be what"):
        draw(calibration, Text(dataset=f"{dataset}::train"), plain, sources, seed=0, limit=LIMIT)


@pytest.mark.parametrize(
    ("named", "column", "why"),
    [
        ("{}:nothing", "text", "cannot be loaded"),
        ("{}:default:nothing", "text", "cannot be loaded"),
        ("{}/nowhere", "text", "cannot be loaded"),
        ("{}", "txt", "No column is called 'txt'. Did you mean 'text'?"),
    ],
)
def test_datasets_that_cannot_be_read_are_refused_in_one_line(named, column, why, dataset, plain, sources):
    with pytest.raises(TextError, match=why) as caught:
        draw(Text(dataset=named.format(dataset), column=column), Text(), plain, sources, seed=0, limit=LIMIT)
    assert "\n" not in str(caught.value)


def test_a_plugin_can_bring_a_dataset_and_a_kind_of_file(tmp_path, plain, sources):
    asked = []

    def invent(text):
        asked.append(text.dataset_parts)
        yield tiny.text(100)

    shout = Source("shout", lambda text: [tiny.text(100).upper()], (".up",))
    mine = {**sources, "invented": Source("invented", invent), "shout": shout}
    (tmp_path / "a.up").write_text("whatever")
    windows, _ = draw(Text(dataset="invented:a:b", length=LENGTH), Text(samples=0), plain, mine, seed=0, limit=LIMIT)
    assert asked == [("invented", "a", "b")]
    assert len(windows.tokens) > 5
    windows, _ = windows_of(tmp_path / "a.up", plain, mine)
    assert plain.decode(windows.tokens[0]).isupper()


def test_more_windows_than_there_are_is_said(text_file, caplog, plugins):
    wanted = Text(text=str(text_file), samples=10_000, length=64)
    windows, _ = draw(wanted, Text(samples=0), tiny.tokenizer(), plugins.sources, seed=0, limit=128)
    assert f"10000 windows of {text_file.name} are asked for, and its text has {len(windows.tokens)}" in caplog.text


def byte_level():
    return tiny.tokenizer().backend_tokenizer


def of_one_word():
    """As Llama 2: a mark in front of the text and in place of each space, and nothing that would cut the text into words."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("_"), normalizers.Replace(" ", "_")])
    words = [f"_{word}" for word in tiny.text(3000).split()]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False)
    backend.train_from_iterator(words, trainer)
    return backend


def metaspace():
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    backend.train_from_iterator([tiny.text(3000)], trainer)
    return backend


@pytest.fixture(params=[byte_level, of_one_word, metaspace], ids=lambda kind: kind.__name__)
def any_tokenizer(request):
    return PreTrainedTokenizerFast(tokenizer_object=request.param())


@pytest.fixture
def pieces(monkeypatch):
    """Texts are tokenized in pieces of 2,000 characters; how many were is counted."""
    monkeypatch.setattr(calibration, "PIECE", 2000)
    monkeypatch.setattr(calibration, "OVERLAP", 600)
    seen, encoded = [], calibration._encoded

    def counted(text, tokenizer):
        seen.append(len(text))
        return encoded(text, tokenizer)

    monkeypatch.setattr(calibration, "_encoded", counted)
    return seen


@pytest.mark.parametrize("extra", [0, 1, 599, 600, 601, 1399, 1400, 1401, 20000])
def test_a_text_tokenized_in_pieces_has_the_tokens_of_the_whole(any_tokenizer, pieces, extra):
    text = (tiny.text(12000) + "\n\n  \u00e4\u4f60 ")[-2000 - extra :]
    expected = any_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert calibration._tokenize(text, any_tokenizer).tolist() == expected
    assert len(pieces) > 1 or not extra
    assert max(pieces) <= 2000


def test_a_text_whose_pieces_never_agree_is_tokenized_whole(pieces, monkeypatch):
    monkeypatch.setattr(calibration, "OVERLAP", 601)  # so that pairs of one piece lie across those of the next
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0, "aa": 1}, merges=[("a", "a")]))
    )
    text = "a" * 4001
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert calibration._tokenize(text, tokenizer).tolist() == expected
    assert pieces[-1] == 4001

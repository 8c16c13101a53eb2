from __future__ import annotations

import pytest
import tiny
import torch
from texts import DOCUMENTS, LENGTH, LIMIT, windows_of, write

from optimum_prune import Source, Text
from optimum_prune.errors import RecipeError, TextError
from optimum_prune.text.drawing import Reader, draw


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


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_a_column_that_is_not_there_is_named(suffix, tmp_path, plain, sources):
    with pytest.raises(TextError, match=r"'txt'"):
        windows_of(write(tmp_path, suffix), plain, sources, column="txt")


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
    windows, _ = draw(text, Text(samples=0), Reader(plain, sources, LIMIT), seed=0)
    expected, _ = windows_of(write(tmp_path, ".txt", DOCUMENTS[:3]), plain, sources, samples=1000)
    assert torch.equal(windows.tokens, expected.tokens)
    assert windows.source.startswith(str(dataset))
    assert windows.source.endswith(":train")


def test_one_split_to_choose_by_and_one_to_report_on(dataset, plain, sources):
    calibration = Text(dataset=str(dataset), length=LENGTH)
    _, reported = draw(calibration, Text(dataset=f"{dataset}::test"), Reader(plain, sources, LIMIT), seed=0)
    assert plain.decode(reported.tokens[0]) == DOCUMENTS[3][: len(plain.decode(reported.tokens[0]))]
    with pytest.raises(RecipeError, match="must not be what"):
        draw(calibration, Text(dataset=f"{dataset}::train"), Reader(plain, sources, LIMIT), seed=0)


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
        draw(Text(dataset=named.format(dataset), column=column), Text(), Reader(plain, sources, LIMIT), seed=0)
    assert "\n" not in str(caught.value)


def test_a_plugin_can_bring_a_dataset_and_a_kind_of_file(tmp_path, plain, sources):
    asked = []

    def invent(text):
        asked.append(text.dataset_parts)
        yield tiny.text(100)

    shout = Source("shout", lambda text: [tiny.text(100).upper()], (".up",))
    mine = {**sources, "invented": Source("invented", invent), "shout": shout}
    (tmp_path / "a.up").write_text("whatever")
    windows, _ = draw(Text(dataset="invented:a:b", length=LENGTH), Text(samples=0), Reader(plain, mine, LIMIT), seed=0)
    assert asked == [("invented", "a", "b")]
    assert len(windows.tokens) > 5
    windows, _ = windows_of(tmp_path / "a.up", plain, mine)
    assert plain.decode(windows.tokens[0]).isupper()

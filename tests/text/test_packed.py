"""Texts to train on: folders, many tokens, and windows that are read piece by piece."""

from __future__ import annotations

import pytest
import tiny
import torch
from texts import DOCUMENTS, LIMIT, write

from optimum_prune import Recipe, Text, Training
from optimum_prune.builtin.recover.pretrain import Pretrain
from optimum_prune.errors import RecipeError, TextError
from optimum_prune.text import packed as packing
from optimum_prune.text.drawing import Reader, draw
from optimum_prune.text.packed import packed
from optimum_prune.text.tokenization import tokenize


@pytest.fixture
def reader(tokenizer, sources):
    return Reader(tokenizer, sources, LIMIT)


@pytest.fixture
def folder(tmp_path):
    """Texts in files of several kinds, and others that are none."""
    below = tmp_path / "texts/below"
    below.mkdir(parents=True)
    write(tmp_path / "texts", ".jsonl", DOCUMENTS[:2], name="a")
    write(tmp_path / "texts", ".md", DOCUMENTS[2:3], name="b")
    write(below, ".parquet", DOCUMENTS[3:], name="c")
    (tmp_path / "texts/picture.png").write_bytes(b"\0")
    (tmp_path / "texts/.hidden.txt").write_text("hidden " * 100)
    return tmp_path / "texts"


def test_windows_are_those_of_the_whole_text(reader, tmp_path):
    text = Text(text=str(write(tmp_path, ".txt")), length=16)
    found = packed(reader, text, 16, None, "a text")
    expected = reader.windows(tokenize(reader.read(text, 10**9), reader.tokenizer), text)
    assert torch.equal(found.tokens.long(), expected)
    assert found.mask.all()
    assert found.counted is None
    assert found.bos is (reader.bos is not None)


@pytest.mark.parametrize("in_memory", [0, 1000])
def test_many_tokens_lie_in_a_file_that_is_gone_afterwards(in_memory, reader, tmp_path, monkeypatch):
    text = Text(text=str(write(tmp_path, ".txt")), length=16)
    expected = packed(reader, text, 16, None, "a text")
    places = tmp_path / "places"
    places.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(places))
    monkeypatch.setattr(packing, "IN_MEMORY", in_memory)
    monkeypatch.setattr(packing, "FLUSHED", 100)
    monkeypatch.setattr(packing, "PIECE", 500)
    found = packed(reader, text, 16, None, "a text")
    assert len(found) == pytest.approx(len(expected), abs=2)
    assert torch.equal(found.tokens[:3], expected.tokens[:3])
    assert reader.tokenizer.decode(found.tokens[-2, 1:]) in reader.tokenizer.decode(expected.tokens[-4:, 1:].flatten())
    assert list(places.iterdir()) == []


def test_no_more_is_read_than_is_wanted(reader, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "PIECE", 200)
    text = Text(text=str(write(tmp_path, ".txt")), length=16)
    found = packed(reader, text, 16, 200, "a text")
    assert 200 <= found.tokens.numel() + 16 <= 500


def test_a_folder_is_all_texts_in_it(reader, folder, tmp_path):
    found = reader.read(Text(text=str(folder), length=16), 10**9)
    assert found == "\n\n".join(DOCUMENTS)
    windows = packed(reader, Text(text=str(folder), length=16), 16, None, "texts")
    whole = packed(reader, Text(text=str(write(tmp_path, ".txt")), length=16), 16, None, "a text")
    assert torch.equal(windows.tokens, whole.tokens)
    drawn = draw(Text(text=str(folder), length=16), Text(samples=2), reader, 0)
    assert drawn.evaluation.source == "the end of texts"


def test_a_folder_without_texts_is_refused(reader, folder):
    for file in folder.rglob("*"):
        if file.suffix in (".jsonl", ".md", ".parquet"):
            file.unlink()
    with pytest.raises(TextError, match=r"No file in the folder .* ends in"):
        reader.read(Text(text=str(folder), length=16), 10**9)


def test_a_folder_with_what_is_reported_on_is_not_trained_on(folder, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(tiny.text(100))
    training = Training(text=str(folder))
    with pytest.raises(RecipeError, match="must not be what it is"):
        Recipe(
            passes=(Pretrain(),),
            calibration=Text(text=str(other)),
            evaluation=Text(text=str(folder / "b.md")),
            training=training,
        )
    with pytest.raises(RecipeError, match=r"holds b\.md, whose end is reported on"):
        Recipe(passes=(Pretrain(),), calibration=Text(text=str(folder / "b.md")), training=training)
    Recipe(passes=(Pretrain(),), calibration=Text(text=str(other)), training=training)
    Recipe(passes=(Pretrain(),), calibration=Text(text=str(folder)), training=training)

from __future__ import annotations

import json

import pytest
import tiny

from optimum_prune.errors import TextError
from optimum_prune.text.tasks import check_task_files, task_windows

QUESTION = {"query": "Snow is", "choices": ["black", "white"], "gold": 1}


def written(path, *lines) -> str:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return str(path)


@pytest.mark.parametrize("bos", [None, 0], ids=["plain", "bos"])
def test_questions_of_each_file_come_in_turn_with_their_right_answers(bos, tmp_path):
    tokenizer = tiny.tokenizer(bos=False)
    first = written(tmp_path / "a.jsonl", QUESTION, {**QUESTION, "query": "Ice is"})
    second = written(tmp_path / "b.jsonl", {**QUESTION, "query": "Coal is", "gold": 0})
    found = task_windows([first, second], tokenizer, 16, 100, bos)
    rows = found.tokens[:, bos is not None :]
    told = tokenizer.decode(rows[found.mask[:, bos is not None :]])
    assert told == "Snow is white\n\nCoal is black\n\nIce is white"
    assert found.tokens.shape == found.mask.shape
    assert found.length == 16
    assert found.bos == (bos is not None)
    assert bos is None or found.tokens[:, 0].eq(bos).all()
    assert len(task_windows([first, second], tokenizer, 16, 1, bos)) == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("no json", "Line 2 .* is no question"),
        ("[1, 2]", "Line 2"),
        ({"query": "a"}, "Line 2"),
        ({**QUESTION, "gold": 2}, "Line 2"),
        ({**QUESTION, "gold": -1}, "Line 2"),
        ({**QUESTION, "gold": "1"}, "Line 2"),
        ({**QUESTION, "choices": [1, 2]}, "Line 2"),
        ({**QUESTION, "query": None}, "Line 2"),
        ("[" * 100_000, "Line 2"),
    ],
    ids=str,
)
def test_a_line_that_is_no_question_is_named(line, said, tmp_path):
    file = written(tmp_path / "a.jsonl", QUESTION, line)
    with pytest.raises(TextError, match=said):
        task_windows([file], tiny.tokenizer(), 16, 4)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe"], ids=["nothing", "blank", "no text"])
def test_a_file_without_a_question_is_refused(content, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(content)
    with pytest.raises(TextError):
        task_windows([str(file)], tiny.tokenizer(), 16, 4)


@pytest.mark.parametrize("name", ["nowhere.jsonl", ""], ids=str)
def test_files_that_cannot_be_read_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TextError, match=r"does not exist|is a folder|without a name"):
        check_task_files([name])

from __future__ import annotations

import os

import pytest

from optimum_prune import Text
from optimum_prune.errors import RecipeError, TextError
from optimum_prune.text.text import Wanted, window_counts


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"text": "/nowhere/a.txt"}, "does not exist"),
        ({"text": "/"}, "is a folder"),
        ({"text": ""}, "is a folder"),
        ({"text": "/dev/zero"}, "may never end"),
        ({"text": "x" * 5000}, "cannot be reached"),
        ({"text": "~nobody_of_this_name/a.txt"}, "does not exist"),
        ({"text": "a\0b"}, "NUL"),
        ({"text": 7}, "is 7, which is not a text"),
        ({"dataset": ""}, "without a name"),
        ({"dataset": ":config"}, "without a name"),
        ({"column": None}, "not a text"),
        ({"samples": "5"}, "is '5', which is not a whole number"),
        ({"samples": True}, "not a whole number"),
        ({"samples": 2**31}, "at most 2147483647"),
        ({"length": 1.5}, "not a whole number"),
        ({"length": 10**400}, "out of all bounds"),
        ({"text": "a.txt", "dataset": "b"}, "Name one of them"),
        ({"length": 1}, "at least 2"),
        ({"samples": -1}, "-1 windows"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_options_that_cannot_be_are_refused(options, why):
    with pytest.raises((RecipeError, TextError), match=why):
        Text(**options)


@pytest.mark.parametrize(
    ("texts", "limit", "expected"),
    [
        (({}, {}), 4096, ((128, 2048), (128, 2048))),
        (({}, {}), 512, ((128, 512), (128, 512))),
        (({"length": 64, "samples": 3}, {"samples": 0}), 512, ((3, 64), (0, 64))),
        (({"length": 64}, {"length": 512}), 512, ((128, 64), (128, 512))),
    ],
    ids=str,
)
def test_how_many_windows_are_asked_for_is_known_before_a_text_is_read(texts, limit, expected):
    counts = window_counts(*(Text(**text) for text in texts), limit)
    assert counts == tuple(Wanted(*each) for each in expected)


def test_the_file_is_the_text_that_is_named(text_file):
    assert Text(text=str(text_file)).file == text_file
    assert Text(dataset="any").file is Text().file is None


def test_a_path_is_a_name_and_so_is_one_in_the_home_folder(text_file, monkeypatch):
    monkeypatch.setenv("HOME", str(text_file.parent))
    assert Text(text=text_file) == Text(text=str(text_file))
    assert Text(text=f"~/{text_file.name}").file == text_file


def made(kind, folder):
    file = folder / "text.txt"
    if kind == "link that leads nowhere":
        file.symlink_to(folder / "nothing")
    elif kind == "link to itself":
        file.symlink_to(file)
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    return file


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("link that leads nowhere", "is a link that leads nowhere"),
        ("link to itself", "cannot be reached"),
        ("pipe", "is no file but a pipe"),
        ("folder", "is a folder"),
        ("nothing", "does not exist"),
    ],
)
def test_what_is_no_file_is_said_before_it_is_opened(kind, why, tmp_path):
    with pytest.raises(TextError, match=why):
        Text(text=str(made(kind, tmp_path)))


@pytest.mark.parametrize("name", ["a\nb.txt", "a\x1b[31mb.txt", "a\udcffb.txt", "a\u202eb.txt"])
def test_a_name_that_a_terminal_would_obey_is_escaped_where_it_is_shown(name, tmp_path):
    file = tmp_path / name
    file.write_text("text")
    shown = Text(text=str(file)).describe()
    assert shown.isprintable()
    assert shown.startswith("a\\")

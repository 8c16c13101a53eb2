from __future__ import annotations

import pytest

from optimum_prune import Text
from optimum_prune.errors import RecipeError, TextError
from optimum_prune.text.text import Wanted, window_counts


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

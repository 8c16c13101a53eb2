"""Gemma 2: layers alternate between a sliding window and full attention; norms before and behind each block."""

from __future__ import annotations

from collections.abc import Iterator

from optimum_prune.anatomy.family import Family, Heads
from optimum_prune.hooks.marker import hookimpl


@hookimpl
def families() -> Iterator[Family]:
    yield Family(name="gemma2", model_types=("gemma2",), heads=Heads(divide_hidden=True))

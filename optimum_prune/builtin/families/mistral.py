"""Mistral 7B and its like."""

from __future__ import annotations

from collections.abc import Iterator

from optimum_prune.anatomy.family import Family
from optimum_prune.hooks.marker import hookimpl


@hookimpl
def families() -> Iterator[Family]:
    yield Family(name="mistral", model_types=("mistral",))

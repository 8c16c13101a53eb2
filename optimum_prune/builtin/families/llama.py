"""Llama 1 to 3, SmolLM, TinyLlama and every other checkpoint of type llama."""

from __future__ import annotations

from collections.abc import Iterator

from optimum_prune.anatomy.family import Family, Heads
from optimum_prune.hooks.marker import hookimpl


@hookimpl
def families() -> Iterator[Family]:
    yield Family(name="llama", model_types=("llama",), heads=Heads(divide_hidden=True))

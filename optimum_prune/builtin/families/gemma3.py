"""Gemma 3: the text-only models, and the text decoder of those that also see."""

from __future__ import annotations

from collections.abc import Iterator

from optimum_prune.anatomy.family import Family, Heads
from optimum_prune.hooks.marker import hookimpl


@hookimpl
def families() -> Iterator[Family]:
    yield Family(name="gemma3", model_types=("gemma3_text",), heads=Heads(divide_hidden=True))
    yield Family(
        name="gemma3-vision",
        model_types=("gemma3",),
        config="text_config",
        layers="model.language_model.layers",
        heads=Heads(divide_hidden=True),
    )

"""Qwen2, Qwen2.5 and Qwen3, dense."""

from __future__ import annotations

from collections.abc import Iterator

from optimum_prune.anatomy.family import Family
from optimum_prune.hooks.marker import hookimpl


@hookimpl
def families() -> Iterator[Family]:
    for name in ("qwen2", "qwen3"):
        # Layers below max_window_layers attend to everything, those from there on to a sliding window.
        yield Family(name=name, model_types=(name,), thresholds=("max_window_layers",))

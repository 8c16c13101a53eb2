"""Qwen3-MoE: a mixture of experts in every n-th layer but those on a list, a plain FFN in the others."""

from __future__ import annotations

from collections.abc import Iterator

from optimum_prune.anatomy.family import Experts, Family
from optimum_prune.hooks.marker import hookimpl


@hookimpl
def families() -> Iterator[Family]:
    yield Family(
        name="qwen3_moe",
        model_types=("qwen3_moe",),
        thresholds=("max_window_layers",),
        strides={"decoder_sparse_step": "mlp_only_layers"},
        experts=Experts(),
    )

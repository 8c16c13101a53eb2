"""Phi-3 and Phi-3.5 mini, and Phi-4: gate and up are one matrix, and so are query, key and value."""

from __future__ import annotations

from collections.abc import Iterator

from optimum_prune.anatomy.family import Family, FeedForward, Heads
from optimum_prune.hooks.marker import hookimpl


@hookimpl
def families() -> Iterator[Family]:
    yield Family(
        name="phi3",
        model_types=("phi3",),
        heads=Heads(inputs={"self_attn.qkv_proj": ("query", "key", "value")}),
        feed_forward=FeedForward(inputs=("mlp.gate_up_proj",), parts=2),
    )

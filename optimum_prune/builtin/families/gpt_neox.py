"""GPT-NeoX and Pythia: biases everywhere, attention and FFN side by side behind norms of their own."""

from __future__ import annotations

from collections.abc import Iterator

from optimum_prune.anatomy.family import Family, FeedForward
from optimum_prune.hooks.marker import hookimpl


@hookimpl
def families() -> Iterator[Family]:
    yield Family(
        name="gpt_neox",
        model_types=("gpt_neox",),
        layers="gpt_neox.layers",
        attention="attention",
        attention_output="attention.dense",
        heads=None,  # always hidden_size / num_attention_heads wide
        feed_forward=FeedForward(inputs=("mlp.dense_h_to_4h",), output="mlp.dense_4h_to_h"),
    )

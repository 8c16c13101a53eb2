"""GPT-2: biases everywhere, and weights stored transposed."""

from __future__ import annotations

from collections.abc import Iterator

from optimum_prune.anatomy.family import Family, FeedForward
from optimum_prune.hooks.marker import hookimpl


@hookimpl
def families() -> Iterator[Family]:
    yield Family(
        name="gpt2",
        model_types=("gpt2",),
        layers="transformer.h",
        attention="attn",
        attention_output="attn.c_proj",
        heads=None,  # always hidden_size / num_attention_heads wide
        feed_forward=FeedForward(inputs=("mlp.c_fc",), output="mlp.c_proj", width="n_inner"),
    )

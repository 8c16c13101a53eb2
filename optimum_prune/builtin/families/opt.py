"""OPT: biases everywhere, ReLU, learned positions; the FFN's two matrices lie directly in the layer."""

from __future__ import annotations

from collections.abc import Iterator

from optimum_prune.anatomy.family import Family, FeedForward
from optimum_prune.hooks.marker import hookimpl


@hookimpl
def families() -> Iterator[Family]:
    yield Family(
        name="opt",
        model_types=("opt",),
        layers="model.decoder.layers",
        attention_output="self_attn.out_proj",
        heads=None,  # always hidden_size / num_attention_heads wide
        feed_forward=FeedForward(module=None, inputs=("fc1",), output="fc2", width="ffn_dim"),
    )

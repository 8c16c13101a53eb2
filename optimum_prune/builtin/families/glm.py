"""GLM-4, ChatGLM's successor in transformers: gate and up are one matrix."""

from __future__ import annotations

from collections.abc import Iterator

from optimum_prune.anatomy.family import Family, FeedForward
from optimum_prune.hooks.marker import hookimpl


@hookimpl
def families() -> Iterator[Family]:
    for name in ("glm", "glm4"):
        yield Family(name=name, model_types=(name,), feed_forward=FeedForward(inputs=("mlp.gate_up_proj",), parts=2))

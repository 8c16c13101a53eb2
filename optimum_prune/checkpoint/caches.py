"""The cache that a model puts out and takes again, by the name that the installed transformers has for it."""

from __future__ import annotations

import inspect
from collections.abc import Container
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAMES = ("cache", "past_key_values")
"""Since transformers 5.24, and before. A model whose code comes with its checkpoint may have either in any."""


def name_among(names: Container[str]) -> str:
    """The cache's name among those of arguments or outputs; the older one if it is not there."""
    return next((name for name in NAMES if name in names), NAMES[-1])


def cache_of(output: Any, model: PreTrainedModel) -> dict[str, Any]:
    """The cache that a model put out, as the argument with which the model takes it; none if it put out none."""
    cache = getattr(output, name_among(vars(output)), None)
    return {} if cache is None else {name_among(inspect.signature(model.forward).parameters): cache}

"""The cache that a model puts out and takes again, by the name that the installed transformers has for it."""

from __future__ import annotations

from typing import Any

NAMES = ("cache", "past_key_values")
"""Since transformers 5.24, and before."""


def cache_of(output: Any) -> dict[str, Any]:
    """The cache that a model put out, as the argument with which the model takes it; none if it put out none."""
    return next(({name: output[name]} for name in NAMES if getattr(output, name, None) is not None), {})

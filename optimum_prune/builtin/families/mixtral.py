"""Mixtral: every FFN is a mixture of experts."""

from __future__ import annotations

from collections.abc import Iterator

from optimum_prune.anatomy.family import Experts, Family
from optimum_prune.hooks.marker import hookimpl


@hookimpl
def families() -> Iterator[Family]:
    yield Family(name="mixtral", model_types=("mixtral",), experts=Experts(width="intermediate_size"))

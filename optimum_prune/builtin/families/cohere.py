"""Command-R: attention and FFN side by side, behind one norm; Command-R7B with sliding windows as well."""

from __future__ import annotations

from collections.abc import Iterator

from optimum_prune.anatomy.family import Family
from optimum_prune.hooks.marker import hookimpl


@hookimpl
def families() -> Iterator[Family]:
    yield Family(name="cohere", model_types=("cohere",))
    yield Family(name="cohere2", model_types=("cohere2",))

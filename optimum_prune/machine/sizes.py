"""Sizes in bytes, as people write them: 8GiB, 500 MB or 1000000."""

from __future__ import annotations

import re

from optimum_prune.errors import RecipeError, shown
from optimum_prune.options import LARGEST

SMALLEST = 10**6
"""A size in bytes below this is meant in another unit, if none is given; 0 is none at all."""
UNITS = {
    "": 1,
    "B": 1,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
"""Bytes of the units that a size may have."""


def size_of(text: str, what: str = "memory") -> int:
    """The bytes that a size such as 8GiB, 500 MB or 1000000 means.

    Args:
        what: it is the size of, for the error.

    Raises:
        RecipeError: it means none.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([A-Za-z]*)B?", text.strip())
    if match is None or match[2].upper() not in UNITS:
        raise RecipeError(f"The {what} {shown(text)} is no size. Give a number with a unit, such as 8GiB or 500MB.")
    size = float(match[1]) * UNITS[match[2].upper()]
    if size > LARGEST:
        raise RecipeError(
            f"The {what} {shown(text)} is more than any machine has. Give less, or nothing for all of it."
        )
    return int(size)


def check_unit(memory: str) -> None:
    """Refuses a size in bytes that is hardly meant."""
    size, plain = size_of(memory), memory.strip().replace(".", "", 1)
    if plain.isdigit() and 0 < float(memory) < SMALLEST:
        likely = "GiB" if size <= 2**10 else "MiB"
        raise RecipeError(
            f"The memory {memory} is {size} bytes, which hold nothing. Did you mean {size}{likely}? Give the unit."
        )

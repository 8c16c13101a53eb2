"""Evidence: why a pass decided as it did, as plain data for the report."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from optimum_prune.errors import PassError

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
"""What JSON can hold. It has no form for nan and infinity, which are written as null."""
Evidence: TypeAlias = "Mapping[str, Json]"
"""Names, each with what a pass gives as a reason: text, a number, true or false, null, or lists and mappings of these."""

LARGEST = 1024
"""Numbers of a tensor that a report still takes."""


def plain_evidence(given: Mapping[Any, Any], of: str) -> Evidence:
    """Evidence as a report holds it.

    Tuples, numpy arrays and small tensors become lists; numpy's numbers, and tensors of one that have no dimension, numbers; and
    numbers that are keys of a mapping, text.

    Args:
        given: as a pass yields it.
        of: the pass.

    Raises:
        PassError: something in it is of another kind, or a tensor is too large.
    """
    if not isinstance(given, Mapping):
        raise PassError(f"The pass '{of}' gives as evidence a {type(given).__name__}. Give a mapping with names.")
    try:
        return {_key(name, of): _plain(value, str(name), of) for name, value in given.items()}
    except RecursionError as error:
        raise _refused("lists or mappings that lie in one another without end", str(next(iter(given))), of) from error


def _plain(value: Any, where: str, of: str) -> Json:
    """A value as plain data.

    Args:
        where: the names that lead to it.
    """
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        if (numbers := math.prod(value.shape)) > LARGEST:
            raise _refused(f"a tensor of {numbers:,} numbers, where at most {LARGEST:,} are taken", where, of)
        value = value.tolist()
    if value is None or (isinstance(value, (bool, int, float, str)) and not isinstance(value, np.generic)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(each, where, of) for each in value]
    if isinstance(value, Mapping):
        return {_key(name, of): _plain(each, f"{where}.{name}", of) for name, each in value.items()}
    raise _refused(f"a {type(value).__name__}, which JSON cannot hold", where, of)


def _key(name: Any, of: str) -> str:
    """A key of a mapping, as JSON writes it."""
    if isinstance(name, str):
        return name
    plain = name.item() if isinstance(name, np.generic) else name
    if plain is None or isinstance(plain, (bool, int, float)):
        return json.dumps(plain)
    raise _refused(f"a {type(name).__name__} as a name, which JSON cannot hold", repr(name), of)


def _refused(what: str, where: str, of: str) -> PassError:
    return PassError(
        f"The pass '{of}' gives as evidence, at '{where}', {what}. Give text, numbers, and lists and mappings of these."
    )

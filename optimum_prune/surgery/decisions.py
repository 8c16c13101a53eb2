"""Whether a decision is one: what a pass yields is looked at before anything is done with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from optimum_prune.errors import PassError, printable, shown
from optimum_prune.surgery.cuts import Cuts, Decision

KEPT = "whole numbers from 0 on, in order, each once, as a tuple"
"""How what is kept is said."""


def check_decision(made: object, of: str) -> None:
    """Refuses what a pass yields if it is no decision, whatever the model.

    Args:
        of: the pass.

    Raises:
        PassError: it is none, or says in another way than it should what is kept or which values weights get.
    """
    for flaw in _flaws(made):
        raise PassError(f"The pass '{printable(of)}' {flaw}. Mend the pass.")


def _flaws(made: object) -> Iterator[str]:
    if not isinstance(made, Decision):
        yield f"yields {shown(made)}, which is no Decision"
        return
    cuts, weights = made.cuts, made.weights
    if not isinstance(cuts, Cuts):
        yield f"yields a Decision with the cuts {shown(cuts)}, which are no Cuts"
        return
    if cuts.layers is not None and not _is_kept(cuts.layers):
        yield f"keeps the layers {shown(cuts.layers)}. It has to be {KEPT}"
    yield from _flaws_of_blocks(cuts.blocks)
    yield from _flaws_of_units(cuts.units)
    if not isinstance(weights, Mapping):
        yield f"gives the new weights {shown(weights)}, which are no mapping"
        return
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.is_meta:
            yield f"gives {shown(name)} the new value {shown(value)}, and has to give a parameter's name a tensor"


def _flaws_of_blocks(blocks: Any) -> Iterator[str]:
    if not isinstance(blocks, Mapping):
        yield f"keeps the blocks {shown(blocks)}, which are no mapping from a layer to names"
        return
    for layer, kept in blocks.items():
        names = isinstance(kept, (tuple, list)) and all(isinstance(name, str) for name in kept)
        if not _is_index(layer) or not names or len(set(kept)) < len(kept):
            yield f"keeps the blocks {shown(kept)} of layer {shown(layer)}. It has to be a tuple of names, of the layer of an index"


def _flaws_of_units(units: Any) -> Iterator[str]:
    if not isinstance(units, Mapping):
        yield f"keeps the units {shown(units)}, which are no mapping from a layer and an axis to indices"
        return
    for where, kept in units.items():
        pair = where if isinstance(where, tuple) and len(where) == 2 else (-1, "")
        if not (pair[0] is None or _is_index(pair[0])) or not isinstance(pair[1], str):
            yield f"keeps units of {shown(where)}, which is no pair of a layer's index and the name of an axis"
        groups = isinstance(kept, (tuple, list)) and kept and all(isinstance(each, (tuple, list)) for each in kept)
        if not (all(map(_is_kept, kept)) if groups else _is_kept(kept)):
            yield f"keeps {shown(kept)} of {shown(where)}. It has to be {KEPT}, or such a tuple for each group"


def _is_index(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and bool(value >= 0)


def _is_kept(kept: object) -> bool:
    if not isinstance(kept, (tuple, list)) or not all(map(_is_index, kept)):
        return False
    return list(kept) == sorted(set(kept))

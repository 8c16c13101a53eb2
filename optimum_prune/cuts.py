"""Cuts are decisions as data: what is kept. They can be printed, saved, compared and replayed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

from optimum_prune.errors import SurgeryError

if TYPE_CHECKING:
    from torch import Tensor

Indices = tuple[int, ...]


@dataclass(frozen=True)
class Cuts:
    """What is kept of a model, in indices of the model as the pass found it. What is not mentioned is kept whole."""

    layers: Indices | None = None
    """Kept decoder layers."""
    blocks: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    """Layer -> its kept blocks, of "attention" and "feed_forward"."""
    heads: Mapping[int, Indices] = field(default_factory=dict)
    """Layer -> its kept key-value heads, each with the query heads that share it."""
    channels: Mapping[int, Indices] = field(default_factory=dict)
    """Layer -> its kept FFN channels."""
    experts: Mapping[int, tuple[Indices, ...]] = field(default_factory=dict)
    """Layer -> of each of its experts in turn, the kept channels: as many of each."""
    shared: Mapping[int, Indices] = field(default_factory=dict)
    """Layer -> the kept channels of its shared experts."""

    def merge(self, later: Cuts) -> Cuts:
        """Both cuts in one, for cuts that one pass made of different parts of the same model.

        Raises:
            SurgeryError: both cut the same part.
        """
        if self.layers is not None and later.layers is not None:
            raise _cut_twice("the decoder layers")
        merged = {name: {**getattr(self, name), **getattr(later, name)} for name in PARTS}
        for name in PARTS:
            twice = sorted(getattr(self, name).keys() & getattr(later, name).keys())
            if twice:
                raise _cut_twice(f"the {name} of layer {twice[0]}")
        return Cuts(self.layers if later.layers is None else later.layers, **merged)

    def to_json(self) -> dict[str, Any]:
        """Plain data; index sets are written as ranges, such as "0-18,22-29"."""
        plain: dict[str, Any] = {} if self.layers is None else {"layers": ranges(self.layers)}
        for name in PARTS:
            if cut := getattr(self, name):
                plain[name] = {str(layer): _written(kept) for layer, kept in cut.items()}
        return plain

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Cuts:
        """The inverse of `to_json`."""
        layers = plain.get("layers")
        parts = {name: {int(layer): _read(kept) for layer, kept in plain.get(name, {}).items()} for name in PARTS}
        return cls(None if layers is None else indices(layers), **parts)


PARTS = ("blocks", "heads", "channels", "experts", "shared")
"""What `Cuts` names by layer."""
BLOCKS = ("attention", "feed_forward")
"""The blocks of a decoder layer."""


def _cut_twice(part: str) -> SurgeryError:
    return SurgeryError(f"One pass cut {part} twice. Yield one decision for each part of the model.")


def _written(kept: Any) -> Any:
    if kept and isinstance(kept[0], str):
        return list(kept)
    return [ranges(each) for each in kept] if kept and isinstance(kept[0], tuple) else ranges(kept)


def _read(kept: Any) -> Any:
    if isinstance(kept, list) and kept[0] in BLOCKS:
        return tuple(kept)
    return tuple(indices(each) for each in kept) if isinstance(kept, list) else indices(kept)


@dataclass(frozen=True)
class Decision:
    """Cuts, the weights that go with them, and why."""

    cuts: Cuts = field(default_factory=Cuts)
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    """New values of parameters, in their shape after the channels are cut, by their name in the model before the cut."""
    evidence: Mapping[str, Any] = field(default_factory=dict)
    """Plain data for the report."""


def ranges(numbers: Iterable[int]) -> str:
    """Sorted numbers as ranges.

    >>> ranges([0, 1, 2, 5, 7, 8])
    '0-2,5,7-8'
    """
    runs = groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0])
    spans = [[number for _, number in run] for _, run in runs]
    return ",".join(str(span[0]) if len(span) == 1 else f"{span[0]}-{span[-1]}" for span in spans)


def indices(text: str) -> Indices:
    """The inverse of `ranges`.

    >>> indices("0-2,5")
    (0, 1, 2, 5)
    """
    spans = [part.split("-") for part in text.split(",") if part]
    return tuple(number for span in spans for number in range(int(span[0]), int(span[-1]) + 1))

"""Cuts are decisions as data: what is kept. They can be printed, saved, compared and replayed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

from optimum_prune.anatomy.axis import Indices, Units
from optimum_prune.errors import SurgeryError

if TYPE_CHECKING:
    from torch import Tensor

LAYERS, BLOCKS = "layers", "blocks"
"""What `to_json` calls kept layers and blocks; every other name is that of an axis."""
NOTE = "note"
"""In evidence: what a person is to be told, as a phrase."""


@dataclass(frozen=True)
class Cuts:
    """What is kept of a model, in indices of the model as the pass found it. What is not mentioned is kept whole."""

    layers: Indices | None = None
    """Kept decoder layers."""
    blocks: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    """Layer -> its kept blocks."""
    units: Mapping[tuple[int | None, str], Units] = field(default_factory=dict)
    """Layer, or None for the whole model, and the name of an axis -> the kept units."""

    @classmethod
    def along(cls, axis: str, kept: Mapping[int | None, Units]) -> Cuts:
        """The same axis cut in some layers: layer -> the kept units."""
        return cls(units={(layer, axis): units for layer, units in kept.items()})

    def kept(self, layer: int | None, axis: str) -> Units:
        """The kept units of an axis of a layer.

        Raises:
            KeyError: it is not cut.
        """
        return self.units[layer, axis]

    def of(self, layer: int) -> Iterator[tuple[str, Units]]:
        """The axes that are cut in a layer, each with the kept units."""
        return ((axis, kept) for (index, axis), kept in self.units.items() if index == layer)

    @property
    def touched(self) -> list[int]:
        """The layers of which blocks or units are cut, in order."""
        return sorted({*self.blocks, *(layer for layer, _ in self.units if layer is not None)})

    def merge(self, later: Cuts) -> Cuts:
        """Both cuts in one, for cuts that one pass made of different parts of the same model.

        Raises:
            SurgeryError: both cut the same part.
        """
        if self.layers is not None and later.layers is not None:
            raise _cut_twice("the decoder layers")
        for index in sorted(self.blocks.keys() & later.blocks.keys()):
            raise _cut_twice(f"the blocks of layer {index}")
        for layer, axis in self.units.keys() & later.units.keys():
            raise _cut_twice(f"the {axis} of {'the model' if layer is None else f'layer {layer}'}")
        layers = self.layers if later.layers is None else later.layers
        return Cuts(layers, {**self.blocks, **later.blocks}, {**self.units, **later.units})

    def to_json(self) -> dict[str, Any]:
        """Plain data; index sets are written as ranges, such as "0-18,22-29"."""
        plain: dict[str, Any] = {} if self.layers is None else {LAYERS: ranges(self.layers)}
        if self.blocks:
            plain[BLOCKS] = {str(layer): list(kept) for layer, kept in self.blocks.items()}
        for (layer, axis), kept in self.units.items():
            if layer is None:
                plain[axis] = _written(kept)
            else:
                plain.setdefault(axis, {})[str(layer)] = _written(kept)
        return plain

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Cuts:
        """The inverse of `to_json`."""
        layers = plain.get(LAYERS)
        units: dict[tuple[int | None, str], Units] = {}
        for axis, cut in plain.items():
            if axis in (LAYERS, BLOCKS):
                continue
            if isinstance(cut, Mapping):
                units |= {(int(layer), axis): _read(kept) for layer, kept in cut.items()}
            else:
                units[None, axis] = _read(cut)
        blocks = {int(layer): tuple(kept) for layer, kept in plain.get(BLOCKS, {}).items()}
        return cls(None if layers is None else indices(layers), blocks, units)


def _cut_twice(part: str) -> SurgeryError:
    return SurgeryError(f"One pass cut {part} twice. Yield one decision for each part of the model.")


def _written(kept: Any) -> Any:
    return [ranges(each) for each in kept] if kept and isinstance(kept[0], tuple) else ranges(kept)


def _read(kept: Any) -> Units:
    return tuple(indices(each) for each in kept) if isinstance(kept, list) else indices(kept)


@dataclass(frozen=True)
class Decision:
    """Cuts, the weights that go with them, and why."""

    cuts: Cuts = field(default_factory=Cuts)
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    """New values of parameters, in their shape after the units are cut, by their name in the model before the cut."""
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

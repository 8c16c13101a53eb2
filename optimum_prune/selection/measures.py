"""What of a model is to become less: its parameters, its bytes, what it takes of memory when it is served, or its time for a step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from optimum_prune.anatomy.shape import ATTENTION, BLOCKS, LayerShape, Shape
from optimum_prune.surgery.cuts import Cuts


class Measure(Protocol):
    """Tells how much of it each part of a model has; the parts add up."""

    def of(self, index: int, layer: LayerShape) -> float:
        """What a decoder layer has, in whatever shape it is left."""

    def of_rest(self, rest: LayerShape) -> float:
        """What belongs to no decoder layer has."""


def whole(measure: Measure, layers: Iterable[LayerShape | None], rest: LayerShape) -> float:
    """What a model has whose layers are left so, or go where there is None."""
    left = (0.0 if layer is None else measure.of(index, layer) for index, layer in enumerate(layers))
    return math.fsum(left) + measure.of_rest(rest)


def cuts_of(layers: Sequence[LayerShape | None], shape: Shape) -> Cuts:
    """The layers and the blocks that are kept of a model whose layers are left so, or go where there is None."""
    kept = tuple(index for index, layer in enumerate(layers) if layer is not None)
    blocks = {
        index: layer.blocks
        for index, (layer, before) in enumerate(zip(layers, shape.layers, strict=True))
        if layer is not None and layer.blocks != before.blocks
    }
    return Cuts(layers=None if len(kept) == len(layers) else kept, blocks=blocks)


@dataclass(frozen=True)
class Weights:
    """Parameters, or the bytes that they take."""

    each: float = 1.0
    """Of a parameter."""

    def of(self, index: int, layer: LayerShape) -> float:  # noqa: ARG002
        """All that are in it."""
        return layer.parameters * self.each

    def of_rest(self, rest: LayerShape) -> float:
        """The same."""
        return rest.parameters * self.each


@dataclass(frozen=True)
class Served:
    """Bytes of weights and of the cache of keys and values."""

    weights: Weights
    shapes: Sequence[LayerShape]
    """Of the layers as they are."""
    cache: Sequence[float]
    """Bytes that each of these keeps."""

    def of(self, index: int, layer: LayerShape) -> float:
        """A cache is in proportion to the heads that are left, where these can be fewer."""
        if ATTENTION not in layer.blocks:
            return self.weights.of(index, layer)
        shares = [axis.units / self.shapes[index].units(axis.name) for axis in layer.within(ATTENTION)]
        return self.weights.of(index, layer) + self.cache[index] * math.prod(shares)

    def of_rest(self, rest: LayerShape) -> float:
        """Nothing there keeps anything."""
        return self.weights.of_rest(rest)


@dataclass(frozen=True)
class Times:
    """Seconds for a step of a model, by the sizes of its layers."""

    rest: float
    layer: float
    """Of a layer as it is."""
    shapes: Sequence[LayerShape]
    """Of the layers as they are."""
    saved: Mapping[str, Mapping[float, float]] = field(default_factory=dict)
    """By axis and the share of its units that is left, the seconds that a layer saves; nothing where all are."""
    blocks: Mapping[str, float] = field(default_factory=dict)
    """The seconds that a layer saves without a block."""

    def of(self, index: int, layer: LayerShape) -> float:
        """Between the shares that are known, in proportion."""
        before = self.shapes[index]
        saved = [_between(self.saved.get(axis.name, {}), axis.units / before.units(axis.name)) for axis in layer.axes]
        saved += [self.blocks.get(block, 0.0) for block in before.blocks if block not in layer.blocks]
        return max(self.layer - math.fsum(saved), 0.0)

    def of_rest(self, rest: LayerShape) -> float:  # noqa: ARG002
        """Whatever does not depend on layers."""
        return self.rest

    def told(self) -> dict[str, Any]:
        """As plain data, from which `read` makes the same."""
        axes = {name: {f"{share:.6g}": each for share, each in known.items()} for name, known in self.saved.items()}
        return {"rest": self.rest, "layer": self.layer, "saved": axes, "saved_without": dict(self.blocks)}

    @classmethod
    def read(cls, told: Any, shape: Shape) -> Times:
        """From what `told` returned.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: it is something else.
        """
        saved = {
            name: {float(share): _seconds(each) for share, each in known.items()}
            for name, known in told["saved"].items()
        }
        blocks = {name: _seconds(each) for name, each in told["saved_without"].items()}
        axes = {axis.name for layer in shape.layers for axis in layer.axes}
        shares = [share for known in saved.values() for share in known]
        found = cls(_seconds(told["rest"]), _seconds(told["layer"]), shape.layers, saved, blocks)
        if not (
            set(saved) <= axes
            and set(blocks) <= set(BLOCKS)
            and all(0 < share <= 1 for share in shares)
            and found.layer > 0
        ):
            raise ValueError("no such times")
        return found


def _seconds(told: Any) -> float:
    """A number of seconds, which may be below zero where a difference was measured."""
    if isinstance(told, bool) or not isinstance(told, (int, float)) or not math.isfinite(told):
        raise ValueError("no time")
    return float(told)


def _between(known: Mapping[float, float], share: float) -> float:
    points = sorted({**known, 1.0: 0.0}.items())
    if share <= points[0][0]:  # fewer than were tried: on along the line that leads there
        low, high = (*points, (1.0, 0.0))[:2]
    else:
        place = next(place for place, (known_share, _) in enumerate(points) if known_share >= share)
        low, high = points[place - 1], points[place]
    if high[0] == low[0]:
        return low[1]
    return low[1] + (high[1] - low[1]) * (share - low[0]) / (high[0] - low[0])

"""OSSCAR: one-shot structured pruning by combinatorial optimization (Meng et al., ICML 2024, arXiv 2403.12983).

Layer by layer, attention heads and FFN channels are removed so that the output of attention and of the FFN changes least over
the calibration tokens: greedily, one at a time, each the cheapest given those that went before, with the weights on what is
left refitted exactly (`refit/elimination.py` has the mathematics). Of heads, whole key-value heads go, with the query heads that
share them. Of a mixture, every expert keeps as many channels, chosen and refitted over the tokens that are routed to it. Later
layers see the stream of the pruned layers before them. Where the projection has a bias, its inputs are taken less their mean,
and the bias takes over the mean of what is lost.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import TYPE_CHECKING, ClassVar, Literal

from optimum_prune.anatomy.shape import ATTENTION, FEED_FORWARD, LayerShape, Shape
from optimum_prune.anatomy.workload import Cost, Workload
from optimum_prune.calibration.stream import walk_cost
from optimum_prune.errors import RecipeError
from optimum_prune.hooks.marker import hookimpl
from optimum_prune.options import option
from optimum_prune.passes.base import Pass
from optimum_prune.passes.prune import PrunePass
from optimum_prune.refit.allocating import Allocating
from optimum_prune.refit.narrowing import Narrowing
from optimum_prune.selection.allowed import Allowed
from optimum_prune.selection.targets import Target, check_named_once, check_protected
from optimum_prune.surgery.cuts import Decision

if TYPE_CHECKING:
    from optimum_prune.anatomy.decoder import Decoder
    from optimum_prune.calibration.calibration import Calibration


@dataclass(frozen=True, kw_only=True)
class Osscar(PrunePass):
    """Removes FFN channels and attention heads by exact greedy elimination and refits what is left by least squares."""

    name: ClassVar[str] = "osscar"
    ratio: float | None = option("Fraction of the FFN channels to remove, between 0 and 1.", None, above=0, below=1)
    params: float | None = option(
        "Fraction of all the model's parameters to keep, instead of 'ratio'; the FFN width is solved for.",
        None,
        above=0,
        below=1,
    )
    head_ratio: float | None = option(
        "Fraction of the key-value heads to remove, with their query heads. If not given: 0, or if global, as many as are cheap.",
        None,
        above=0,
        below=1,
        or_else=0,
    )
    allocation: Literal["uniform", "global"] = option(
        "As much from every layer, or from each what hurts the model least: heads may then go instead of channels.",
        "uniform",
    )
    protect: tuple[int, ...] = option("Layers to leave as they are.", ())
    multiple_of: int | None = option(
        "Keep a multiple of this many channels. If not given: 64, or less for layers narrower than 1024.",
        None,
        at_least=1,
    )
    damping: float | None = option(
        "Added to the gram's diagonal, relative to its mean. If not given: 0.01, or 0.2 with a correction.",
        None,
        above=0,
        below=math.inf,
    )
    correction: float | None = option(
        "How far to move the FFN's outputs towards the dense model's hidden states, 0 to 1. If not given: 0, or 0.25 if global.",
        None,
        at_least=0,
        at_most=1,
    )
    step: int = option("Channels removed before the rest are ranked anew; 1 is the exact greedy.", 1, at_least=1)
    swaps: int = option(
        "After the elimination, swap up to this many pairs of channels where the loss falls.", 0, at_least=0
    )
    one_shot: bool = option("Rank the channels once instead of eliminating them; faster for very wide layers.", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio is None and self.params is None and not self.head_ratio:
            raise RecipeError(
                "osscar needs a target: 'ratio' or 'params' for the FFN channels, 'head_ratio' for heads."
            )
        if self.ratio is not None and self.params is not None:
            raise RecipeError("osscar has both 'ratio' and 'params', which ask for two widths. Give one of them.")
        if self.allocation == "global" and self.ratio is None and self.params is None:
            raise RecipeError(
                "osscar has allocation 'global' and no channels to remove. Give 'ratio' or 'params' too."
            )
        check_named_once(self.name, self.protect)

    @property
    def _narrowing(self) -> Narrowing:
        """How a layer is narrowed."""
        globally = self.allocation == "global"
        correction = (0.25 if globally else 0.0) if self.correction is None else self.correction
        damping = (0.2 if correction else 0.01) if self.damping is None else self.damping
        return Narrowing(damping, correction, self.step, self.swaps, self.one_shot)

    def _target(self, block: str) -> Target:
        """What is narrowed of a block."""
        return Target(self.name, block, self.protect, self.multiple_of)

    # What there will be

    def foresee(self, shape: Shape) -> Shape:
        check_protected(self.name, self.protect, shape)
        fewer, inner = self._with_fewer_whole_units(shape), self._target(FEED_FORWARD)
        if self.ratio is not None:
            found = inner.narrowed(fewer, self.ratio)
        elif self.params is not None:
            found = inner.solved(fewer, self.params * shape.parameters, shape.parameters)
        else:
            return fewer
        if self.allocation == "uniform":
            return found
        attention = {axis.name: 1 for layer in fewer.layers for axis in layer.within(ATTENTION)}
        return replace(found, searched={**attention, **inner.least(fewer)})

    def _with_fewer_whole_units(self, shape: Shape) -> Shape:
        if not self.head_ratio:
            return shape
        return self._target(ATTENTION).with_whole_units_removed(
            shape, self.head_ratio, "head_ratio", "fewer heads of the same size"
        )

    def estimate(self, shape: Shape, work: Workload) -> Cost:
        pairs = list(zip(shape.layers, self.foresee(shape).layers, strict=True))
        streams = 2 if self._narrowing.correction else 1
        walk, held = walk_cost(work, shape, streams), work.stored_states(streams)
        each = [self._narrowing.cost(work, before, after).with_memory(held) for before, after in pairs]
        if self.allocation == "uniform":
            return walk.followed_by(*each)
        return self._allocating(shape).cost(work, shape).followed_by(walk, *each)

    def _allocating(self, shape: Shape) -> Allocating:
        """What may become less for allocation `global`."""
        blocks = (ATTENTION, FEED_FORWARD) if self.head_ratio is None else (FEED_FORWARD,)
        names = [axis.name for layer in shape.layers for block in blocks for axis in layer.within(block)]
        allowed = Allowed(
            self.name, tuple(dict.fromkeys(names)), self.protect, self.multiple_of, fewest=0.0, one_less=True
        )
        return Allocating(allowed, self._narrowing)

    # Deciding

    def decide(self, decoder: Decoder, calibration: Calibration) -> Iterator[Decision]:
        shape = decoder.shape()
        uniform = self.foresee(shape)
        targets: Sequence[LayerShape] = uniform.layers
        if self.allocation == "global":
            start = self._with_fewer_whole_units(shape).layers
            wanted = uniform.parameters if self.params is None else round(self.params * shape.parameters)
            targets, evidence = self._allocating(shape).found(decoder, calibration, start, wanted)
            yield Decision(evidence=evidence)
        visits = calibration.walk(decoder, "OSSCAR, layer by layer")
        dense = calibration.quiet().walk(decoder, "") if self._narrowing.correction else repeat(None)
        changed = False
        for visit, reference in zip(visits, dense, strict=False):
            if reference is not None:
                reference.leave()  # before this layer is cut
            if visit.index in self.protect:
                continue
            before, target = shape.layers[visit.index], targets[visit.index]
            yield from self._narrowing.of_block(visit, calibration, ATTENTION, (before, target))
            goal = reference if changed else None
            yield from self._narrowing.of_block(visit, calibration, FEED_FORWARD, (before, target), goal)
            changed |= target != before


@hookimpl
def passes() -> Iterator[type[Pass]]:
    yield Osscar

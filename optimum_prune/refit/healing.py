"""Healing a model that whole layers or blocks are left out of, by least squares: no training, and no parameter more.

In front of each gap, the output projections of attention and of the FFN are refitted so that the hidden states behind their layer come
near to what those of the dense model are behind the gap; attention takes half of the way, the FFN what then is left. Behind
the gap, every layer's projections are moved some way towards the dense model's hidden states, the farther from the gap the less: all
the way would fit the calibration text too closely.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from optimum_prune.anatomy.shape import ATTENTION, BLOCKS, FEED_FORWARD, Shape
from optimum_prune.anatomy.workload import Cost, Workload
from optimum_prune.calibration.calibration import Calibration
from optimum_prune.calibration.stream import check_finite, run_layers, walk_cost
from optimum_prune.calibration.visit import LayerVisit
from optimum_prune.errors import NumericalError
from optimum_prune.refit.reconstruction import refitted, refitting_cost
from optimum_prune.surgery.cuts import Decision

SHARE = 0.5
"""How much of the way over a gap attention is to go."""
CORRECTION, FADING = 0.4, 0.85
"""How far the first layer behind a gap is moved towards the dense model, and how much less each one behind."""
DAMPING = 0.15
"""Of these corrections."""

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from optimum_prune.anatomy.decoder import Decoder, DecoderLayer


@dataclass(frozen=True)
class _Goals:
    """Hidden states of the dense model at a layer, batch by batch."""

    attended: list[Tensor]
    """Behind its attention."""
    behind: list[Tensor]
    """Behind the layer."""


@dataclass(frozen=True)
class _Refit:
    """How the projections of a layer are refitted."""

    visit: LayerVisit
    calibration: Calibration

    def decide(self, block: str, goal: list[Tensor], damping: float, strength: float) -> Iterator[Decision]:
        """New weights of the output projection of a block; none where a norm follows it."""
        path = self.visit.layer.output_of(block).rpartition(".")[0]

        def refit() -> Decision | None:
            weights = refitted(self.visit, block, goal, damping, strength)
            evidence = {"healed": self.visit.index, "projection": path, "strength": strength}
            return Decision(weights=weights, evidence=evidence) if weights else None

        if decision := self.calibration.once(f"{path} of layer {self.visit.index}", refit):
            yield decision


def heal(
    decoder: Decoder, calibration: Calibration, kept: Mapping[int, Sequence[str]], damping: float
) -> Iterator[Decision]:
    """New weights for what stays in front of each gap, one decision after the other; what is to go is still there.

    A gap at the very beginning stays as it is, and so does what has a norm behind it, or a mixture of experts in front of it.

    Args:
        kept: of each layer, the blocks that stay; of a layer that goes, none.
        damping: added to the gram's diagonal, relative to its mean.
    """
    visits = calibration.walk(decoder, "Healing")
    dense = calibration.quiet().walk(decoder, "")
    strength = 0.0
    for visit, reference in zip(visits, dense, strict=True):
        blocks = kept[visit.index]
        if not blocks:
            visit.skip()
            reference.leave()
            if reason := _not_finite(reference, f"Decoder layer {visit.index}"):
                yield Decision(evidence={"not_healed": reason})
                return
            continue
        missing = [block for block in visit.layer.blocks if block not in blocks]
        blocks = [
            block for block in blocks if not visit.layer.adds_nothing(block)
        ]  # what was left out by zeros stays so
        gap = gap_behind(visit.index, kept)
        visit.leave_out(missing)
        attended = reference.behind(ATTENTION) if gap or missing or strength else []
        reference.leave()
        goals = _Goals(attended, [hidden for _, hidden in reference.stream])
        check_finite(goals.behind, f"Decoder layer {visit.index}", visit.activations)
        refit = _Refit(visit, calibration)
        if gap or missing:
            try:
                far = through(decoder, reference, gap)
            except NumericalError as error:
                yield Decision(evidence={"not_healed": str(error)})
                return
            yield from _bridge(refit, blocks, goals, far, damping)
            strength = CORRECTION
        elif strength:
            yield from _correct(refit, blocks, goals, strength)
            strength *= FADING


def _not_finite(reference: LayerVisit, what: str) -> str:
    """What is wrong with the dense model's hidden states, if they are not finite."""
    try:
        check_finite((hidden for _, hidden in reference.stream), what, reference.activations)
    except NumericalError as error:
        return str(error)
    return ""


def _bridge(
    refit: _Refit, blocks: Sequence[str], goals: _Goals, far: list[Tensor], damping: float
) -> Iterator[Decision]:
    """Refits what is left of a layer so that it puts out hidden states behind the gap."""
    visit, last = refit.visit, last_refitted(refit.visit.layer, blocks)
    if last is None:
        return
    if len(blocks) > 1:
        wanted = []
        for middle, end, near in zip(goals.attended, far, goals.behind, strict=True):
            wanted.append(visit.activations.store(middle + end.to(middle.device) - near))
            visit.activations.release(middle, end, near)
        yield from refit.decide(ATTENTION, wanted, damping, SHARE)
    yield from refit.decide(last, far, damping, 1.0)


def _correct(refit: _Refit, blocks: Sequence[str], goals: _Goals, strength: float) -> Iterator[Decision]:
    """Moves what a layer puts out some way towards what it puts out in the dense model."""
    if ATTENTION in blocks:
        yield from refit.decide(ATTENTION, goals.attended, DAMPING, strength)
    if last_refitted(refit.visit.layer, blocks) == FEED_FORWARD:
        yield from refit.decide(FEED_FORWARD, goals.behind, DAMPING, strength)


def last_refitted(layer: DecoderLayer, blocks: Sequence[str]) -> str | None:
    """The last block of a layer whose output projection can be refitted, if only these blocks of it stay; None for a mixture, or without any."""
    if not blocks:
        return None
    last = BLOCKS[-1] if BLOCKS[-1] in blocks else BLOCKS[0]
    return None if layer.projection(layer.output_of(last)).linear is None else last


@torch.no_grad()
def through(decoder: Decoder, visit: LayerVisit, layers: range) -> list[Float[Tensor, "w t h"]]:
    """Hidden states behind some consecutive layers, from those of a visit, batch by batch.

    Raises:
        NumericalError: a layer puts out a value that is not finite.
    """
    behind = [hidden for _, hidden in visit.stream]
    for index in layers:
        for position, (batch, _) in enumerate(visit.stream):
            before = behind[position]
            behind[position] = visit.activations.store(run_layers(decoder, batch, before, [index]))
            visit.activations.release(before)
        check_finite(behind, f"Decoder layer {index}", visit.activations)
    return behind


def gap_behind(index: int, kept: Mapping[int, Sequence[str]]) -> range:
    """The layers right behind a layer that go, of which no block is kept."""
    end = index + 1
    while end in kept and not kept[end]:
        end += 1
    return range(index + 1, end)


def healing_cost(work: Workload, shape: Shape, gone: float) -> Cost:
    """Refits layers in front of gaps and behind them, as if half of those that stay lay there.

    Args:
        gone: how many layers are left out.
    """
    share = (len(shape.layers) - gone) / len(shape.layers) / 2
    refits = [refitting_cost(work, layer, *BLOCKS) for layer in shape.layers]
    one = Cost().followed_by(*refits).times(3 * share)
    held = max(cost.memory for cost in refits) + work.stored_states(5)
    left = share * sum(cost.left for cost in refits)
    return walk_cost(work, shape, streams=2).followed_by(replace(one, memory=held, left=left))

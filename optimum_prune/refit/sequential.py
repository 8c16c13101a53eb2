"""A model brought to given sizes layer by layer, each layer chosen and refitted on the stream of those that were before it.

The dense model's hidden states go along. Once something in front of a layer was cut, what the layer reads is refitted (`reading.py`), and
what attention and the FFN put out is moved some way towards the dense model (`reconstruction.py`). What lies in front of layers that go, or
of blocks that do, learns to put out the hidden states behind the gap, all the way, with the units of the FFNs that go to choose from (`rebuilding.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from optimum_prune.anatomy.shape import ATTENTION, BLOCKS, FEED_FORWARD, STATES, LayerShape, Shape
from optimum_prune.anatomy.workload import Cost, Workload
from optimum_prune.calibration.stream import check_finite, walk_cost
from optimum_prune.calibration.visit import LayerVisit
from optimum_prune.machine.memory import give_back
from optimum_prune.refit.bridging import BRIDGING
from optimum_prune.refit.healing import gap_behind, through
from optimum_prune.refit.narrower_states import NarrowerStates
from optimum_prune.refit.narrowing import Narrowing
from optimum_prune.refit.reading import reading_cost, reread
from optimum_prune.refit.rebuilding import pool, rebuilding_cost
from optimum_prune.refit.reconstruction import refitted, refitting_cost
from optimum_prune.refit.solving import OfMedian
from optimum_prune.selection.measures import cuts_of
from optimum_prune.selection.mixtures import AXIS as WHOLE
from optimum_prune.selection.mixtures import best_members, seeing_cost
from optimum_prune.selection.shapes import states_of
from optimum_prune.surgery.config import sync_config
from optimum_prune.surgery.cuts import Decision
from optimum_prune.surgery.operation import copy_of

if TYPE_CHECKING:
    from torch import Tensor

    from optimum_prune.anatomy.axis import Axis
    from optimum_prune.anatomy.decoder import Decoder
    from optimum_prune.calibration.calibration import Calibration

STATES_NARROWING = NarrowerStates("budget")
"""How hidden states become narrower, if they do."""
TOGETHER = 64
"""Units of a rebuilt FFN that go before the rest are ranked anew: it has the units of several to begin with."""


@dataclass(frozen=True)
class Repairs:
    """How what is left is refitted."""

    narrowing: Narrowing
    """How units are chosen, and how far an FFN is moved towards the dense model; attention as far."""
    reading: float = 0.0
    """How far what blocks read is refitted, 0 to 1."""
    reading_damping: float = OfMedian(0.02)
    rebuild: bool = True
    """Whether an FFN in front of a gap has the units of those that go to choose from."""

    def for_bridging(self) -> Narrowing:
        """How an FFN in front of a gap is narrowed: moved all the way."""
        return replace(self.narrowing, damping=BRIDGING, correction=1.0)

    def for_rebuilding(self) -> Narrowing:
        """The same of one that has the units of others to choose from."""
        return replace(self.for_bridging(), step=max(TOGETHER, self.narrowing.step))

    def quicker(self, step: int) -> Repairs:
        """What tells which of some models is best: no fewer units are removed before the rest are ranked anew, and what is read stays."""
        return replace(self, narrowing=replace(self.narrowing, step=max(step, self.narrowing.step)), reading=0.0)


@dataclass(frozen=True)
class Wanted:
    """What is to be left of a model."""

    layers: Sequence[LayerShape | None]
    """Of each decoder layer its shape, without the blocks that go; None of those that go."""

    @property
    def states(self) -> int:
        """How many features its hidden states have."""
        return states_of(tuple(self.layers))

    def gap_behind(self, index: int) -> range:
        """The layers right behind a layer that go."""
        return gap_behind(
            index, {number: () if layer is None else layer.blocks for number, layer in enumerate(self.layers)}
        )

    def changed_before(self, index: int, shape: Shape) -> bool:
        """Whether anything in front of a layer is not as it was."""
        return any(after != before for after, before in zip(self.layers[:index], shape.layers, strict=False))


def brought_to(
    decoder: Decoder, dense: Decoder, calibration: Calibration, wanted: Wanted, repairs: Repairs
) -> Iterator[Decision]:
    """The decisions by which a model gets the sizes that are wanted; each is to be carried out before the next is asked for.

    Hidden states become narrower first; then all is measured by the model that has these.

    Args:
        dense: the same model, which stays as it is.
    """
    if wanted.states < dense.shape().rest.units(STATES):
        yield STATES_NARROWING.decision(dense, calibration, wanted.states)
        sync_config(decoder)
        dense = copy_of(decoder)
    shape, hidden = dense.shape(), dense.hidden()
    visits = calibration.walk(decoder, "Refitting, layer by layer")
    references = calibration.quiet().walk(dense, "")
    for visit, reference in zip(visits, references, strict=True):
        before, after = shape.layers[visit.index], wanted.layers[visit.index]
        if after is None:
            visit.skip()
            continue
        local = _Layer(decoder, dense, hidden, calibration, visit, reference)
        yield from local.decisions(before, after, wanted, repairs, wanted.changed_before(visit.index, shape))
    yield Decision(cuts_of(wanted.layers, shape))


@dataclass(frozen=True)
class _Layer:
    """A layer that is brought to its size, and what it was in the dense model."""

    decoder: Decoder
    dense: Decoder
    hidden: Axis | None
    calibration: Calibration
    visit: LayerVisit
    reference: LayerVisit

    def decisions(
        self, before: LayerShape, after: LayerShape, wanted: Wanted, repairs: Repairs, changed: bool
    ) -> Iterator[Decision]:
        """How it becomes what it is to be.

        Args:
            changed: whether anything in front of it is.
        """
        visit, narrowing, shapes = self.visit, repairs.narrowing, (before, after)
        gone = [block for block in before.blocks if block not in after.blocks]
        strength = narrowing.correction if changed else 0.0
        visit.leave_out(gone)
        if ATTENTION in after.blocks:
            if changed:
                yield from self._reread(ATTENTION, repairs)
            attended = self.reference.behind(ATTENTION) if strength and not gone else None
            yield from narrowing.of_block(visit, self.calibration, ATTENTION, shapes)
            if attended is not None:
                yield from self._moved(ATTENTION, attended, narrowing.damping, strength)
        if FEED_FORWARD in after.blocks and changed:
            yield from self._reread(FEED_FORWARD, repairs)
        yield from self._fewer_members(before, after, narrowing.score)
        self.reference.leave()
        gap = wanted.gap_behind(visit.index)
        if gap or gone:
            yield from self._bridged(shapes, gone, gap, repairs)
        else:
            goal = self.reference if strength else None
            yield from narrowing.of_block(visit, self.calibration, FEED_FORWARD, shapes, goal)

    def _fewer_members(self, before: LayerShape, after: LayerShape, score: str) -> Iterator[Decision]:
        """Of a mixture those that matter most; from then on the layer is one of so many."""
        if (keep := after.units(WHOLE)) in (0, before.units(WHOLE)):
            return
        yield from self._once("members", lambda: best_members(self.visit, (keep,), score)[0])
        self.visit.layer = self.decoder.layer(self.visit.index)
        self.visit.forget(FEED_FORWARD)

    def _once(self, what: str, decide: Callable[[], Decision | None]) -> Iterator[Decision]:
        decision = self.calibration.once(f"{what} of layer {self.visit.index}", decide)
        if decision is not None:
            yield decision

    def _reread(self, block: str, repairs: Repairs) -> Iterator[Decision]:
        """What a block reads, refitted."""
        if not repairs.reading:
            return

        def decide() -> Decision | None:
            weights = reread(self.visit, self.reference, block, repairs.reading_damping, repairs.reading)
            return Decision(weights=weights) if weights else None

        yield from self._once(f"what {block} reads", decide)
        self.visit.forget(block)

    def _moved(self, block: str, goal: list[Tensor], damping: float, strength: float) -> Iterator[Decision]:
        """What a block puts out, moved towards hidden states behind it."""
        if self.visit.layer.projection(self.visit.layer.output_of(block)).linear is None:
            return

        def decide() -> Decision | None:
            weights = refitted(self.visit, block, goal, damping, strength)
            evidence = {"layer": self.visit.index, "moved": block, "strength": strength}
            return Decision(weights=weights, evidence=evidence) if weights else None

        yield from self._once(f"output of {block}", decide)

    def _bridged(
        self, shapes: tuple[LayerShape, LayerShape], gone: Sequence[str], gap: range, repairs: Repairs
    ) -> Iterator[Decision]:
        """What is left of the layer, made to put out the hidden states behind the gap.

        Args:
            gone: the blocks of it that go.
        """
        far = through(self.dense, self.reference, gap)
        check_finite(far, f"Decoder layer {self.visit.index}", self.visit.activations)
        if FEED_FORWARD not in shapes[1].blocks:
            yield from self._moved(ATTENTION, far, BRIDGING, 1.0)
            return
        goal = LayerVisit(
            self.visit.layer, [(batch, states) for (batch, _), states in zip(self.visit.stream, far, strict=True)]
        )
        found = pool(self.dense, self.hidden, self.visit, gap, gone) if gap and repairs.rebuild else None
        if found is None:
            yield from repairs.for_bridging().of_block(self.visit, self.calibration, FEED_FORWARD, shapes, goal)
            return
        decide = partial(found.decision, shapes[1].units(found.axis.name), repairs.for_rebuilding(), goal)
        give_back()  # a pool's activations and grams are the largest there are
        yield from self._once("rebuilt FFN", decide)
        del found, decide
        give_back()
        self.visit.forget(FEED_FORWARD)


def bringing_cost(work: Workload, shape: Shape, wanted: Wanted, repairs: Repairs) -> Cost:
    """What `brought_to` takes."""
    costs = [STATES_NARROWING.cost(work, shape)] if wanted.states < shape.rest.units(STATES) else []
    for index, (before, after) in enumerate(zip(shape.layers, wanted.layers, strict=True)):
        if after is None:
            continue
        if repairs.rebuild and (gone := len(wanted.gap_behind(index))):
            costs.append(rebuilding_cost(work, before, after, gone, repairs.for_rebuilding()))
        if after.units(WHOLE) < before.units(WHOLE):
            costs.append(seeing_cost(work, before))
        reading = reading_cost(work).times(len(BLOCKS) if repairs.reading else 0)
        costs += [repairs.narrowing.cost(work, before, after), refitting_cost(work, before, *BLOCKS), reading]
    held = work.stored_states(4)
    return walk_cost(work, shape, streams=2).followed_by(*(cost.with_memory(held) for cost in costs))

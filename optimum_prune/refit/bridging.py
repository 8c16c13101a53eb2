"""The best of some windows of layers to leave out, each with what lies in front of it healed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from optimum_prune.anatomy.shape import FEED_FORWARD, Shape
from optimum_prune.anatomy.workload import Cost, Workload
from optimum_prune.calibration.stream import walk_cost
from optimum_prune.errors import NumericalError
from optimum_prune.evaluation.losses import perplexity_of
from optimum_prune.refit.healing import last_refitted, through
from optimum_prune.refit.reconstruction import refitted, refitting_cost
from optimum_prune.refit.solving import OfMedian
from optimum_prune.selection.divergence import split, trial_workloads
from optimum_prune.selection.search import Losses, Variant, check_finite, measure, searching_cost
from optimum_prune.surgery.cuts import Decision
from optimum_prune.surgery.operation import changed_layer

if TYPE_CHECKING:
    from torch import Tensor, nn

    from optimum_prune.anatomy.decoder import Decoder
    from optimum_prune.calibration.calibration import Calibration
    from optimum_prune.calibration.stream import Batch
    from optimum_prune.calibration.visit import LayerVisit

BRIDGING = OfMedian(0.1)
"""Damping of what goes all the way over a gap, where nobody says another."""
FINALISTS = 4
"""Windows of layers that are healed and measured again, to choose among them."""


def hand_on(_: Batch, hidden: Tensor) -> Tensor:
    """What is left out hands on what it is given."""
    return hidden


def measured_without(
    decoder: Decoder, calibration: Calibration, starts: Sequence[int], span: int, *, race: bool = True
) -> Losses:
    """What the model loses without each window of `span` layers, by their starts.

    Raises:
        NumericalError: none of the losses is finite.
    """
    variants = [Variant(start, start + span, hand_on) for start in starts]
    what = f"Searching windows of {span} layers" if span > 1 else "Searching layers"
    return check_finite(measure(decoder, calibration, variants, what, race=race), "window of layers")


def best_window(decoder: Decoder, calibration: Calibration, span: int, damping: float) -> range:
    """The `span` consecutive layers that go best: of those windows that cost least, the one that is best healed."""
    starts = range(len(decoder) - span + 1)
    losses = measured_without(decoder, calibration, starts, span)
    start, _ = best_of(decoder, calibration, losses.ranked, span, damping)
    return range(start, start + span)


def best_of(
    decoder: Decoder, calibration: Calibration, ranked: Sequence[int], span: int, damping: float
) -> tuple[int, dict[int, float]]:
    """See `best_healed`, of the first of some windows, which are ranked; measured once."""
    healed = partial(best_healed, decoder, calibration, ranked[:FINALISTS], span, damping)
    return calibration.once("best healed window", healed)


def best_healed(
    decoder: Decoder, calibration: Calibration, starts: Sequence[int], span: int, damping: float
) -> tuple[int, dict[int, float]]:
    """The start of the window of `span` layers without which the model is best, and the perplexity without each.

    Each window's gap is bridged on some windows of text, and the model measured on others.
    """
    fitted, held_out = (calibration.on(windows) for windows in split(calibration.windows))
    variants = {start: Variant(start, start + span, hand_on) for start in starts}
    with suppress(NumericalError):  # behind a broken layer nothing can be healed, but it can be left out
        for visit in fitted.walk(decoder, "Healing the best windows"):
            start = visit.index + 1
            if start not in variants:
                continue
            gap = range(start, start + span)
            bridge = partial(bridged, decoder, visit, gap, damping)
            weights = calibration.once(f"what bridges layers {start} to {gap[-1]}", bridge)
            layer = changed_layer(decoder, Decision(weights=weights), visit.index)
            variants[start] = Variant(visit.index, start + span, _as_layer(layer, visit.index))
    order = sorted(variants)
    losses = measure(decoder, held_out, [variants[start] for start in order], "Measuring the healed windows")
    check_finite(losses, "window of layers")
    return order[losses.ranked[0]], dict(zip(order, map(perplexity_of, losses.means), strict=True))


def best_window_cost(work: Workload, shape: Shape, span: int) -> Cost:
    """What `best_window` takes."""
    spans = [(start, start + span, 0.0) for start in range(len(shape.layers) - span + 1)]
    healed = finalists_cost(work, trial_workloads(work)[1], shape, span)
    return searching_cost(work, shape, spans, race=True).followed_by(healed)


def bridged(decoder: Decoder, visit: LayerVisit, gap: range, damping: float) -> dict[str, Tensor]:
    """New weights of the visited dense layer, that bridge the gap behind it; none where it cannot be refitted."""
    block = last_refitted(visit.layer, [block for block in visit.layer.blocks if not visit.layer.adds_nothing(block)])
    if block is None:
        return {}
    goal = through(decoder, visit, range(visit.index, gap.stop))
    return refitted(visit, block, goal, damping)


def _as_layer(layer: nn.Module, index: int) -> Any:
    """Runs another layer in the place of the one at an index."""
    return lambda batch, hidden: batch.run(layer, index, hidden)


def finalists_cost(work: Workload, few: Workload, shape: Shape, count: int) -> Cost:
    """Heals the best windows of `count` layers on a part of the text, and measures them on another.

    Args:
        few: the workload of the other part.
    """
    layers = len(shape.layers)
    finalists = min(FINALISTS, layers - count + 1)
    bridges = [replace(refitting_cost(work, layer, FEED_FORWARD), left=0.0) for layer in shape.layers]
    copies = finalists * work.itemsize * work.hidden * max(layer.width(FEED_FORWARD) for layer in shape.layers)
    bridging = Cost().followed_by(*bridges).times(2 * finalists / layers).with_memory(work.stored_states(2) + copies)
    spans = [(layers // 2, layers // 2 + count, 1.0)] * finalists if layers // 2 + count <= layers else []
    measuring = searching_cost(few, shape, spans, race=False).with_memory(copies)
    return walk_cost(work, shape).followed_by(bridging, measuring)

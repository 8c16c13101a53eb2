"""Passes that prune, carried out on the model in memory: each decision is cut before the next is asked for."""

from __future__ import annotations

from functools import partial

from optimum_prune.anatomy.decoder import Decoder
from optimum_prune.anatomy.shape import Shape
from optimum_prune.calibration.calibration import Calibration
from optimum_prune.errors import SurgeryError
from optimum_prune.hooks.plugins import Plugins
from optimum_prune.machine import processes
from optimum_prune.machine.mapped_weights import MappedWeights
from optimum_prune.machine.memory import Meter
from optimum_prune.options import as_plain
from optimum_prune.passes.outcome import Outcome
from optimum_prune.passes.prune import PrunePass
from optimum_prune.run.journal import journal_of
from optimum_prune.run.untouched import Untouched
from optimum_prune.surgery import operation
from optimum_prune.surgery.config import sync_config
from optimum_prune.surgery.cuts import Cuts

SURPRISE = 0.05
"""By this fraction of a model's parameters, a pass may leave more or less than it foresaw."""


def prune(
    step: PrunePass,
    decoder: Decoder,
    calibration: Calibration,
    plugins: Plugins,
    weights: MappedWeights | None = None,
) -> Outcome:
    """Carries out one pass that prunes on a model, in place.

    Args:
        weights: where the model's weights are, if on disk.

    Raises:
        SurgeryError: the model's shape is not what the pass foresaw.
    """
    if processes.first():
        plugins.manager.hook.before_pass(step=step, model=decoder.model)
    before, untouched = decoder.shape(), None if weights is not None else Untouched(decoder.model)
    cuts, evidence, decided = Cuts(), [], set[str]()
    journal, decide = journal_of(calibration), partial(step.decide, decoder, calibration)
    with Meter() as meter:
        for decision in decide() if journal is None else journal.decisions(step.name, decide):
            processes.agreed(decision.cuts)
            operation.carry_out(decoder, decision)
            if weights is not None:
                weights.write_changes(decoder.model)
            cuts = cuts.merge(decision.cuts)
            evidence.append(decision.evidence)
            decided.update(decision.weights)
        if untouched is not None:
            untouched.check(step.name, decided)
        sync_config(decoder)
    _check_foreseen(step, before, decoder.shape())
    outcome = Outcome(step.name, step.stage, as_plain(step), meter.seconds, meter.peak_memory, cuts, tuple(evidence))
    if processes.first():
        plugins.manager.hook.pass_finished(outcome=outcome)
    return outcome


def _check_foreseen(step: PrunePass, before: Shape, after: Shape) -> None:
    """Refuses a shape that a pass did not foresee."""
    expected = step.foresee(before)
    # Of layers that are not alike, a search decides which go, and so how large what is left is.
    larger = before.even and abs(after.parameters - expected.parameters) > SURPRISE * before.parameters
    if step.foresees_layers and (len(after.layers) != len(expected.layers) or larger):
        raise SurgeryError(
            f"The pass '{step.name}' left a model of {after.describe()} where it foresaw {expected.describe()}. Please report it."
        )

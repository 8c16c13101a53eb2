"""Passes that prune, carried out on the model in memory: each decision is cut before the next is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from optimum_prune.anatomy.decoder import Decoder
from optimum_prune.anatomy.shape import Shape
from optimum_prune.calibration.calibration import Calibration
from optimum_prune.errors import SurgeryError
from optimum_prune.hooks.hearing import before_pass, pass_finished
from optimum_prune.hooks.plugins import Plugins
from optimum_prune.machine import processes
from optimum_prune.machine.isolation import guarded_steps
from optimum_prune.machine.mapped_weights import MappedWeights
from optimum_prune.machine.memory import Meter, give_back
from optimum_prune.options import as_plain
from optimum_prune.passes.evidence import plain_evidence
from optimum_prune.passes.outcome import Outcome
from optimum_prune.passes.prune import PrunePass
from optimum_prune.plan.checks import foreseen
from optimum_prune.refit.controls import Control
from optimum_prune.run.journal import journal_of
from optimum_prune.run.models import Models
from optimum_prune.run.untouched import Untouched, only_looked_at
from optimum_prune.surgery import operation
from optimum_prune.surgery.config import sync_config
from optimum_prune.surgery.cuts import Cuts, Decision
from optimum_prune.surgery.decisions import check_decision
from optimum_prune.training.lesson import Lesson, let_go

SURPRISE = 0.05
"""By this fraction of a model's parameters, a pass may leave more or less than it foresaw."""


def prune(
    step: PrunePass,
    decoder: Decoder,
    calibration: Calibration,
    plugins: Plugins,
    models: Models | None = None,
    lesson: Lesson | None = None,
    *,
    controlled: bool = False,
) -> Outcome:
    """Carries out one pass that prunes on a model, in place.

    Args:
        models: where the model's weights are from, and lie.
        lesson: for a pass that trains.
        controlled: whether the choice is measured beside others.

    Raises:
        SurgeryError: the model's shape is not what the pass foresaw.
    """
    weights = None if models is None else models.weights
    with only_looked_at(decoder.model, step.name, models):
        if processes.first():
            before_pass(plugins, step, decoder.model, calibration.progress)
    before, untouched = decoder.shape(), Untouched(decoder.model, weights)
    dense = models.as_it_is(decoder) if models is not None and controlled else None
    with Meter() as meter:
        cuts, evidence, decided = _cut(step, decoder, calibration, weights, lesson)
        if models is not None:
            models.check()
            models.follow(cuts)
        untouched.check(step.name, decided)
        sync_config(decoder)
        decoder.model.eval()  # whatever the pass left it in
        controls = {} if dense is None else _controls(Control(dense, decoder, cuts, decided, step.trains), calibration)
        del dense
        let_go(lesson)
    _check_foreseen(step, before, decoder.shape())
    spent = (meter.seconds, meter.peak_memory)
    outcome = Outcome(step.name, step.stage, as_plain(step), *spent, cuts, tuple(evidence), controls=controls)
    if processes.first():
        pass_finished(plugins, outcome, calibration.progress)
    return outcome


def _cut(
    step: PrunePass,
    decoder: Decoder,
    calibration: Calibration,
    weights: MappedWeights | None,
    lesson: Lesson | None,
) -> tuple[Cuts, list[Mapping[str, Any]], set[str]]:
    """Carries out the decisions of a pass: all cuts, why, and the names of the parameters that got new values."""
    cuts, evidence, decided = Cuts(), [], set[str]()
    journal, decide = journal_of(calibration), partial(_decisions, step, decoder, calibration, lesson)
    for decision in decide() if journal is None else journal.decisions(step.name, decide):
        processes.agreed(decision.cuts)
        _carry_out(step, decoder, decision)
        if weights is not None:
            weights.write_changes(decoder.model)
        cuts = cuts.merge(decision.cuts)
        evidence.append(decision.evidence)
        decided.update(decision.weights)
    return cuts, evidence, decided


def _controls(control: Control, calibration: Calibration) -> Mapping[str, Any]:
    """What the choice of a pass comes to beside others, measured once."""
    give_back()
    found = calibration.once("controls", partial(control.evidence, calibration))
    give_back()
    return found


def _carry_out(step: PrunePass, decoder: Decoder, decision: Decision) -> None:
    """Carries out a decision of a pass.

    Raises:
        SurgeryError: it cannot be; the message names the pass.
    """
    try:
        operation.carry_out(decoder, decision)
    except SurgeryError as error:
        raise SurgeryError(f"The pass '{step.name}' decided what cannot be carried out: {error}") from error


def _decisions(
    step: PrunePass, decoder: Decoder, calibration: Calibration, lesson: Lesson | None
) -> Iterator[Decision]:
    """The decisions of a pass, which runs guarded.

    Raises:
        PassError: it yields something else, or evidence that is no plain data.
    """
    given: tuple[Any, ...] = (decoder, calibration) if lesson is None else (decoder, calibration, lesson)
    for made in guarded_steps(f"The pass '{step.name}'", partial(step.decide, *given)):
        check_decision(made, step.name)
        plain_evidence(made.evidence, step.name)
        yield made


def _check_foreseen(step: PrunePass, before: Shape, after: Shape) -> None:
    """Refuses a shape that a pass did not foresee."""
    expected = foreseen(step, before)
    # Of layers that are not alike, a search decides which go, and so how large what is left is.
    larger = before.even and abs(after.parameters - expected.parameters) > SURPRISE * before.parameters
    if step.foresees_layers and (len(after.layers) != len(expected.layers) or larger):
        raise SurgeryError(
            f"The pass '{step.name}' left a model of {after.describe()} where it foresaw {expected.describe()}. Please report it."
        )

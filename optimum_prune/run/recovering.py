"""Passes that recover, carried out on the model in memory: weights get new values, and no shape changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from optimum_prune.anatomy.decoder import Decoder
from optimum_prune.calibration.calibration import Calibration
from optimum_prune.errors import NumericalError, SurgeryError
from optimum_prune.hooks.hearing import before_pass, pass_finished
from optimum_prune.hooks.plugins import Plugins
from optimum_prune.machine import processes
from optimum_prune.machine.isolation import guarded
from optimum_prune.machine.memory import Meter
from optimum_prune.options import as_plain
from optimum_prune.passes.evidence import plain_evidence
from optimum_prune.passes.outcome import Outcome
from optimum_prune.passes.recover import RecoverPass, Recovery
from optimum_prune.run.fingerprints import tensor_fingerprint
from optimum_prune.run.journal import journal_of
from optimum_prune.run.models import Models
from optimum_prune.run.untouched import only_looked_at
from optimum_prune.training.lesson import let_go

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from optimum_prune.training.lesson import Lesson


def recover(
    step: RecoverPass,
    decoder: Decoder,
    calibration: Calibration,
    plugins: Plugins,
    models: Models,
    lesson: Lesson | None = None,
) -> Outcome:
    """Carries out one pass that recovers on a model, in place.

    The journal keeps the weights that it changed, and a run that goes on behind it puts them in.

    Raises:
        SurgeryError: the pass changed more than values.
        NumericalError: a value is not finite.
    """
    with only_looked_at(decoder.model, step.name, models):
        if processes.first():
            before_pass(plugins, step, decoder.model, calibration.progress)
    journal = journal_of(calibration)
    carry_out = partial(
        _recovered, step, decoder, models, partial(_recovery, step, decoder, calibration, models, lesson)
    )
    with Meter() as meter:
        found = carry_out() if journal is None else journal.result(step.name, carry_out, models.let_go)
        _put_in(decoder.model, found["weights"], models)
        let_go(lesson)
    outcome = Outcome(
        step.name, step.stage, as_plain(step), meter.seconds, meter.peak_memory, evidence=(found["evidence"],)
    )
    if processes.first():
        pass_finished(plugins, outcome, calibration.progress)
    return outcome


def _recovery(
    step: RecoverPass, decoder: Decoder, calibration: Calibration, models: Models, lesson: Lesson | None
) -> Recovery:
    """What a pass is given."""
    measured = lesson is not None and lesson.measures_references
    if not (step.needs_teacher or measured):
        return Recovery(decoder, lambda: decoder, models.layers, calibration, lesson)
    return Recovery(decoder, models.teacher, models.layers, calibration, lesson, models.close_teacher)


def _recovered(
    step: RecoverPass, decoder: Decoder, models: Models, given: Callable[[], Recovery]
) -> dict[str, Mapping[str, Any]]:
    """The weights that a pass changed, by name, as they lie in the model afterwards; and its evidence."""
    model, recovery = decoder.model, given()
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    before = _values(model, models)
    with models.writable(decoder) as moved:
        with guarded(f"The pass '{step.name}'"):
            evidence = step.recover(recovery)
        models.check()
        after = _values(model, models)
    _check_kinds(step, before, after)
    parameters = dict(model.eval().named_parameters())
    for name, parameter in parameters.items():
        parameter.requires_grad_(trained[name]).grad = None
    changed = {name: value.detach() for name, value in parameters.items() if after[name] != before[name]}
    _check_finite(step, {name: after[name] for name in changed})
    for name in moved.keys() - changed.keys():
        parameters[name].data = moved[name]
    processes.agreed({name: after[name].fingerprint for name in changed})
    return {"weights": changed, "evidence": plain_evidence(evidence, step.name)}


class _Values(NamedTuple):
    """What is known of the values of a parameter: where it is equal, they are."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    fingerprint: str
    finite: bool


def _values(model: PreTrainedModel, models: Models) -> dict[str, _Values]:
    """What is known of each parameter of the model, by name."""
    found: dict[int, tuple[str, _Values]] = {}
    for path, module in model.named_modules():
        for name, value in module.named_parameters(path, recurse=False):
            if id(value) not in found:  # tied ones count once
                finite = not value.numel() or bool(torch.stack(torch.aminmax(value.detach())).isfinite().all())
                found[id(value)] = name, _Values(tuple(value.shape), value.dtype, tensor_fingerprint(value), finite)
        models.release(module)
    return dict(found.values())


def _check_kinds(step: RecoverPass, before: Mapping[str, _Values], after: Mapping[str, _Values]) -> None:
    """Refuses parameters that came, went, or are of another shape or dtype."""
    others = sorted(name for name in {**before, **after} if before.get(name, ())[:2] != after.get(name, ())[:2])
    if others:
        name = others[0]
        was, is_now = (
            f"{values[name].dtype} {values[name].shape}" if name in values else "not there"
            for values in (before, after)
        )
        raise SurgeryError(
            f"The pass '{step.name}' may give weights new values only, and '{name}' was {was} before it and is {is_now} now. Please report it."
        )


def _check_finite(step: RecoverPass, changed: Mapping[str, _Values]) -> None:
    """Refuses weights that are not finite."""
    if wrong := [name for name, values in changed.items() if not values.finite]:
        raise NumericalError(
            f"The pass '{step.name}' gave '{wrong[0]}' values that are not finite. Let it change weights less, or compute in bfloat16 or "
            f"float32 instead of float16."
        )


def _put_in(model: PreTrainedModel, weights: Mapping[str, Tensor], models: Models) -> None:
    """Gives a model the weights that a pass made, which may be there already, and lets them lie where the model's do."""
    on_disk = models.weights is not None
    for name, value in weights.items():
        parameter = model.get_parameter(name)
        if parameter.data_ptr() != value.data_ptr():  # they come from the journal, and are mapped from its files
            parameter.data = value.to(parameter.device, copy=not on_disk)
    models.write_changes(model)

"""The part of a run in which the model is in memory: loaded, measured, changed by passes, saved, loaded again and measured again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from optimum_prune.anatomy.counts import Counts, count_parameters
from optimum_prune.anatomy.decoder import Decoder
from optimum_prune.calibration.calibration import Calibration
from optimum_prune.checkpoint import saving, verification
from optimum_prune.checkpoint.companions import carry
from optimum_prune.checkpoint.loading import Loading
from optimum_prune.checkpoint.verification import Probe, Verification
from optimum_prune.evaluation.perplexity import Perplexity, perplexity
from optimum_prune.machine import processes
from optimum_prune.machine.mapped_weights import MappedWeights
from optimum_prune.machine.memory import give_back
from optimum_prune.passes.base import Pass, Stage
from optimum_prune.passes.outcome import Outcome
from optimum_prune.passes.prune import PrunePass
from optimum_prune.passes.recover import RecoverPass
from optimum_prune.plan.checks import check_given
from optimum_prune.report.report import Change, Report
from optimum_prune.run.fingerprints import check_unchanged
from optimum_prune.run.models import Models
from optimum_prune.run.pruning import prune
from optimum_prune.run.recovering import recover
from optimum_prune.run.run import Run
from optimum_prune.run.zeros import Zeros

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def change_in_memory(run: Run) -> Report:
    """Carries out the passes on the model in memory, saves what they leave, and reports. What it loads is gone afterwards.

    Raises:
        OptimumPruneError: whatever a user can mend, and a saved model that does not compute what the model in memory does.
    """
    models = Models(run.plan.source, run.plan.family, run.folder("weights"), teaches=run.plan.needs_teacher)
    saved = _changed_and_saved(run, models)
    give_back()
    reloaded, verified = _reloaded(run, saved, models.weights)
    give_back()
    after, left = _perplexity(run, reloaded), count_parameters(reloaded)
    report = Report(
        model=run.plan.source.name,
        parameters=Change(saved.counts.total, left.total),
        non_embedding_parameters=Change(saved.counts.non_embedding, left.non_embedding),
        bytes=Change(saved.bytes, saving.bytes_on_disk(run.output.result)),
        perplexity=Change(saved.perplexity, after) if saved.perplexity and after else None,
        passes=saved.outcomes,
        calibration=run.texts.calibration.describe(run.settings.seed),
        processes=processes.size(),
        verified=verified,
        seconds=0.0,
        stock=not hasattr(reloaded.config, "pruned"),
        architecture=getattr(reloaded.config, "base_model_type", reloaded.config.model_type),
    )
    if processes.first():
        run.keep(report)
    return report


@dataclass(frozen=True)
class _Saved:
    """What is known of a model that was loaded, changed and saved, and is gone."""

    counts: Counts
    """As it was loaded, like the next two."""
    bytes: int
    perplexity: Perplexity | None
    outcomes: tuple[Outcome, ...]
    probe: Probe
    """As it was saved, like the rest."""
    dtype: torch.dtype
    device: str


def _changed_and_saved(run: Run, models: Models) -> _Saved:
    """Loads the model, measures it, carries out the passes and saves it."""
    decoder = models.load()
    model = decoder.model
    if run.plan.source.in_memory:
        check_given(decoder.shape(), run.plan.shapes[0], run.plan.source.name)
    counts, size = count_parameters(model), saving.weight_bytes(model)
    calibration = run.calibration()
    measured = calibration.once("perplexity", lambda: _plain(_perplexity(run, model)))
    give_back()
    zeros, outcomes = Zeros(decoder, models), list[Outcome]()
    for step in run.recipe.in_memory:
        outcome = _carried_out(step, decoder, calibration, run, models)
        outcomes.append(zeros.seen(outcome, makes=step.sparsifies))
    models.let_teacher_go()
    models.check()
    check_unchanged(run.plan.source.name, run.model_fingerprint)
    if processes.first():
        saving.save(model, run.plan.source.tokenizer, run.output.result, run.progress, models.weights)
        carry(run.plan.source.companions, run.output.result)
        check_unchanged(run.plan.source.name, run.model_fingerprint)  # what lies on disk was read once more
    processes.wait()
    return _Saved(
        counts,
        size,
        None if measured is None else Perplexity.from_plain(measured),
        tuple(outcomes),
        verification.probe(model, run.texts.calibration.tokens),
        model.dtype,
        "auto" if _is_spread(model) else run.plan.device,
    )


def _carried_out(step: Pass, decoder: Decoder, calibration: Calibration, run: Run, models: Models) -> Outcome:
    """Carries out a pass as its stage says; the class of every pass fits its stage."""
    lesson = run.lesson(step)
    if step.stage is Stage.PRUNE:
        measured = run.texts.evaluation is not None
        return prune(cast(PrunePass, step), decoder, calibration, run.plugins, models, lesson, controlled=measured)
    return recover(cast(RecoverPass, step), decoder, calibration, run.plugins, models, lesson)


def _is_spread(model: PreTrainedModel) -> bool:
    """Whether a model lies on more than one device."""
    return len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1


def _reloaded(run: Run, saved: _Saved, weights: MappedWeights | None) -> tuple[PreTrainedModel, Verification]:
    """The model that was saved, loaded again; and how far it is from what was saved."""
    loading = Loading(saved.dtype, saved.device, run.settings.trust_remote_code, run.progress, weights)
    return verification.verify(run.output.result, saved.probe, loading)


def _perplexity(run: Run, model: PreTrainedModel) -> Perplexity | None:
    """The perplexity of a model in memory, if any is to be measured."""
    return None if run.texts.evaluation is None else perplexity(model, run.texts.evaluation, run.progress)


def _plain(measured: Perplexity | None) -> dict[str, Any] | None:
    return None if measured is None else measured.to_plain()

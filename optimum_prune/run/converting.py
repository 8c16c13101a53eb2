"""The part of a run that goes from folder to folder: each pass carried out on what the one before left, run and judged."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path

from optimum_prune.checkpoint import saving
from optimum_prune.conversion import conversion
from optimum_prune.conversion.conversion import Conversion
from optimum_prune.conversion.elsewhere import convert_remotely
from optimum_prune.conversion.interpreter import interpreter_of
from optimum_prune.errors import PassError, reason
from optimum_prune.evaluation.comparison import ReferenceOutputs, compare
from optimum_prune.evaluation.perplexity import Perplexity
from optimum_prune.evaluation.runtime import Runtime, open_in_transformers
from optimum_prune.hooks.hearing import before_pass, pass_finished
from optimum_prune.machine.isolation import guarded
from optimum_prune.options import as_plain
from optimum_prune.passes.folder import FolderPass, Job
from optimum_prune.passes.outcome import Artefact, Outcome
from optimum_prune.report.report import Change, Report
from optimum_prune.run.fingerprints import files_fingerprint
from optimum_prune.run.run import Run
from optimum_prune.text.windows import Texts

READ_IN = "bfloat16"
"""What a checkpoint that another environment quantized is taken to compute in here."""


def convert_folders(run: Run, report: Report) -> Report:
    """Carries out what is left of the passes from folder to folder; after each, the report so far is kept.

    Args:
        report: of the passes that are done.
    """
    references = References(run.texts, run.plan.device)
    done = len(report.passes) - len(run.recipe.in_memory)
    for position, step in enumerate(run.recipe.conversions):
        if position >= done:
            report = _converted(run, step, references, report)
        references.follow(step)
    return report


def _converted(run: Run, step: FolderPass, references: References, report: Report) -> Report:
    """Carries out a pass and adds it to the report."""
    before_pass(run.plugins, step, None, run.progress)
    outcome, measured = _convert(run, step, references)
    pass_finished(run.plugins, outcome, run.progress)
    report = replace(report, passes=(*report.passes, outcome))
    if step.stage.makes_checkpoint:
        report = replace(report, bytes=Change(report.bytes.before, saving.bytes_on_disk(run.output.result)))
        if report.perplexity is not None and measured is not None:
            report = replace(report, perplexity=Change(report.perplexity.before, measured))
    run.keep(report)
    return report


def _convert(run: Run, step: FolderPass, references: References) -> tuple[Outcome, Perplexity | None]:
    """Carries out a pass; the result becomes what it wrote, or holds that in a folder with its name."""
    source, target, settings = run.output.result, run.output.folder / step.name, run.settings
    target.mkdir()
    job = Job(
        source,
        target,
        run.texts.calibration,
        run.plan.device,
        run.progress,
        seed=settings.seed,
        trust_remote_code=settings.trust_remote_code,
    )
    with run.progress.libraries(datasets=True):
        expected, before = references.of(source, step), files_fingerprint(source)
    made = _made(run, step, job, expected, references)
    if files_fingerprint(source) != before:
        run.unfinished.forget()
        raise PassError(
            f"The pass '{step.name}' changed the checkpoint that it was to read, so nothing can go on from that. Mend the pass: it may write "
            f"into its target only."
        )
    artefact = _artefact(step, made, _not_read_here(run, step, target, expected))
    if step.stage.makes_checkpoint:
        run.output.result = target
    else:
        shutil.rmtree(source / step.name, ignore_errors=True)
        target.rename(source / step.name)
    outcome = Outcome(
        step.name,
        step.stage,
        as_plain(step),
        made.seconds,
        made.peak_memory,
        evidence=(made.evidence,),
        artefact=artefact,
    )
    return outcome, made.perplexity


def _made(run: Run, step: FolderPass, job: Job, expected: ReferenceOutputs, references: References) -> Conversion:
    """What a pass made, here or in the interpreter that it runs in."""
    interpreter, evaluation = interpreter_of(step), references.evaluation
    with run.progress.libraries(datasets=True):
        if interpreter is None:
            return conversion.convert_and_judge(step, job, expected, evaluation)
        room = run.output.folder / f"{step.name}-room"
        room.mkdir()
        return convert_remotely(interpreter, step, job, expected, evaluation, room)


def _not_read_here(run: Run, step: FolderPass, target: Path, expected: ReferenceOutputs) -> str | None:
    """Judges a checkpoint that another environment wrote as this one reads it too; or says why this one does not."""
    if interpreter_of(step) is None or not step.stage.makes_checkpoint:
        return None
    try:
        with run.progress.libraries():
            comparison = compare(open_in_transformers(target, run.plan.device), expected)
    except Exception as error:  # a library that only the other environment has, or one of another version
        return f"{type(error).__name__}: {reason(error)}"
    conversion.judge(step, comparison, READ_IN)
    return None


def _artefact(step: FolderPass, made: Conversion, not_read_here: str | None) -> Artefact:
    """What a pass wrote, for the report."""
    measured = made.perplexity
    return Artefact(
        folder="." if step.stage.makes_checkpoint else step.name,
        bytes=made.bytes,
        tolerance=made.tolerance,
        **asdict(made.comparison),
        perplexity=None if measured is None else measured.value,
        tokens_per_second=None if measured is None else measured.tokens_per_second,
        dtype=None if measured is None else measured.dtype,
        interpreter=interpreter_of(step),
        not_read_here=not_read_here,
        versions=made.versions,
    )


class References:
    """What the checkpoints compute that passes from folder to folder read; kept for the next pass that reads the same.

    Args:
        device: where they are computed.
    """

    def __init__(self, texts: Texts, device: str) -> None:
        self._device = device
        self.evaluation = None if texts.evaluation is None else texts.evaluation.unpadded()
        """Windows to measure perplexity on, if any is to be measured: runtimes take no padding."""
        self._tokens = (self.evaluation or texts.calibration.unpadded() or texts.calibration).tokens
        self._writer: FolderPass | None = None
        self._latest: tuple[Path, str, ReferenceOutputs] | None = None

    def follow(self, step: FolderPass) -> None:
        """Notes who wrote the checkpoint that is read from here on."""
        if step.stage.makes_checkpoint:
            self._writer = step

    def of(self, source: Path, step: FolderPass) -> ReferenceOutputs:
        """What a pass must stay near to: exports in float32, whatever the checkpoint's dtype."""
        dtype = "auto" if step.stage.makes_checkpoint else "float32"
        if self._latest is None or self._latest[:2] != (source, dtype):
            self._latest = source, dtype, ReferenceOutputs.of(self._open(source, dtype), self._tokens)
        return self._latest[2]

    def _open(self, source: Path, dtype: str) -> Runtime:
        if self._writer is not None and not self._writer.missing():
            with guarded(f"The pass '{self._writer.name}'"):
                return self._writer.open(source, self._device)
        return open_in_transformers(source, self._device, dtype)

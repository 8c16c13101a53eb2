"""Carries out a pass from folder to folder, opens what it wrote, runs it, and judges how far that is from what it was made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum_prune.checkpoint.companions import carry, companions_of
from optimum_prune.checkpoint.transformers4 import add_older_fields
from optimum_prune.conversion.interpreter import versions
from optimum_prune.errors import OptimumPruneError, VerificationError, reason
from optimum_prune.evaluation.comparison import WITH_CACHE, Comparison, ReferenceOutputs, compare
from optimum_prune.evaluation.perplexity import Perplexity, perplexity_of_runtime
from optimum_prune.machine.isolation import guarded
from optimum_prune.machine.memory import Meter
from optimum_prune.passes.evidence import plain_evidence

if TYPE_CHECKING:
    from optimum_prune.passes.evidence import Evidence
    from optimum_prune.passes.folder import FolderPass, Job
    from optimum_prune.text.windows import Windows

TOKENIZER = "tokenizer_config.json"
"""What a folder with a tokenizer has, whatever its kind."""
CONFIG = "config.json"


@dataclass(frozen=True)
class Conversion:
    """What a pass from folder to folder did, and how near what it wrote is to what it read."""

    evidence: Evidence
    """What the pass says of it."""
    bytes: int
    """Of everything in the folder."""
    comparison: Comparison
    tolerance: float
    perplexity: Perplexity | None
    seconds: float
    peak_memory: int
    versions: Mapping[str, str]
    """Of Python and the libraries that the pass ran with."""


def convert_and_judge(
    step: FolderPass, job: Job, expected: ReferenceOutputs, evaluation: Windows | None
) -> Conversion:
    """Carries out a pass, opens what it wrote, runs it, compares it and measures it.

    Args:
        expected: what the checkpoint in `job.source` computes.
        evaluation: windows to measure perplexity on; None measures nothing.

    Raises:
        PassError: the libraries behind the pass raise an error.
        VerificationError: what it wrote cannot be run, or is too far from what it was made from.
    """
    with Meter() as meter:
        evidence = convert(step, job)
    with guarded(f"The pass '{step.name}'"):
        try:
            runtime = step.open(job.target, job.device)
            comparison = compare(runtime, expected)
        except OptimumPruneError:
            raise
        except Exception as error:
            raise VerificationError(
                f"What the pass '{step.name}' wrote cannot be run: {type(error).__name__}: {reason(error)}"
            ) from error
        judge(step, comparison, runtime.dtype)
        measured = None if evaluation is None else perplexity_of_runtime(runtime, evaluation, job.progress)
    return Conversion(
        evidence=evidence,
        bytes=folder_bytes(job.target),
        comparison=comparison,
        tolerance=tolerance_of(step),
        perplexity=measured,
        seconds=meter.seconds,
        peak_memory=meter.peak_memory,
        versions=versions(step),
    )


def convert(step: FolderPass, job: Job) -> Evidence:
    """Lets a pass fill the job's folder, completes that, and returns the pass's evidence.

    Raises:
        PassError: the libraries behind the pass raise an error.
    """
    with guarded(f"The pass '{step.name}'"):
        evidence = plain_evidence(step.convert(job), step.name)
        _complete(step, job)
    return evidence


def _complete(step: FolderPass, job: Job) -> None:
    """Puts the tokenizer beside what a pass wrote, where it wrote none; makes a checkpoint, exported ones too, one that transformers 4 reads too, with its companions."""
    if (job.source / TOKENIZER).is_file() and not (job.target / TOKENIZER).is_file():
        job.tokenizer().save_pretrained(job.target)
    if (step.stage.makes_checkpoint or step.exports_checkpoint) and (job.target / CONFIG).is_file():
        names = sorted(entry.name for entry in job.source.iterdir() if entry.is_file())
        carry(companions_of(names, job.source.joinpath, code=True), job.target)
        add_older_fields(job.target)


def tolerance_of(step: FolderPass) -> float:
    """How far the logits of what a pass writes may be from those before it, relative to their spread."""
    return step.usual_tolerance if step.tolerance is None else step.tolerance


def judge(step: FolderPass, comparison: Comparison, dtype: str) -> None:
    """Refuses what a pass wrote if it is too far from what it was made from.

    Args:
        dtype: what its runtime computes in, such as "float32".

    Raises:
        VerificationError: its logits are, or its generation does not follow from them.
    """
    name, tolerance = step.name, tolerance_of(step)
    if not comparison.difference <= tolerance:
        raise VerificationError(
            f"The logits of what the pass '{name}' wrote differ from those before it by {comparison.difference:.3g} of their spread, and "
            f"{tolerance:.3g} is tolerated. Choose a finer setting, or a larger 'tolerance' if that will do."
        )
    if not comparison.with_cache <= WITH_CACHE.get(dtype, max(WITH_CACHE.values())):
        raise VerificationError(
            f"With its cache, what the pass '{name}' wrote generates tokens whose logits, computed without a cache, are smaller than the "
            f"largest by {comparison.with_cache:.3g} of their spread: generation goes wrong. Please report it."
        )


def folder_bytes(folder: Path) -> int:
    """What the files in a folder take, in bytes."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def from_plain(plain: Mapping[str, Any]) -> Conversion:
    """The conversion in plain data, as `asdict` makes it and another interpreter sends it back."""
    perplexity = plain["perplexity"]
    return Conversion(
        **{
            **plain,
            "comparison": Comparison(**plain["comparison"]),
            "perplexity": None if perplexity is None else Perplexity(**perplexity),
        }
    )

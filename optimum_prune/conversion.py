"""Carries out a pass from folder to folder, opens what it wrote, runs it, and judges how far it is from what it was made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum_prune.errors import OptimumPruneError, PassError, VerificationError, reason
from optimum_prune.evaluation import Perplexity, perplexity_of_runtime
from optimum_prune.measure import Meter
from optimum_prune.runtime import WITH_CACHE, Comparison, Expected, compare

if TYPE_CHECKING:
    from optimum_prune.calibration import Calibration
    from optimum_prune.passes import FolderPass, Job


@dataclass(frozen=True)
class Conversion:
    """What a pass from folder to folder wrote."""

    evidence: Mapping[str, Any]
    bytes: int
    """Of everything in the folder."""
    comparison: Comparison
    tolerance: float
    perplexity: Perplexity | None
    seconds: float
    peak_memory: int


def carry_out(step: FolderPass, job: Job, expected: Expected, evaluation: Calibration | None) -> Conversion:
    """Converts, reopens, runs, compares and measures.

    Args:
        expected: what the checkpoint in `job.source` computes.
        evaluation: windows to measure perplexity on; none if not given.

    Raises:
        PassError: the libraries behind the pass raise an error.
        VerificationError: what it wrote cannot be run, or is too far from what it was made from.
    """
    with Meter() as meter:
        try:
            evidence = step.convert(job)
        except OptimumPruneError:
            raise
        except Exception as error:
            raise PassError(f"The pass '{step.name}' failed: {type(error).__name__}: {reason(error)}") from error
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
    return Conversion(
        evidence,
        folder_bytes(job.target),
        comparison,
        tolerance_of(step),
        None if evaluation is None else perplexity_of_runtime(runtime, evaluation, job.progress),
        meter.seconds,
        meter.peak_memory,
    )


def tolerance_of(step: FolderPass) -> float:
    """How far the logits of what a pass writes may be from those before it, relative to their spread."""
    return step.usual_tolerance if step.tolerance is None else step.tolerance


def judge(step: FolderPass, comparison: Comparison, dtype: str) -> None:
    """Refuses what is too far from what it was made from.

    Args:
        dtype: what its runtime computes in.

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
    """A conversion from plain data, as `asdict` makes it, which is what another interpreter sends back."""
    perplexity = plain["perplexity"]
    return Conversion(
        **{
            **plain,
            "comparison": Comparison(**plain["comparison"]),
            "perplexity": None if perplexity is None else Perplexity(**perplexity),
        }
    )

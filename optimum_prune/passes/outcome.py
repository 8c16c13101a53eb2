"""The outcome of a pass: what it decided and why, what it wrote, and what that cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from optimum_prune.passes.base import Stage
from optimum_prune.passes.evidence import Evidence, plain_evidence
from optimum_prune.surgery.cuts import NOTE, Cuts


@dataclass(frozen=True)
class Artefact:
    """What a pass from folder to folder wrote, how far that is from what it was made from, and how well it runs."""

    folder: str
    """Where it is, from the output folder; `.` for the checkpoint itself."""
    bytes: int
    """Of everything in its folder."""
    tolerance: float
    """How large `difference` might have been."""
    difference: float
    """Of logits from those of what it was made from: the standard deviation, relative to that of the latter."""
    with_cache: float
    """By how much logits fall short of the largest, relative to their spread, for the tokens that it generates with its cache."""
    same_tokens: int
    """How many of the tokens that it generates are those of what it was made from, up to the first that is not."""
    generated: int
    """How many tokens were generated."""
    perplexity: float | None
    """In its own runtime; None if none was to be measured, as for the next two."""
    tokens_per_second: float | None
    dtype: str | None
    """What it computes in."""
    interpreter: str | None
    """Which Python made it; None for the one of this run."""
    not_read_here: str | None
    """Why the interpreter of this run cannot read it, if another made it and this one cannot."""
    versions: Mapping[str, str]
    """Of Python and the libraries that made it."""

    def describe(self) -> str:
        """In a line."""
        where = "" if self.folder == "." else f" in {self.folder}/"
        line = (
            f"{self.bytes / 1e6:,.1f} MB{where}, logits differ by {self.difference:.2g} of their spread "
            f"({self.tolerance:.2g} tolerated), {self.same_tokens} of {self.generated} tokens generated alike"
        )
        if self.perplexity is not None:
            line += f", perplexity {self.perplexity:,.2f}"
        if self.not_read_here:
            line += f"; it cannot be read in this environment ({self.not_read_here})"
        return line

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Artefact:
        """The inverse of `asdict`, also where JSON made a figure null that was not finite."""
        read = dict(plain)
        for name in ("difference", "with_cache"):
            read[name] = math.nan if read[name] is None else read[name]
        if read["perplexity"] is None and read["dtype"] is not None:  # it was measured
            read["perplexity"] = math.inf
        return cls(**read)


@dataclass(frozen=True)
class Outcome:
    """What a pass did.

    Raises:
        PassError: its evidence is no plain data.
    """

    name: str
    stage: Stage
    options: Mapping[str, Any]
    seconds: float
    peak_memory: int
    """Peak memory of the process during the pass, in bytes."""
    cuts: Cuts = field(default_factory=Cuts)
    evidence: tuple[Mapping[str, Any], ...] = ()
    """Why it decided so, one entry for each decision: as the pass gave it, or as `Evidence` in a report."""
    artefact: Artefact | None = None
    """Of a pass from folder to folder."""
    controls: Mapping[str, Any] = field(default_factory=dict)
    """Of a pass that prunes, what the same cut comes to as chosen, at random and by magnitude; empty if it was not measured."""

    def __post_init__(self) -> None:
        self.plain_evidence()

    @property
    def notes(self) -> list[str]:
        """What a person is to be told of it."""
        return [str(each[NOTE]) for each in (*self.evidence, self.controls) if NOTE in each]

    def plain_evidence(self) -> tuple[Evidence, ...]:
        """The evidence as a report holds it."""
        return tuple(plain_evidence(each, self.name) for each in self.evidence)

    def to_plain(self) -> dict[str, Any]:
        """Plain data, as in `report.json`; the cuts are not in it, and have a file of their own."""
        return {
            "name": self.name,
            "stage": self.stage.name,
            "options": dict(self.options),
            "seconds": self.seconds,
            "peak_memory": self.peak_memory,
            "decisions": list(self.plain_evidence()),
            **({"controls": dict(self.controls)} if self.controls else {}),
            **({} if self.artefact is None else {"artefact": asdict(self.artefact)}),
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any], cuts: Cuts) -> Outcome:
        """The inverse of `to_plain`."""
        artefact = plain.get("artefact")
        return cls(
            name=plain["name"],
            stage=Stage[plain["stage"]],
            options=plain["options"],
            seconds=plain["seconds"],
            peak_memory=plain["peak_memory"],
            cuts=cuts,
            evidence=tuple(plain["decisions"]),
            artefact=None if artefact is None else Artefact.from_plain(artefact),
            controls=plain.get("controls", {}),
        )

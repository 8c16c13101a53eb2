"""The report of a run: what was done to a model, what that cost, and how large and how good the result is."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from optimum_prune.checkpoint.verification import Verification
from optimum_prune.errors import CheckpointError, printable, reason
from optimum_prune.evaluation.perplexity import Perplexity
from optimum_prune.machine.given_files import named
from optimum_prune.machine.versions import installed_versions
from optimum_prune.passes.evidence import Json
from optimum_prune.passes.outcome import Outcome
from optimum_prune.report.published import is_place, place, scrubbed
from optimum_prune.report.serving import who_serves
from optimum_prune.report.tables import Row, aligned, compared
from optimum_prune.surgery.cuts import Cuts

T = TypeVar("T")

REPORT, CUTS = Path("compression", "report.json"), Path("compression", "cuts.json")
"""In an output folder."""
HEAD = ("", "before", "after", "change")
"""Of the table of figures."""


@dataclass(frozen=True)
class Change(Generic[T]):
    """A figure before and after."""

    before: T
    after: T


SERVED = ("engine", "version", "how")
"""What is said of who can serve a model."""


@dataclass(frozen=True)
class Report:
    """What a run did to a model, and what that cost.

    It can be written and read again: `Report.read(folder)` equals the report of the run that wrote the folder, but for figures in
    the evidence of its passes that are not finite.
    """

    model: str
    parameters: Change[int]
    non_embedding_parameters: Change[int]
    bytes: Change[int]
    """Of the weights, as saved in this dtype."""
    perplexity: Change[Perplexity] | None
    """None if nothing was to be evaluated."""
    passes: tuple[Outcome, ...]
    """Their evidence is made plain data."""
    calibration: Mapping[str, Json]
    """The text that passes chose by: where it is from, and how much of it was drawn."""
    verified: Verification
    seconds: float
    """Wall-clock time of the whole run."""
    processes: int = 1
    """That shared the windows of text among them."""
    stock: bool = True
    """Whether stock transformers reads it; where layers differ in shape, it needs the code beside the weights."""
    architecture: str = ""
    """The model type of the stock architecture; empty in reports of older versions."""
    versions: Mapping[str, str] = field(default_factory=installed_versions)
    """Of Python and of the packages that the result depends on, where the run took place."""

    def __post_init__(self) -> None:
        plain = tuple(replace(outcome, evidence=outcome.plain_evidence()) for outcome in self.passes)
        object.__setattr__(self, "passes", plain)

    # Written and read

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as in `report.json`."""
        return {
            "model": self.model,
            "parameters": asdict(self.parameters),
            "non_embedding_parameters": asdict(self.non_embedding_parameters),
            "bytes": asdict(self.bytes),
            "perplexity": None if self.perplexity is None else _measured(self.perplexity),
            "calibration": dict(self.calibration),
            "passes": [outcome.to_plain() for outcome in self.passes],
            "verified": asdict(self.verified),
            "stock": self.stock,
            "architecture": self.architecture,
            "served_by": [dict(zip(SERVED, each, strict=True)) for each in self.served_by()],
            "seconds": self.seconds,
            "processes": self.processes,
            "versions": dict(self.versions),
        }

    def served_by(self) -> list[tuple[str, str, str]]:
        """Engine, version and how, of each that was run with such models."""
        return list(who_serves(self.architecture, stock=self.stock)) if self.architecture else []

    def cuts(self) -> list[dict[str, Any]]:
        """Plain data, as in `cuts.json`: of each pass, what it kept."""
        return [{"pass": outcome.name, **outcome.cuts.to_json()} for outcome in self.passes]

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any], cuts: Sequence[Mapping[str, Any]] = ()) -> Report:
        """The inverse of `to_dict`, also where JSON made figures null that were not finite.

        Args:
            cuts: what `cuts` returned; nothing is cut if it is not given.
        """
        verified = {name: math.nan if figure is None else figure for name, figure in plain["verified"].items()}
        steps = zip(plain["passes"], cuts or [{}] * len(plain["passes"]), strict=True)
        return cls(
            model=plain["model"],
            parameters=Change(**plain["parameters"]),
            non_embedding_parameters=Change(**plain["non_embedding_parameters"]),
            bytes=Change(**plain["bytes"]),
            perplexity=None if plain["perplexity"] is None else _perplexities(plain["perplexity"]),
            passes=tuple(Outcome.from_plain(step, _cuts(kept)) for step, kept in steps),
            calibration=plain["calibration"],
            verified=Verification(**verified),
            seconds=plain["seconds"],
            processes=plain["processes"],
            stock=plain["stock"],
            architecture=plain.get("architecture", ""),
            versions=plain["versions"],
        )

    def to_json(self) -> str:
        """`to_dict` as JSON; figures that are not finite are null there."""
        return json.dumps(_finite(self.to_dict()), indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, cuts: str = "[]") -> Report:
        """A report from the text of `report.json`, and from that of the `cuts.json` beside it.

        Raises:
            CheckpointError: they are not what a run wrote.
        """
        try:
            return cls.from_dict(json.loads(text), json.loads(cuts))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"This is no report as a run writes it: {type(error).__name__}: {reason(error)} Name an output folder with the {REPORT} and "
                f"the {CUTS.name} that the run left there."
            ) from error

    @classmethod
    def read(cls, folder: str | Path) -> Report:
        """The report in a run's output folder.

        Raises:
            CheckpointError: it is not there, or damaged.
        """
        folder = named(folder, "output folder")
        try:
            text, cuts = ((folder / file).read_text(encoding="utf-8") for file in (REPORT, CUTS))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{folder} has no {REPORT} with the {CUTS.name} that belongs to it. Name a folder as a run left it."
            ) from error
        return cls.from_json(text, cuts)

    def published(self) -> Report:
        """The same report without where on this machine anything lies."""
        model = place(self.model) if is_place(self.model) else self.model
        return Report.from_dict(scrubbed({**self.to_dict(), "model": model}), self.cuts())

    def to_state(self) -> dict[str, Any]:
        """Plain data from which `from_state` makes this report again, for a run that goes on later."""
        return {"report": _finite(self.to_dict()), "cuts": self.cuts()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Report:
        """The inverse of `to_state`."""
        return cls.from_dict(state["report"], state["cuts"])

    # Shown

    def rows(self) -> list[Row]:
        """What a person wants to know: figure, before, after, change."""
        rows = [
            _row("Parameters", self.parameters, "M"),
            _row("... without embeddings", self.non_embedding_parameters, "M"),
            _row("Size on disk", self.bytes, "MB"),
        ]
        if self.perplexity is not None:
            before, after = self.perplexity.before, self.perplexity.after
            rows.append(compared("Perplexity", before.value, after.value, "{:,.2f}".format))
        return rows

    def notes(self) -> list[str]:
        """How the figures came about: a line for each pass, and what was measured and verified."""
        notes = []
        for outcome in self.passes:
            notes.append(f"{outcome.name}: {outcome.seconds:,.1f} s, peak memory {outcome.peak_memory / 1e9:,.2f} GB")
            if outcome.artefact is not None:
                notes[-1] += f"; {outcome.artefact.describe()}"
            notes[-1] += "".join(f"; {note}" for note in outcome.notes)
        if self.perplexity is not None:
            notes.append(f"Perplexity on {self.perplexity.after.describe()}")
        how = "stock transformers" if self.stock else "optimum_prune (its layers differ in shape)"
        notes.append(
            f"Reloaded with {how}: logits differ by {self.verified.max_logit_difference:.2g}, "
            f"with a cache by {self.verified.max_logit_difference_with_cache:.2g}"
        )
        return [*notes, f"{self.seconds:,.1f} s in all"]

    def table(self) -> str:
        """The rows, aligned for a terminal, and the notes."""
        return "\n".join([aligned([HEAD, *self.rows()], right=True), "", *map(printable, self.notes())])


def _row(name: str, change: Change[int], unit: str) -> Row:
    """The row of a count in millions."""
    return compared(name, change.before, change.after, lambda count: f"{count / 1e6:,.1f} {unit}")


def _measured(perplexity: Change[Perplexity]) -> dict[str, Any]:
    """Perplexities as plain data: they have one protocol, unless a pass changed the dtype that is computed in."""
    before, after = perplexity.before, perplexity.after
    return {
        "before": before.value,
        "after": after.value,
        "protocol": after.protocol(),
        **({} if before.protocol() == after.protocol() else {"protocol_before": before.protocol()}),
        "tokens_per_second": {"before": before.tokens_per_second, "after": after.tokens_per_second},
    }


def _perplexities(plain: Mapping[str, Any]) -> Change[Perplexity]:
    """The inverse of `_measured`."""
    protocols = {"before": plain.get("protocol_before", plain["protocol"]), "after": plain["protocol"]}
    speeds = plain["tokens_per_second"]
    return Change(
        *(
            Perplexity.from_plain({"value": plain[when], "tokens_per_second": speeds[when], **protocols[when]})
            for when in ("before", "after")
        )
    )


def _cuts(plain: Mapping[str, Any]) -> Cuts:
    """The cuts of a pass, from its entry in `cuts.json`."""
    return Cuts.from_json({what: kept for what, kept in plain.items() if what != "pass"})


def _finite(plain: Any) -> Any:
    """Plain data with null for figures that are not finite."""
    if isinstance(plain, Mapping):
        return {key: _finite(value) for key, value in plain.items()}
    if isinstance(plain, (list, tuple)):
        return [_finite(value) for value in plain]
    return None if isinstance(plain, float) and not math.isfinite(plain) else plain

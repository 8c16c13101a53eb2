"""A report is what happened, as JSON, as a table in the terminal and as the model card."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Generic, TypeVar

from optimum_prune.checkpoint import Verification
from optimum_prune.cuts import Cuts
from optimum_prune.evaluation import Perplexity
from optimum_prune.passes import Outcome, Stage

T = TypeVar("T")
PACKAGES = ("optimum-prune", "torch", "transformers", "optimum", "accelerate", "datasets", "safetensors")


@dataclass(frozen=True)
class Change(Generic[T]):
    """A figure before and after."""

    before: T
    after: T


@dataclass(frozen=True)
class Report:
    """What a run did to a model, and what that cost."""

    model: str
    parameters: Change[int]
    non_embedding_parameters: Change[int]
    bytes: Change[int]
    """Of the weights, as saved in this dtype."""
    perplexity: Change[Perplexity] | None
    """None if nothing was to be evaluated."""
    passes: Sequence[Outcome]
    calibration: Mapping[str, Any]
    verified: Verification
    seconds: float
    """Wall-clock time of the whole run."""
    processes: int = 1
    """That shared the windows of text among them."""
    stock: bool = True
    """Whether stock transformers reads it; where layers differ in shape, it needs the modelling file beside the weights."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as in `report.json`."""
        plain: dict[str, Any] = {
            "model": self.model,
            "parameters": asdict(self.parameters),
            "non_embedding_parameters": asdict(self.non_embedding_parameters),
            "bytes": asdict(self.bytes),
            "perplexity": None,
            "calibration": dict(self.calibration),
            "passes": [_pass_to_dict(outcome) for outcome in self.passes],
            "verified": asdict(self.verified),
            "stock": self.stock,
            "seconds": self.seconds,
            "processes": self.processes,
            "versions": versions(),
        }
        if self.perplexity is not None:
            plain["perplexity"] = {
                "before": self.perplexity.before.value,
                "after": self.perplexity.after.value,
                "protocol": self.perplexity.after.protocol(),
                "tokens_per_second": {
                    "before": self.perplexity.before.tokens_per_second,
                    "after": self.perplexity.after.tokens_per_second,
                },
            }
        return plain

    def to_state(self) -> dict[str, Any]:
        """Plain data from which `from_state` makes this report again, for a run that goes on later."""
        passes = [
            {
                **vars(outcome),
                "stage": outcome.stage.name,
                "cuts": outcome.cuts.to_json(),
                "evidence": list(outcome.evidence),
            }
            for outcome in self.passes
        ]
        plain: dict[str, Any] = _finite({**asdict(replace(self, passes=())), "passes": passes})
        return plain

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Report:
        """The inverse of `to_state`."""
        passes = tuple(
            Outcome(
                **{
                    **outcome,
                    "stage": Stage[outcome["stage"]],
                    "cuts": Cuts.from_json(outcome["cuts"]),
                    "evidence": tuple(outcome["evidence"]),
                }
            )
            for outcome in state["passes"]
        )
        measured = state["perplexity"]
        return cls(
            **{
                **state,
                **{name: Change(**state[name]) for name in ("parameters", "non_embedding_parameters", "bytes")},
                "perplexity": measured and Change(*(Perplexity(**measured[when]) for when in ("before", "after"))),
                "verified": Verification(**state["verified"]),
                "passes": passes,
            }
        )

    def to_json(self) -> str:
        """`to_dict` as JSON; figures that are not finite are null there."""
        return json.dumps(_finite(self.to_dict()), indent=2, allow_nan=False)

    def rows(self) -> list[tuple[str, str, str, str]]:
        """What a person wants to know: figure, before, after, change."""
        rows = [
            _row("Parameters", self.parameters, lambda n: f"{n / 1e6:,.1f} M"),
            _row("... without embeddings", self.non_embedding_parameters, lambda n: f"{n / 1e6:,.1f} M"),
            _row("Size on disk", self.bytes, lambda n: f"{n / 1e6:,.1f} MB"),
        ]
        if self.perplexity is not None:
            before, after = self.perplexity.before, self.perplexity.after
            rows.append(_row("Perplexity", Change(before.value, after.value), lambda x: f"{x:,.2f}"))
            seconds = Change(10_000 / before.tokens_per_second, 10_000 / after.tokens_per_second)
            rows.append(_row("Seconds for 10,000 tokens", seconds, lambda x: f"{x:,.2f}"))
        return rows

    def table(self) -> str:
        """The rows, aligned for a terminal, and how they came about."""
        return "\n".join([aligned([("", "before", "after", "change"), *self.rows()], right=True), "", *self._notes()])

    def _notes(self) -> list[str]:
        notes = []
        for outcome in self.passes:
            notes.append(f"{outcome.name}: {outcome.seconds:,.1f} s, peak memory {outcome.peak_memory / 1e9:,.2f} GB")
            if outcome.artefact is not None:
                notes[-1] += f"; {_describe_artefact(outcome.artefact)}"
        if self.perplexity is not None:
            notes.append(f"Perplexity on {describe(self.perplexity.after)}")
        how = "stock transformers" if self.stock else "optimum_prune (its layers differ in shape)"
        notes.append(
            f"Reloaded with {how}: logits differ by {self.verified.max_logit_difference:.2g}, "
            f"with a cache by {self.verified.max_logit_difference_with_cache:.2g}"
        )
        return [*notes, f"{self.seconds:,.1f} s in all"]

    def model_card(self, recipe: str) -> str:
        """The README.md of the compressed model."""
        rows = "\n".join(f"| {' | '.join(row)} |" for row in self.rows())
        base = self.model if self.model.count("/") == 1 and not self.model.startswith((".", "/", "~")) else None
        header = ["---", "library_name: transformers", "tags:", "- optimum-prune", "- pruned"]
        header += [f"base_model: {base}"] if base and not base.endswith(".gguf") else []
        notes = "\n".join(f"- {note}" for note in self._notes())
        return "\n".join(
            [
                *header,
                "---",
                "",
                f"# {_short_name(self.model)}, compressed",
                "",
                f"Made from `{_short_name(self.model)}` by optimum-prune. "
                + (
                    "It loads in stock transformers:"
                    if self.stock
                    else "Its layers differ in shape: it loads by the modelling file beside its weights, or after `import optimum_prune`:"
                ),
                "",
                "```python",
                "from transformers import AutoModelForCausalLM, AutoTokenizer",
                "",
                f'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder"{"" if self.stock else ", trust_remote_code=True"})',
                'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
                "```",
                "",
                "|  | before | after | change |",
                "|---|---|---|---|",
                rows,
                "",
                notes,
                "",
                "The recipe:",
                "",
                "```yaml",
                recipe.rstrip(),
                "```",
                "",
                "`compression/report.json` holds every figure, `compression/cuts.json` what was kept.",
                "",
            ]
        )


def describe(perplexity: Perplexity) -> str:
    """The protocol of a perplexity in one line."""
    bos = "with" if perplexity.bos else "without"
    return (
        f"{perplexity.text}: {perplexity.windows} windows of {perplexity.length} tokens, {bos} a beginning-of-sequence token, "
        f"mean over {perplexity.tokens:,} predicted tokens, {perplexity.dtype}"
    )


def versions() -> dict[str, str]:
    """Of Python and of the packages that the result depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a source tree that is not installed
            continue
    return found


def aligned(rows: Sequence[Sequence[str]], right: bool = False) -> str:
    """Rows as columns for a terminal; the columns after the first to the right if they are figures."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    sides = ["<", *(">" if right else "<" for _ in widths[1:])]
    lines = [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True))
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def _describe_artefact(artefact: Mapping[str, Any]) -> str:
    """What a pass from folder to folder wrote, in a line."""
    where = "" if artefact["folder"] == "." else f" in {artefact['folder']}/"
    line = (
        f"{artefact['bytes'] / 1e6:,.1f} MB{where}, logits differ by {artefact['difference']:.2g} of their spread "
        f"({artefact['tolerance']:.2g} tolerated), {artefact['same_tokens']} of {artefact['generated']} tokens generated alike"
    )
    if artefact["perplexity"] is not None:
        line += f", perplexity {artefact['perplexity']:,.2f}, {artefact['tokens_per_second']:,.0f} tokens per second"
    if artefact.get("not_read_here"):
        line += f"; it cannot be read in this environment ({artefact['not_read_here']})"
    return line


def _row(name: str, change: Change[Any], show: Any) -> tuple[str, str, str, str]:
    percent = f"{100 * (change.after / change.before - 1):+.1f} %" if change.before else ""
    return name, show(change.before), show(change.after), percent


def _pass_to_dict(outcome: Outcome) -> dict[str, Any]:
    return {
        "name": outcome.name,
        "stage": outcome.stage.name,
        "options": dict(outcome.options),
        "seconds": outcome.seconds,
        "peak_memory": outcome.peak_memory,
        "decisions": [dict(evidence) for evidence in outcome.evidence],
        **({} if outcome.artefact is None else {"artefact": dict(outcome.artefact)}),
    }


def _finite(plain: Any) -> Any:
    if isinstance(plain, dict):
        return {key: _finite(value) for key, value in plain.items()}
    if isinstance(plain, (list, tuple)):
        return [_finite(value) for value in plain]
    return None if isinstance(plain, float) and not math.isfinite(plain) else plain


def _short_name(model: str) -> str:
    return model.rstrip("/").split("/")[-1]

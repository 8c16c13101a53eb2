"""The folder that a run wrote: its report, recipe and cuts beside the weights, and which pass wrote them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import yaml

from optimum_prune.anatomy.counts import Counts
from optimum_prune.errors import CheckpointError, OptimumPruneError
from optimum_prune.hooks.plugins import Plugins
from optimum_prune.passes.base import Stage
from optimum_prune.passes.folder import FolderPass
from optimum_prune.recipe import Recipe, pass_from
from optimum_prune.report.card import model_card
from optimum_prune.report.report import CUTS, REPORT, Report

RECIPE = Path("compression", "recipe.yaml")
"""In an output folder, as resolved."""


def write_beside(folder: Path, recipe: Recipe, report: Report) -> None:
    """Writes beside the weights what a run did: the report, the cuts, the recipe and the model card."""
    written = {
        CUTS: json.dumps(report.cuts(), indent=2) + "\n",
        RECIPE: recipe.to_yaml(),
        REPORT: report.to_json() + "\n",
        Path("README.md"): model_card(report, recipe.to_yaml()),
    }
    for file, text in written.items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(text, encoding="utf-8")


def writer_of(folder: Path, plugins: Plugins) -> FolderPass | None:
    """The pass that wrote a folder of a run's output: the last quantizer of the output itself, or the exporter of a folder in it.

    It is none where no such pass wrote it, or where that pass is not installed here.
    """
    folder = folder.absolute()
    quantized = [step for step in _passes(folder, plugins) if step.stage is Stage.QUANTIZE]
    exported = [
        step for step in _passes(folder.parent, plugins) if step.stage is Stage.EXPORT and step.name == folder.name
    ]
    found = [*exported, *quantized]
    return found[-1] if found and not found[-1].missing() else None


def counts_of(folder: Path) -> Counts:
    """The parameters of the model in a folder of a run's output, as its report says; packed weights do not show their number.

    Raises:
        CheckpointError: the report is not there, or damaged.
    """
    for output in (folder.absolute(), folder.absolute().parent):
        if (output / REPORT).is_file():
            report = Report.from_json((output / REPORT).read_text(encoding="utf-8"))
            return Counts(report.parameters.after, report.non_embedding_parameters.after)
    raise CheckpointError(f"{folder} has no {REPORT} beside it. Name a folder as a run left it.")


def _passes(output: Path, plugins: Plugins) -> list[FolderPass]:
    """The passes from folder to folder of the recipe in an output folder, as far as they are installed."""
    try:
        recipe = yaml.safe_load((output / RECIPE).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return []
    found: list[FolderPass] = []
    steps: list[Any] = recipe.get("passes", []) if isinstance(recipe, dict) else []
    for plain in steps:
        try:
            step = pass_from(plain, plugins)
        except OptimumPruneError:  # not installed, or of another version
            continue
        if not step.stage.in_memory:
            found.append(cast(FolderPass, step))
    return found

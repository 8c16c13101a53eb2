"""The folder that a run wrote: its report, recipe and cuts beside the weights, and which pass wrote them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from optimum_prune.anatomy.counts import Counts
from optimum_prune.conversion.interpreter import variable_of
from optimum_prune.errors import CheckpointError, OptimumPruneError, printable
from optimum_prune.hooks.plugins import Plugins
from optimum_prune.machine import strict_yaml
from optimum_prune.machine.given_files import beginning, flaw
from optimum_prune.passes.base import Stage
from optimum_prune.passes.folder import FolderPass
from optimum_prune.recipe import Recipe, pass_from
from optimum_prune.report.card import model_card
from optimum_prune.report.published import clean_files, from_here, is_place, place, scrubbed
from optimum_prune.report.report import CUTS, REPORT, Report

RECIPE = Path("compression", "recipe.yaml")
"""In an output folder, as resolved."""


def write_beside(folder: Path, recipe: Recipe, report: Report) -> Report:
    """Writes beside the weights what a run did: the report, the cuts, the recipe and the model card.

    All of it may be published: what lies outside of the current folder is called by its name alone, there and in whatever JSON files the
    folder holds.

    Returns:
        The report as it is written.
    """
    clean_files(folder)
    yaml_text, published = published_recipe(recipe), report.published()
    written = {
        CUTS: json.dumps(report.cuts(), indent=2) + "\n",
        RECIPE: yaml_text,
        REPORT: published.to_json() + "\n",
        Path("README.md"): model_card(published, yaml_text),
    }
    for file, text in written.items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(text, encoding="utf-8")
    return published


def published_recipe(recipe: Recipe) -> str:
    """A recipe as YAML that may be published: in front, in comments, what has to be named to carry it out again."""
    plain = recipe.to_dict()
    named = {"model": plain, "text": plain["calibration"], "dataset": plain["calibration"]}
    flags = [f"--{name} {place(part[name])}" for name, part in named.items() if _publish(part, name)]
    evaluated = plain["evaluation"]
    flags += [f"--eval-text {place(evaluated[name])}" for name in ("text", "dataset") if _publish(evaluated, name)]
    elsewhere = [
        step for step in recipe.conversions if "/" in (step.python or "") and from_here(step.python or "") is None
    ]
    for step, options in zip(recipe.passes, plain["passes"], strict=True):
        if step in elsewhere:
            options[step.name] = {name: value for name, value in options[step.name].items() if name != "python"}
    remarks = []
    if flags:
        remarks.append(
            f"Where the run found these is not told here; to carry this recipe out again, give what they are: {', '.join(flags)}"
        )
    remarks += [
        f"The interpreter of '{step.name}' is not told here; name one in {variable_of(step)}" for step in elsewhere
    ]
    return "".join(f"# {printable(remark)}\n" for remark in remarks) + strict_yaml.dump(scrubbed(plain))


def _publish(part: dict[str, Any], name: str) -> bool:
    """Lets a part of a recipe name a file or a folder as it may be published, in place; whether that is its name alone."""
    given = part.get(name)
    if given is None or not is_place(given):
        return False
    part[name] = place(given)
    return from_here(given) is None


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
            report = Report.from_json((output / REPORT).read_text(encoding="utf-8", errors="replace"))
            return Counts(report.parameters.after, report.non_embedding_parameters.after)
    raise CheckpointError(f"{folder} has no {REPORT} beside it. Name a folder as a run left it.")


def _passes(output: Path, plugins: Plugins) -> list[FolderPass]:
    """The passes from folder to folder of the recipe in an output folder, as far as they are installed."""
    file = output / RECIPE
    try:
        recipe = None if flaw(file) else strict_yaml.load(beginning(file, strict_yaml.LONGEST + 1))
    except (OSError, strict_yaml.StrictYamlError):  # of somebody else's making
        return []
    found: list[FolderPass] = []
    steps = recipe.get("passes") if isinstance(recipe, dict) else None
    for plain in steps if isinstance(steps, list) else ():
        try:
            step = pass_from(plain, plugins)
        except OptimumPruneError:  # not installed, or of another version
            continue
        if not step.stage.in_memory:
            found.append(cast(FolderPass, step))
    return found

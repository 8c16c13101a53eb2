"""Several models by one command, each in a folder of its own."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from optimum_prune.errors import OutputError
from optimum_prune.hooks.plugins import load as load_plugins
from optimum_prune.machine.progress import Progress
from optimum_prune.plan.plan import make_plan
from optimum_prune.plan.source import open_source
from optimum_prune.recipe import Recipe
from optimum_prune.report.report import Report
from optimum_prune.report.tables import aligned
from optimum_prune.report.written import RECIPE, published_recipe
from optimum_prune.run.compress import compress


def compress_each(
    recipes: Mapping[str, Recipe], output: Path, *, overwrite: bool, resume: bool, progress: Progress
) -> dict[str, Report]:
    """Carries out recipes that differ in their passes only, one after the other.

    Args:
        recipes: by the name of the folder within the output folder.
        overwrite: replace such folders that exist.
        resume: go on behind those that are there, and with the one that ended early.

    Raises:
        OptimumPruneError: as `compress`; of whichever recipe, before the first is carried out if it can be known then.
    """
    _check(output, overwrite=overwrite, resume=resume)
    plugins = load_plugins()
    source = open_source(next(iter(recipes.values())).settings, progress, families=plugins.families)
    plans = {name: make_plan(recipe, plugins, source) for name, recipe in recipes.items()}
    new = not output.exists()
    output.mkdir(parents=True, exist_ok=True)
    reports = {}
    try:
        for name, plan in plans.items():
            folder = output / name
            if resume and _is_result_of(plan.resolved, folder):
                progress.say(f"{folder} is there already.")
                reports[name] = Report.read(folder)
                continue
            reports[name] = compress(
                plan.recipe,
                folder,
                source=source,
                overwrite=overwrite,
                resume=resume,
                progress=progress,
            )
    finally:
        if new:
            with suppress(OSError):  # something is in it
                output.rmdir()
    return reports


def _check(output: Path, *, overwrite: bool, resume: bool) -> None:
    """Refuses a folder that is there and was not meant.

    Raises:
        OutputError: it holds something else.
    """
    if (output / "config.json").exists() or (output.exists() and not output.is_dir()):
        raise OutputError(
            f"The output {output} is to hold a folder for each model, and is something else. Name another."
        )
    if output.exists() and any(output.iterdir()) and not (overwrite or resume):
        raise OutputError(
            f"The output {output} exists already. Name another --output, go on there with --resume, or replace what is in it with --overwrite."
        )


def _is_result_of(recipe: Recipe, folder: Path) -> bool:
    """Whether a folder was written by a recipe."""
    try:
        return (folder / RECIPE).read_text(encoding="utf-8") == published_recipe(recipe)
    except (OSError, ValueError):
        return False


def table_of(reports: Mapping[str, Report]) -> str:
    """What became of each, in a line."""
    first = next(iter(reports.values()))
    rows = [("", "parameters", "size on disk", "perplexity"), _row("before", first, after=False)]
    rows += [_row(name, report, after=True) for name, report in reports.items()]
    return aligned(rows, right=True)


def _row(name: str, report: Report, *, after: bool) -> tuple[str, str, str, str]:
    side = "after" if after else "before"
    parameters, size = getattr(report.parameters, side), getattr(report.bytes, side)
    measured = "" if report.perplexity is None else f"{getattr(report.perplexity, side).value:,.2f}"
    return name, f"{parameters / 1e6:,.1f} M", f"{size / 1e6:,.1f} MB", measured

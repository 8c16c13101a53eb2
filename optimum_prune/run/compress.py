"""Compression: a recipe planned, then its plan carried out, to a checkpoint that was reloaded, measured and reported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from optimum_prune.checkpoint.opening import length_limit
from optimum_prune.checkpoint.quiet import in_float32
from optimum_prune.conversion.interpreter import check_environment
from optimum_prune.errors import OutputError, RecipeError, reason, shown
from optimum_prune.hooks.plugins import Plugins
from optimum_prune.hooks.plugins import load as load_plugins
from optimum_prune.machine import given_files, interrupts, processes
from optimum_prune.machine.given_files import named
from optimum_prune.machine.memory import Meter, give_back, passing_over_what_is_there
from optimum_prune.machine.progress import Progress
from optimum_prune.plan.checks import check_disk, check_launch, check_texts
from optimum_prune.plan.plan import Plan, make_plan
from optimum_prune.plan.planner import room
from optimum_prune.plan.source import ModelSource, open_source
from optimum_prune.recipe import Recipe
from optimum_prune.report.report import Report
from optimum_prune.report.written import write_beside
from optimum_prune.run.converting import convert_folders
from optimum_prune.run.fingerprints import identity
from optimum_prune.run.finished import note_finished, remove_finished
from optimum_prune.run.in_memory import change_in_memory
from optimum_prune.run.known import unfinished_folder
from optimum_prune.run.output import HiddenOutput, check_output, hidden_output, mend, move_beside
from optimum_prune.run.ownership import check_unfinished
from optimum_prune.run.run import Run
from optimum_prune.run.unfinished import Unfinished
from optimum_prune.text.domains import Chosen, TrainingReader, apart
from optimum_prune.text.drawing import Reader, draw
from optimum_prune.text.text import Text, texts_to_use
from optimum_prune.text.windows import Texts


def compress(
    recipe: Recipe,
    output: str | Path,
    *,
    source: ModelSource | None = None,
    texts: Texts | None = None,
    overwrite: bool = False,
    resume: bool = False,
    hooks: Iterable[object] = (),
    progress: Progress | None = None,
) -> Report:
    """Carries out a recipe and writes the compressed model, its report and its recipe to a folder.

    Args:
        recipe: what to do.
        output: the folder; written elsewhere and moved into place when everything is done.
        source: the model, instead of the one that the recipe's settings name.
        texts: token windows, instead of those that the recipe describes.
        overwrite: replace an output folder that exists.
        resume: refuse to begin anew where a run that ended early is of another model, text or passes; one of the same goes on in any case.
        hooks: objects with `before_pass` or `pass_finished` marked `@hookimpl`, such as a tracker.
        progress: where to show progress; nowhere if not given.

    Raises:
        OptimumPruneError: whatever a user can mend; then there is no output folder. What was finished by then is kept beside it if
            the same run, or its later passes mended, can go on from there; the message says where.
    """
    output = _named_output(output, {Recipe: recipe}, {ModelSource: source, Texts: texts, Progress: progress})
    progress = progress if progress is not None and processes.first() else Progress()
    plugins = load_plugins(hooks)
    _check(recipe, output, overwrite)
    source = source or open_source(recipe.settings, progress, families=plugins.families)
    inputs = (*recipe.inputs, *([] if source.source is None else [Path(source.source)]))
    with in_float32(), Meter() as meter, hidden_output(output, overwrite, inputs) as hidden:
        plan = make_plan(recipe, plugins, source, texts)
        texts = processes.broadcast_from_first(lambda: _texts(plan, plugins, progress, texts))
        _say_what_was_left(hidden, output, progress)
        unfinished = Unfinished(output, identity(plan, texts))
        hidden.when_done = unfinished.remove
        run = Run(plan, texts, plugins, hidden, unfinished, progress, meter)
        report = _carried_out(run, resume)
        if processes.first():
            report = _write_report(run, report, output)
            note_finished(unfinished.folder, hidden.result)
    return processes.broadcast_from_first(lambda: report)


def _named_output(output: object, needed: Mapping[type, object], other: Mapping[type, object]) -> Path:
    """The output folder that is given, when all that is given with it is of its class.

    Args:
        other: may be None.

    Raises:
        RecipeError: something is of another class.
    """
    for kind, given in (*needed.items(), *((kind, given) for kind, given in other.items() if given is not None)):
        if not isinstance(given, kind):
            raise RecipeError(f"{shown(given)} is given where a {kind.__name__} should be. Give one.")
    return named(output, "output")


def _check(recipe: Recipe, output: Path, overwrite: bool) -> None:
    """Refuses what cannot be done, before anything is opened.

    Raises:
        OutputError: the output must not be written.
        RecipeError: the interpreter of a pass cannot be used, or processes would share out a model that is to be trained.
    """
    try:
        check_output(output, overwrite, recipe.inputs)
    except OutputError:
        if processes.first():
            mend(output, lambda: remove_finished(output))
        raise
    check_unfinished(unfinished_folder(output))
    for step in recipe.passes:
        check_environment(step)
        for name in step.keeps_in:
            kept = given_files.path_of(name).resolve()
            if output.resolve() in (kept, *kept.parents):
                raise RecipeError(
                    f"{step.name} is to keep something in {name}, which lies in the output {output}, where nothing may be yet. Name another folder."
                )
    check_launch(recipe)


def _say_what_was_left(hidden: HiddenOutput, output: Path, progress: Progress) -> None:
    """Says what runs that were killed had left beside the output and is removed."""
    for name in hidden.left:
        progress.say(f"Removed {name}, which a run on another host, that was killed, had left beside the output.")
    if processes.first() and remove_finished(output):
        progress.say(
            f"Removed {unfinished_folder(output)}, which a run that finished {output} and was killed then had left."
        )


def _write_report(run: Run, report: Report, output: Path) -> Report:
    """Writes what a run did beside the weights, and returns it as it is written.

    Raises:
        OutputError: that cannot be done; the model is kept.
    """
    try:
        with interrupts.finishing():
            return write_beside(run.output.result, run.plan.resolved, report)
    except Exception as error:  # whatever it is, the model must not be lost for it
        where = move_beside(run.output.result, output)
        run.unfinished.remove()
        raise OutputError(
            f"The report of this run cannot be written: {reason(error)} The model is whole without it, and lies in {where}."
        ) from error


def _texts(plan: Plan, plugins: Plugins, progress: Progress, given: Texts | None) -> Texts:
    """The token windows that are given, and those of the texts that a recipe names."""
    recipe, source = plan.recipe, plan.source
    taught = recipe.training.texts if recipe.trains and not (given and given.training) else ()
    if given is not None and not any(text.named for text in taught):
        return replace(given, training=(apart("the training text", given.calibration),)) if taught else given
    if source.tokenizer is None:
        raise RecipeError(
            f"{source.name} has no tokenizer to read a text with. Give the windows of tokens themselves."
        )
    reader = Reader(source.tokenizer, plugins.sources, length_limit(plan.config))
    chosen = () if given is not None else texts_to_use(recipe.calibration, recipe.evaluation)
    with progress.libraries(datasets=any(text.named and text.file is None for text in (*chosen, *taught))):
        if given is None:
            drawn = draw(recipe.calibration, recipe.evaluation, reader, recipe.settings.seed)
            texts = Texts(drawn.calibration, drawn.evaluation)
            by = Chosen(drawn.text, drawn.tokens, drawn.calibration.length, drawn.conversations)
        else:
            texts, by = given, Chosen(Text(), torch.zeros(0, dtype=torch.long), given.calibration.length)
        if not taught:
            return texts
        return replace(texts, training=TrainingReader(reader, by, recipe.tokens_wanted()).domains(recipe.training))


@passing_over_what_is_there()
def _carried_out(run: Run, resume: bool) -> Report:
    """The report of all passes, those included that an earlier run finished."""
    give_back()  # tokenizing takes much more than tokens do
    check_texts(run.texts, run.plan.config)
    check_disk(run.output.folder, room(run.plan))
    report = processes.broadcast_from_first(lambda: run.found(resume))
    with run.unfinished.errors_say_what_is_kept():
        report = report or change_in_memory(run)
        if processes.first():
            with processes.alone():
                report = convert_folders(run, report)
    return replace(report, seconds=report.seconds + run.meter.seconds)

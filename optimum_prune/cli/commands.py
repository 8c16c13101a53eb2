"""The commands: what each does with what was parsed of its command line."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from optimum_prune.anatomy.counts import Counts, count_parameters
from optimum_prune.checkpoint import saving
from optimum_prune.checkpoint.opening import length_limit
from optimum_prune.cli.flags import CALIBRATION, SETTINGS, each_by_itself, given, overridden, texts_given
from optimum_prune.conversion.conversion import folder_bytes
from optimum_prune.conversion.interpreter import check_environment, not_looked_at
from optimum_prune.errors import RecipeError, printable, reason
from optimum_prune.evaluation.perplexity import Perplexity, perplexity, perplexity_of_runtime
from optimum_prune.hooks.plugins import Plugins
from optimum_prune.machine import processes
from optimum_prune.machine.given_files import path_of
from optimum_prune.machine.isolation import guarded
from optimum_prune.machine.mapped_weights import MappedWeights
from optimum_prune.machine.memory import free_memory
from optimum_prune.machine.progress import Progress
from optimum_prune.machine.streams import NotPrintedError, say
from optimum_prune.options import build
from optimum_prune.passes.folder import FolderPass
from optimum_prune.plan.forecast import forecast
from optimum_prune.plan.source import ModelSource, device_of, open_source
from optimum_prune.recipe import Recipe, Settings
from optimum_prune.report.tables import aligned
from optimum_prune.report.written import counts_of, writer_of
from optimum_prune.run.compress import compress
from optimum_prune.run.several import compress_each, table_of
from optimum_prune.text.drawing import Reader, evaluation_windows
from optimum_prune.text.text import Text
from optimum_prune.text.windows import Windows


def one_pass(arguments: argparse.Namespace, plugins: Plugins) -> None:
    """`prune METHOD`, `compress quantize METHOD`, `compress export METHOD`: a recipe of one pass, or several of one pass each."""
    step = arguments.pass_class
    recipes = {
        name: overridden(Recipe(passes=(build(step, each, f"pass '{step.name}'"),)), arguments)
        for name, each in each_by_itself(step, given(arguments, arguments.flags), arguments.output).items()
    }
    if len(recipes) == 1:
        _compress(next(iter(recipes.values())), arguments)
    else:
        _compress_each(recipes, arguments)


def run(arguments: argparse.Namespace, plugins: Plugins) -> None:
    """`compress run`."""
    recipe = Recipe.from_yaml(
        arguments.recipe,
        plugins,
        trust_remote_code=_decides_trust(arguments),
        allow_interpreters=arguments.allow_interpreters,
        texts=texts_given(arguments),
    )
    for step in recipe.passes:
        check_environment(step)
    _compress(overridden(recipe, arguments), arguments)


def _decides_trust(arguments: argparse.Namespace) -> bool:
    """Whether the command line says, either way, if code that comes with a checkpoint may run: a recipe cannot say so by itself."""
    return hasattr(arguments, "trust_remote_code")


def _compress(recipe: Recipe, arguments: argparse.Namespace) -> None:
    progress = Progress.for_terminal(arguments.quiet)
    report = compress(
        recipe,
        arguments.output,
        overwrite=arguments.overwrite,
        resume=arguments.resume,
        progress=progress,
    )
    _say_saved(report.table, arguments)


def _say_saved(table: Callable[[], str], arguments: argparse.Namespace) -> None:
    """Says what became of a run that is finished, and where."""
    if arguments.quiet or not processes.first():
        return
    saved = f"Saved to {printable(arguments.output)}"
    try:
        say(arguments.out, f"{table()}\n{saved}")
    except NotPrintedError as error:  # the run is finished, and its report lies there
        if not error.nobody_reads:
            print(f"{saved}. {error}", file=sys.stderr)


def _compress_each(recipes: Mapping[str, Recipe], arguments: argparse.Namespace) -> None:
    reports = compress_each(
        recipes,
        path_of(arguments.output),
        overwrite=arguments.overwrite,
        resume=arguments.resume,
        progress=Progress.for_terminal(arguments.quiet),
    )
    _say_saved(partial(table_of, reports), arguments)


def plan(arguments: argparse.Namespace, plugins: Plugins) -> None:
    """`compress plan`."""
    decides = _decides_trust(arguments)
    texts = texts_given(arguments)
    recipe = Recipe.from_yaml(
        arguments.recipe, plugins, trust_remote_code=decides, allow_interpreters=True, texts=texts
    )
    recipe = overridden(recipe, arguments)
    found = forecast(recipe, plugins)
    if arguments.json:
        say(arguments.out, found.to_json())
    elif not arguments.quiet:
        remarks = found.remarks(free_memory(), shutil.disk_usage(".").free)
        say(arguments.out, "\n".join([aligned(found.rows(), right=True), *remarks]))
    for sentence in map(not_looked_at, recipe.passes):
        if sentence and not arguments.quiet:
            print(sentence, file=sys.stderr)


def evaluate(arguments: argparse.Namespace, plugins: Plugins) -> None:
    """`compress evaluate`."""
    progress = Progress.for_terminal(arguments.quiet)
    settings = build(Settings, given(arguments, {name: name for name in SETTINGS}), "the command line")
    text = build(Text, given(arguments, {name: name for name in CALIBRATION.values()}), "the command line")
    exported = settings.model is not None and _writer(settings.model, plugins) is not None
    source = open_source(settings, progress, quantized=True, weights_needed=not exported)
    if text.samples == 0:
        raise RecipeError("0 windows are asked for, so there is nothing to evaluate. Ask for at least 1.")
    windows = _evaluation_windows(text, source, plugins, progress)
    measured, counts, size = _measured(source, windows, device_of(settings), plugins, progress)
    if not processes.first():
        return
    if arguments.json:
        result = {
            "model": source.name,
            "perplexity": measured.value,
            "protocol": measured.protocol(),
            "tokens_per_second": measured.tokens_per_second,
            "parameters": counts.total,
            "non_embedding_parameters": counts.non_embedding,
            "bytes": size,
            "device": device_of(settings),
        }
        say(arguments.out, json.dumps(result, indent=2))
    elif not arguments.quiet:
        say(
            arguments.out,
            f"Perplexity {measured.value:,.3f} on {measured.describe()}\n"
            f"{counts.total / 1e6:,.1f} M parameters, {counts.non_embedding / 1e6:,.1f} M without embeddings; "
            f"{measured.tokens_per_second:,.0f} tokens per second",
        )


def _evaluation_windows(text: Text, source: ModelSource, plugins: Plugins, progress: Progress) -> Windows:
    """The windows of a text that a model is evaluated on."""
    tokenizer = source.tokenizer
    assert tokenizer is not None  # of a model that was opened by its name
    with progress.libraries(datasets=text.text is None):
        reader = Reader(tokenizer, plugins.sources, length_limit(source.config.get_text_config()))
        return processes.broadcast_from_first(lambda: evaluation_windows(text, reader))


def _writer(model: str, plugins: Plugins) -> FolderPass | None:
    """The pass that wrote what a model's name means, if it is a folder that one wrote."""
    folder = path_of(model)
    return writer_of(folder, plugins) if folder.is_dir() else None


def _measured(
    source: ModelSource, windows: Windows, device: str, plugins: Plugins, progress: Progress
) -> tuple[Perplexity, Counts, int]:
    """The perplexity of a model in its own runtime, its parameters, and the bytes of its weights."""
    folder, writer = path_of(source.name), _writer(source.name, plugins)
    if writer is not None:
        with guarded(f"The pass '{writer.name}'"):
            measured = perplexity_of_runtime(writer.open(folder, device), windows, progress)
        return measured, counts_of(folder), folder_bytes(folder)
    with TemporaryDirectory() as aside:
        model = source.load(MappedWeights(Path(aside)) if source.offloads else None)
        measured = perplexity(model, windows, progress)
    return measured, count_parameters(model), saving.stored_bytes(source.name, model)


def passes(arguments: argparse.Namespace, plugins: Plugins) -> None:
    """`compress passes`."""
    rows = [("pass", "stage", "provider", "missing", "what it does")]
    for name, step in sorted(plugins.passes.items(), key=lambda item: (item[1].stage, item[0])):
        provider = plugins.providers[name]
        try:
            missing = ", ".join(step.missing())
        except Exception as error:  # a plugin that does not say as it should what it needs
            missing = f"cannot be told ({type(error).__name__}: {reason(error)})"
        rows.append((name, step.stage.name, f"{provider.distribution} {provider.version}", missing, step.summary()))
    say(arguments.out, aligned([[printable(cell) for cell in row] for row in rows]))


def families(arguments: argparse.Namespace, plugins: Plugins) -> None:
    """`compress families`."""
    rows = [("family", "model_type"), *((family.name, ", ".join(family.model_types)) for family in plugins.families)]
    say(arguments.out, aligned([[printable(cell) for cell in row] for row in rows]))

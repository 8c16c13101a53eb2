"""The commands: what each does with what was parsed of its command line."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from optimum_prune.anatomy.counts import Counts, count_parameters
from optimum_prune.checkpoint import saving
from optimum_prune.checkpoint.opening import length_limit
from optimum_prune.cli.flags import CALIBRATION, SETTINGS, given, overridden
from optimum_prune.conversion.conversion import folder_bytes
from optimum_prune.errors import RecipeError
from optimum_prune.evaluation.perplexity import Perplexity, perplexity, perplexity_of_runtime
from optimum_prune.hooks.plugins import Plugins
from optimum_prune.machine import processes
from optimum_prune.machine.mapped_weights import MappedWeights
from optimum_prune.machine.memory import free_memory
from optimum_prune.machine.progress import Progress
from optimum_prune.options import build, options_of
from optimum_prune.plan.forecast import forecast
from optimum_prune.plan.source import ModelSource, device_of, open_source
from optimum_prune.recipe import Recipe, Settings
from optimum_prune.report.tables import aligned
from optimum_prune.report.written import counts_of, writer_of
from optimum_prune.run.compress import compress
from optimum_prune.text.drawing import Reader, evaluation_windows
from optimum_prune.text.text import Text
from optimum_prune.text.windows import Windows


def prune(arguments: argparse.Namespace, plugins: Plugins) -> None:
    """`prune METHOD`: a recipe of one pass."""
    step = arguments.pass_class
    options = given(arguments, {name: name for name in options_of(step)})
    _compress(Recipe(passes=(build(step, options, f"pass '{step.name}'"),)), arguments)


def run(arguments: argparse.Namespace, plugins: Plugins) -> None:
    """`compress run`."""
    _compress(Recipe.from_yaml(arguments.recipe, plugins), arguments)


def _compress(recipe: Recipe, arguments: argparse.Namespace) -> None:
    progress = Progress.for_terminal(arguments.quiet)
    report = compress(
        overridden(recipe, arguments),
        arguments.output,
        overwrite=arguments.overwrite,
        resume=arguments.resume,
        progress=progress,
    )
    if not arguments.quiet and processes.first():
        print(report.table())
        print(f"Saved to {arguments.output}")


def plan(arguments: argparse.Namespace, plugins: Plugins) -> None:
    """`compress plan`."""
    recipe = overridden(Recipe.from_yaml(arguments.recipe, plugins), arguments)
    found = forecast(recipe, plugins)
    if arguments.json:
        print(found.to_json())
    elif not arguments.quiet:
        print(aligned(found.rows(), right=True))
        print("\n".join(found.remarks(free_memory(), shutil.disk_usage(Path.cwd()).free)))


def evaluate(arguments: argparse.Namespace, plugins: Plugins) -> None:
    """`compress evaluate`."""
    progress = Progress.for_terminal(arguments.quiet)
    settings = build(Settings, given(arguments, {name: name for name in SETTINGS}), "the command line")
    text = build(Text, given(arguments, {name: name for name in CALIBRATION.values()}), "the command line")
    source = open_source(settings, progress, quantized=True)
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
        print(json.dumps(result, indent=2))
    elif not arguments.quiet:
        print(f"Perplexity {measured.value:,.3f} on {measured.describe()}")
        print(
            f"{counts.total / 1e6:,.1f} M parameters, {counts.non_embedding / 1e6:,.1f} M without embeddings; "
            f"{measured.tokens_per_second:,.0f} tokens per second"
        )


def _evaluation_windows(text: Text, source: ModelSource, plugins: Plugins, progress: Progress) -> Windows:
    """The windows of a text that a model is evaluated on."""
    tokenizer = source.tokenizer
    assert tokenizer is not None  # of a model that was opened by its name
    with progress.libraries(datasets=text.text is None):
        reader = Reader(tokenizer, plugins.sources, length_limit(source.config.get_text_config()))
        return processes.broadcast_from_first(lambda: evaluation_windows(text, reader))


def _measured(
    source: ModelSource, windows: Windows, device: str, plugins: Plugins, progress: Progress
) -> tuple[Perplexity, Counts, int]:
    """The perplexity of a model in its own runtime, its parameters, and the bytes of its weights."""
    folder = Path(source.name).expanduser()
    writer = writer_of(folder, plugins) if folder.is_dir() else None
    if writer is not None:
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
        rows.append(
            (
                name,
                step.stage.name,
                f"{provider.distribution} {provider.version}",
                ", ".join(step.missing()),
                step.summary(),
            )
        )
    print(aligned(rows))


def families(arguments: argparse.Namespace, plugins: Plugins) -> None:
    """`compress families`."""
    rows = [("family", "model_type"), *((family.name, ", ".join(family.model_types)) for family in plugins.families)]
    print(aligned(rows))

"""What each command does."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from optimum_prune import checkpoint, distributed
from optimum_prune.anatomy import parameters
from optimum_prune.artefact import counts_of, writer_of
from optimum_prune.calibration import Text, evaluation_windows
from optimum_prune.cli.flags import CALIBRATION, SETTINGS, given, overridden
from optimum_prune.compress import compress
from optimum_prune.conversion import folder_bytes
from optimum_prune.errors import RecipeError
from optimum_prune.evaluation import perplexity, perplexity_of_runtime
from optimum_prune.forecast import forecast, free_memory
from optimum_prune.offload import Store
from optimum_prune.options import build, options_of
from optimum_prune.plugins import Plugins
from optimum_prune.progress import Progress
from optimum_prune.recipe import Recipe, Settings
from optimum_prune.report import aligned, describe
from optimum_prune.subject import device_of, length_limit, open_subject


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
    if not arguments.quiet and distributed.first():
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
    subject = open_subject(settings, progress, quantized=True)
    if text.samples == 0:
        raise RecipeError("0 windows are asked for, so there is nothing to evaluate. Ask for at least 1.")
    assert subject.tokenizer is not None
    with progress.libraries(datasets=text.text is None):
        limit = length_limit(subject.config.get_text_config())
        tokenizer = subject.tokenizer
        windows = distributed.by_first(lambda: evaluation_windows(text, tokenizer, plugins.sources, limit))
    folder = Path(subject.name).expanduser()
    writer = writer_of(folder, plugins) if folder.is_dir() else None
    if writer is not None:
        measured = perplexity_of_runtime(writer.open(folder, device_of(settings)), windows, progress)
        count, size = counts_of(folder), folder_bytes(folder)
    else:
        with TemporaryDirectory() as aside:
            model = subject.load(Store(Path(aside)) if subject.offloads else None)
            measured = perplexity(model, windows, progress)
        count, size = parameters(model), checkpoint.stored_bytes(subject.name, model)
    if not distributed.first():
        return
    if arguments.json:
        result = {
            "model": subject.name,
            "perplexity": measured.value,
            "protocol": measured.protocol(),
            "tokens_per_second": measured.tokens_per_second,
            "parameters": count["total"],
            "non_embedding_parameters": count["non_embedding"],
            "bytes": size,
            "device": device_of(settings),
        }
        json.dump(result, sys.stdout, indent=2)
        print()
    elif not arguments.quiet:
        print(f"Perplexity {measured.value:,.3f} on {describe(measured)}")
        print(
            f"{count['total'] / 1e6:,.1f} M parameters, {count['non_embedding'] / 1e6:,.1f} M without embeddings; "
            f"{measured.tokens_per_second:,.0f} tokens per second"
        )


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

"""The flags that commands have in common, from the same dataclasses as the keys of a recipe."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

from optimum_prune.cli.arguments import add_flag
from optimum_prune.errors import RecipeError
from optimum_prune.machine.given_files import path_of
from optimum_prune.options import as_plain, build, options_of
from optimum_prune.passes.base import Pass
from optimum_prune.recipe import Recipe, Settings
from optimum_prune.text.text import Text
from optimum_prune.text.training import Training

CALIBRATION = {"text": "text", "dataset": "dataset", "samples": "samples", "length": "length"}
EVALUATION = {"eval_text": "text", "eval_samples": "samples", "eval_length": "length"}
TRAINING = {"train_text": "text", "train_dataset": "dataset"}
EVALUATION_HELP = {
    "text": "Text to report perplexity on; if not given, windows from the end of the calibration text.",
    "samples": "How many windows to report on; 0 measures nothing.",
    "length": "Tokens of a window to report on; as for calibration if not given.",
}
TRAINING_HELP = {
    "text": "A text file, or a folder of such, for passes that train; the calibration text if not given.",
    "dataset": "The same as a dataset of the Hub, as NAME[:CONFIG[:SPLIT]].",
}
SETTINGS = [field.name for field in dataclasses.fields(Settings)]


def add_output(parser: argparse.ArgumentParser) -> None:
    """`--output`, `--overwrite` and `--resume`."""
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output",
        required=True,
        type=_folder,
        metavar="FOLDER",
        help="Folder for the compressed model and its report.",
    )
    group.add_argument("--overwrite", action="store_true", help="Replace the output folder if it exists.")
    group.add_argument(
        "--resume",
        action="store_true",
        help="Go on where a run that ended early stopped, and refuse to begin anew if its model, text or passes were others. (Without it, such a "
        "run is replaced.)",
    )


def add_common(parser: argparse.ArgumentParser, model_required: bool = False) -> None:
    """The model, the texts, and how to compute; `--quiet`."""
    group = parser.add_argument_group("model and computation")
    for name, option in options_of(Settings).items():
        add_flag(dataclasses.replace(option, required=model_required and name == "model"), group)
    texts = parser.add_argument_group("texts")
    text_options = options_of(Text)
    for flag, name in CALIBRATION.items():
        add_flag(dataclasses.replace(text_options[name], name=flag), texts)
    for flag, name in EVALUATION.items():
        add_flag(dataclasses.replace(text_options[name], name=flag, help=EVALUATION_HELP[name]), texts)
    for flag, name in TRAINING.items():
        add_flag(dataclasses.replace(text_options[name], name=flag, help=TRAINING_HELP[name]), texts)
    _add_quiet(parser)


def add_evaluation(parser: argparse.ArgumentParser) -> None:
    """The text and how to compute, for `evaluate`; what names the evaluation text elsewhere is understood too."""
    group = parser.add_argument_group("computation")
    for name, option in options_of(Settings).items():
        if name not in ("model", "seed"):
            add_flag(option, group)
    texts = parser.add_argument_group("text")
    options = options_of(Text)
    for name in CALIBRATION.values():
        add_flag(options[name], texts, *([f"--eval-{name}"] if f"eval_{name}" in EVALUATION else []))
    parser.add_argument("--json", action="store_true", help="Print the result as JSON.")
    _add_quiet(parser)


def _add_quiet(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quiet", action="store_true", help="Show no bars and no tables.")
    add_debug(parser)


def add_debug(parser: argparse.ArgumentParser) -> None:
    """`--debug`, which is looked for before anything is parsed."""
    parser.add_argument("--debug", action="store_true", help="Show where an error comes from.")


def _folder(text: str) -> str:
    """A folder's name, with `~` for the home folder."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError("it is no name of a folder")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # bytes that Python carries along
        raise argparse.ArgumentTypeError("its name is no UTF-8, so libraries cannot write weights there") from error
    return str(path_of(text))


def given(arguments: argparse.Namespace, names: Mapping[str, str]) -> dict[str, Any]:
    """What was given of the flags `names`, under the names of the options they stand for."""
    return {option: getattr(arguments, flag) for flag, option in names.items() if hasattr(arguments, flag)}


LIBRARY = "library"
"""The option of a pass, and the folder within the output, in which models of one command have in common what they are chosen by."""


def each_by_itself(step: type[Pass], options: Mapping[str, Any], output: str) -> dict[str, dict[str, Any]]:
    """What was given of the options of a pass, for each model that is to be made of it, by the name of its folder.

    Raises:
        RecipeError: two options have several values, or one has a value twice.
    """
    plain = dict(options)
    several = {}
    for name, option in options_of(step).items():
        values = plain.get(name)
        if option.each_by_itself and isinstance(values, list):
            plain[name] = values[0]
            if len(values) > 1:
                several[name] = values
    if not several:
        return {"": plain}
    if len(several) > 1:
        raise RecipeError(f"{step.name} has several values of {' and of '.join(several)}. Give several of one only.")
    ((name, values),) = several.items()
    if LIBRARY in options_of(step):
        plain.setdefault(LIBRARY, str(path_of(output) / LIBRARY))
    found = {f"{name.replace('_', '-')}-{value}".replace(" ", ""): {**plain, name: value} for value in values}
    if len(found) < len(values):
        raise RecipeError(f"{step.name} has a value of {name} twice: {', '.join(map(str, values))}. Give each once.")
    return found


def texts_given(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What was given of each text, by its section in a recipe."""
    sections = {"calibration": CALIBRATION, "evaluation": EVALUATION, "training": TRAINING}
    return {section: given(arguments, names) for section, names in sections.items()}


def overridden(recipe: Recipe, arguments: argparse.Namespace) -> Recipe:
    """The recipe with what was given on the command line in place of its own."""
    return dataclasses.replace(
        recipe,
        settings=_updated(recipe.settings, given(arguments, {name: name for name in SETTINGS}), "the command line"),
        calibration=_updated(recipe.calibration, given(arguments, CALIBRATION), "the command line"),
        evaluation=_updated(recipe.evaluation, given(arguments, EVALUATION), "the command line"),
        training=Training.from_plain(Training.with_text(as_plain(recipe.training), given(arguments, TRAINING))),
    )


def _updated(instance: Any, values: dict[str, Any], where: str) -> Any:
    if "text" in values or "dataset" in values:  # naming one text unnames the other
        values = {"text": None, "dataset": None, **values}
    return build(type(instance), {**as_plain(instance), **values}, where)

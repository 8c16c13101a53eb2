"""Recipes: frozen data, from YAML or built in Python, checked before a byte of the model is read."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import yaml

from optimum_prune.conversion.interpreter import check_libraries
from optimum_prune.errors import RecipeError, unknown
from optimum_prune.hooks.plugins import Plugins
from optimum_prune.options import as_plain, build, option
from optimum_prune.passes.base import Pass, Stage
from optimum_prune.passes.folder import FolderPass
from optimum_prune.text.text import Text, texts_to_use

DType = Literal["auto", "float32", "bfloat16", "float16"]

UNITS = {
    "": 1,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
"""Bytes of the units that a size may have."""


def size_of(text: str) -> int:
    """The bytes that a size such as 8GiB, 500 MB or 1000000 means.

    Raises:
        RecipeError: it means none.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([A-Za-z]*)B?", text.strip())
    if match is None or match[2].upper() not in UNITS:
        raise RecipeError(f"The memory {text!r} is no size. Give a number with a unit, such as 8GiB or 500MB.")
    return int(float(match[1]) * UNITS[match[2].upper()])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a run: on what model, where and how it computes.

    Raises:
        RecipeError: `memory` is no size.
    """

    model: str | None = option("A folder, a Hub id, or a .gguf file.", None)
    seed: int = option("Seed of every random choice.", 0)
    dtype: DType = option("Data type to load and save the model in; auto is the checkpoint's own.", "auto")
    device: str = option(
        "Where to compute: cpu, cuda, cuda:1, mps, xpu; auto is an accelerator if there is one.", "auto"
    )
    offload: bool | None = option(
        "Leave the weights on disk and read one layer at a time; if not given, where they would not fit in memory.",
        None,
    )
    memory: str | None = option(
        "How much of the windows' activations to keep in memory, such as 8GiB; the rest goes to disk. If not given, all of them, or nothing with "
        "offload.",
        None,
    )
    trust_remote_code: bool = option("Run modelling code that comes with the checkpoint.", False)

    def __post_init__(self) -> None:
        if self.memory is not None:
            size_of(self.memory)

    def activation_budget(self, offloads: bool) -> float:
        """Bytes of activations to keep in memory.

        Args:
            offloads: whether the weights are on disk.
        """
        if self.memory is not None:
            return size_of(self.memory)
        return 0 if offloads else math.inf


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe: passes in order, on what model, by which text.

    Raises:
        RecipeError: no pass, stages out of order, a pass whose libraries are missing, or one text for both uses.
    """

    passes: tuple[Pass, ...]
    calibration: Text = Text()
    """What passes choose by."""
    evaluation: Text = Text()
    """What is reported on; if it names no text, the end of the calibration text."""
    settings: Settings = Settings()

    def __post_init__(self) -> None:
        if not self.passes:
            raise RecipeError("The recipe has no pass. Name at least one under 'passes'.")
        _check_order(self.passes)
        for step in self.passes:
            check_libraries(step)
        texts_to_use(self.calibration, self.evaluation)

    @property
    def in_memory(self) -> tuple[Pass, ...]:
        """The passes that change the model in memory: the first."""
        return tuple(step for step in self.passes if step.stage.in_memory)

    @property
    def conversions(self) -> tuple[FolderPass, ...]:
        """The passes from folder to folder: the others."""
        return tuple(cast(FolderPass, step) for step in self.passes if not step.stage.in_memory)

    @classmethod
    def from_yaml(cls, path: str | Path, plugins: Plugins) -> Recipe:
        """The recipe in a YAML file.

        Raises:
            RecipeError: the file cannot be read, is not YAML, or constructs objects; what `from_dict` raises.
        """
        try:
            plain = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise RecipeError(f"The recipe {path} cannot be read: {error.strerror}. Name a YAML file.") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise RecipeError(
                f"The recipe {path} is not plain YAML: {reason}. Mend it; tags are not allowed."
            ) from error
        return cls.from_dict(plain, plugins)

    @classmethod
    def from_dict(cls, plain: object, plugins: Plugins) -> Recipe:
        """The recipe in plain data: the passes, calibration and evaluation, and the settings at the top level.

        Raises:
            RecipeError: a key, option or value that is not known or not right.
            PluginError: a pass that nobody provides.
        """
        if not isinstance(plain, Mapping):
            raise RecipeError(
                "A recipe is a mapping with a list of 'passes'. This one is "
                + (type(plain).__name__ if plain else "empty")
                + "."
            )
        sections = ("passes", "calibration", "evaluation")
        names = [field.name for field in dataclasses.fields(Settings)]
        for key in plain:
            if key not in (*sections, *names):
                raise RecipeError(unknown("part of a recipe", key, (*sections, *names), "Parts"))
        steps = plain.get("passes")
        if not isinstance(steps, Sequence) or isinstance(steps, str):
            raise RecipeError("The recipe needs a list of 'passes', such as `- depth: {layers: 2}`.")
        return cls(
            passes=tuple(pass_from(step, plugins) for step in steps),
            calibration=build(Text, plain.get("calibration"), "calibration"),
            evaluation=build(Text, plain.get("evaluation"), "evaluation"),
            settings=build(Settings, {key: plain[key] for key in names if key in plain}, "the recipe"),
        )

    def to_dict(self) -> dict[str, Any]:
        """The inverse of `from_dict`, with the defaults filled in."""
        return {
            **as_plain(self.settings),
            "calibration": as_plain(self.calibration),
            "evaluation": as_plain(self.evaluation),
            "passes": [{step.name: as_plain(step)} for step in self.passes],
        }

    def to_yaml(self) -> str:
        """The recipe as YAML that `from_yaml` reads."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


def _check_order(passes: Sequence[Pass]) -> None:
    """Refuses passes that cannot follow one another."""
    for earlier, later in itertools.pairwise(passes):
        if later.stage < earlier.stage:
            raise RecipeError(
                f"'{later.name}' ({later.stage.name}) comes after '{earlier.name}' ({earlier.stage.name}), and stages only go "
                f"forward: {', '.join(stage.name for stage in Stage)}. Put '{later.name}' first."
            )
    exports = [step.name for step in passes if step.stage is Stage.EXPORT]
    if len(set(exports)) < len(exports):
        raise RecipeError(f"The recipe exports twice with the same pass: {', '.join(exports)}. Run a recipe for each.")
    quantized: Pass | None = None
    for step in passes:
        if quantized is not None and not step.takes_quantized:
            raise RecipeError(
                f"'{step.name}' comes after '{quantized.name}', and cannot read what that leaves: packed weights. Leave one of them out; "
                f"exporters have options of their own to quantize."
            )
        quantized = step if step.stage is Stage.QUANTIZE else quantized


def pass_from(step: object, plugins: Plugins) -> Pass:
    """The pass that one entry of the list names: `name`, or `name: {options}`."""
    if isinstance(step, str):
        step = {step: {}}
    if not isinstance(step, Mapping) or len(step) != 1:
        raise RecipeError(
            f"A pass is written as `- name` or `- name: {{option: value}}`, and this is neither: {step!r}."
        )
    ((name, options),) = step.items()
    return build(plugins.pass_named(str(name)), options, f"pass '{name}'")

"""Recipes: frozen data, from YAML or built in Python, checked before a byte of the model is read."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from optimum_prune.conversion.interpreter import check_allowed, check_libraries
from optimum_prune.errors import RecipeError, shown, unknown
from optimum_prune.hooks.plugins import Plugins
from optimum_prune.machine import given_files, strict_yaml
from optimum_prune.machine.sizes import check_unit, size_of
from optimum_prune.options import as_plain, build, check_options, option
from optimum_prune.passes.base import Pass, Stage
from optimum_prune.passes.folder import FolderPass
from optimum_prune.text.text import Text, texts_to_use
from optimum_prune.text.training import Training, check_apart

SECTIONS = ("passes", "calibration", "evaluation", "training")
"""Parts of a recipe beside its settings."""
DType = Literal["auto", "float32", "bfloat16", "float16"]
Texts = Mapping[str, Mapping[str, Any]]
"""Options of the sections "calibration", "evaluation" and "training"."""

LARGEST_SEED = 2**32 - 1
"""The largest that numpy takes, by which some libraries draw."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a run: on what model, where and how it computes.

    Raises:
        RecipeError: an option has a value that it cannot have.
    """

    model: str | None = option("A folder, a Hub id, or a .gguf file.", None)
    seed: int = option("Seed of every random choice.", 0, at_least=0, at_most=LARGEST_SEED)
    dtype: DType = option("Data type to load and save the model in; auto is the checkpoint's own.", "auto")
    device: str = option(
        "Where to compute: cpu, cuda, cuda:1, mps, xpu; auto is an accelerator if there is one.", "auto"
    )
    offload: bool | None = option(
        "Leave the weights on disk and read one layer at a time; if not given, where they would not fit in memory.",
        None,
    )
    memory: str | None = option(
        "How much of the windows' activations to keep in memory, such as 8GiB, 500MB or 1000000 (bytes); the rest goes to disk. If not given, "
        "all of them, or nothing with offload.",
        None,
        or_number=True,
    )
    trust_remote_code: bool = option("Run modelling code that comes with the checkpoint.", False)

    def __post_init__(self) -> None:
        check_options(self, "the settings")
        if self.memory is not None:
            check_unit(self.memory)

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
    training: Training = Training()
    """What passes that train are trained on; if it names no text, the calibration text."""
    settings: Settings = Settings()
    file: Path | None = dataclasses.field(default=None, compare=False)
    """Where it was read from, if it was."""

    def __post_init__(self) -> None:
        self._check_kinds()
        if not self.passes:
            raise RecipeError("The recipe has no pass. Name at least one under 'passes'.")
        _check_order(self.passes)
        for step in self.passes:
            check_libraries(step)
        check_apart(self.training, *texts_to_use(self.calibration, self.evaluation))

    def _check_kinds(self) -> None:
        """Refuses parts of another kind than their own, and takes any sequence of passes for a tuple."""
        try:
            passes = tuple(self.passes)
        except TypeError:  # no sequence, which is said below
            passes = (self.passes,)  # type: ignore[assignment]
        kinds: list[tuple[type, object]] = [(Pass, step) for step in passes]
        kinds += [(Text, self.calibration), (Text, self.evaluation), (Training, self.training)]
        kinds += [(Settings, self.settings)]
        for kind, part in kinds:
            if not isinstance(part, kind):
                raise RecipeError(f"The recipe has {shown(part)} where a {kind.__name__} should be. Give one.")
        object.__setattr__(self, "passes", passes)

    @property
    def in_memory(self) -> tuple[Pass, ...]:
        """The passes that change the model in memory: the first."""
        return tuple(step for step in self.passes if step.stage.in_memory)

    @property
    def trains(self) -> bool:
        """Whether a pass is given text to train on."""
        return any(step.trains for step in self.passes)

    def tokens_wanted(self) -> int | None:
        """The most tokens that a pass is trained on; None where nobody knows beforehand."""
        wanted = [step.tokens_wanted() for step in self.passes if step.trains]
        known = [tokens for tokens in wanted if tokens is not None]
        return max(known) if known and len(known) == len(wanted) else None

    @property
    def conversions(self) -> tuple[FolderPass, ...]:
        """The passes from folder to folder: the others."""
        return tuple(cast(FolderPass, step) for step in self.passes if not step.stage.in_memory)

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The files and folders of this machine that a run of it reads."""
        taught = (text.text for text in self.training.texts)
        named = (self.calibration.text, self.evaluation.text, *taught, self.settings.model)
        paths = (self.file, *(given_files.path_of(each) for each in named if each is not None))
        return tuple(path for path in paths if path is not None and given_files.is_there(path))

    @classmethod
    def from_yaml(
        cls,
        path: str | Path,
        plugins: Plugins,
        *,
        trust_remote_code: bool = False,
        allow_interpreters: bool = False,
        texts: Texts | None = None,
    ) -> Recipe:
        """The recipe in a YAML file; the arguments are those of `from_dict`.

        Raises:
            RecipeError: the file cannot be read, or is no plain YAML; what `from_dict` raises.
        """
        if not isinstance(path, (str, Path)):
            raise RecipeError(f"The recipe {shown(path)} is no name of a file. Name a YAML file.")
        file = given_files.path_of(path)
        flaw = given_files.flaw(file, piped=True)
        try:
            plain = None if flaw else strict_yaml.load(given_files.beginning(file, strict_yaml.LONGEST + 1))
        except OSError as error:
            flaw = f"gives an error ({error.strerror})"
        except strict_yaml.StrictYamlError as error:
            raise RecipeError(f"The recipe {path} is not plain YAML: {error}. Mend it.") from error
        if flaw:
            raise RecipeError(f"The recipe {path} cannot be read: it {flaw}. Name a YAML file.")
        allowed = {"trust_remote_code": trust_remote_code, "allow_interpreters": allow_interpreters}
        return dataclasses.replace(cls.from_dict(plain, plugins, texts=texts, **allowed), file=file)

    @classmethod
    def from_dict(
        cls,
        plain: object,
        plugins: Plugins,
        *,
        trust_remote_code: bool = False,
        allow_interpreters: bool = False,
        texts: Texts | None = None,
    ) -> Recipe:
        """The recipe in plain data: the passes, calibration and evaluation, and the settings at the top level.

        Args:
            trust_remote_code: whether it may say so itself.
            allow_interpreters: whether its passes may name interpreters to run in.
            texts: by section, what takes the place of the text or dataset that it names, which then need not be there.

        Raises:
            RecipeError: a key, option or value that is not known or not right, or something that runs and is not allowed to.
            PluginError: a pass that nobody provides.
        """
        if not isinstance(plain, Mapping):
            what = type(plain).__name__ if plain else "empty"
            raise RecipeError(f"A recipe is a mapping with a list of 'passes'. This one is {what}.")
        names = [field.name for field in dataclasses.fields(Settings)]
        for key in (key for key in plain if key not in (*SECTIONS, *names)):
            raise RecipeError(unknown("part of a recipe", key, (*SECTIONS, *names), "Parts"))
        steps = plain.get("passes")
        if not isinstance(steps, Sequence) or isinstance(steps, str):
            raise RecipeError("The recipe needs a list of 'passes', such as `- depth: {layers: 2}`.")
        settings = build(Settings, {key: plain[key] for key in names if key in plain}, "the recipe")
        passes = tuple(pass_from(step, plugins) for step in steps)
        if settings.trust_remote_code and not trust_remote_code:
            raise RecipeError(
                "The recipe lets code that comes with the checkpoint run (trust_remote_code), which a recipe cannot decide by itself. If you "
                "trust that checkpoint, add --trust-remote-code."
            )
        for step in passes if not allow_interpreters else ():
            check_allowed(step)
        return cls(
            passes=passes,
            calibration=_text_of(plain, "calibration", texts),
            evaluation=_text_of(plain, "evaluation", texts),
            training=Training.from_plain(Training.with_text(plain.get("training"), (texts or {}).get("training", {}))),
            settings=settings,
        )

    def to_dict(self) -> dict[str, Any]:
        """The inverse of `from_dict`, with the defaults filled in."""
        return {
            **as_plain(self.settings),
            "calibration": as_plain(self.calibration),
            "evaluation": as_plain(self.evaluation),
            **({"training": as_plain(self.training)} if self.trains else {}),
            "passes": [{step.name: as_plain(step)} for step in self.passes],
        }

    def to_yaml(self) -> str:
        """The recipe as YAML that `from_yaml` reads."""
        return strict_yaml.dump(self.to_dict())


def _text_of(plain: Mapping[str, Any], section: str, texts: Texts | None) -> Text:
    """The text of a section of a recipe, or the one that is given in its place."""
    own, other = plain.get(section), (texts or {}).get(section, {})
    if isinstance(own, Mapping) and ("text" in other or "dataset" in other):
        own = {**{name: value for name, value in own.items() if name not in ("text", "dataset")}, **other}
    return build(Text, own, section)


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
        if quantized is not None and not (step.takes_quantized and quantized.unpacks):
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
            f"A pass is written as `- name` or `- name: {{option: value}}`, and this is neither: {shown(step)}."
        )
    ((name, options),) = step.items()
    return build(plugins.pass_named(str(name)), options, f"pass '{name}'")

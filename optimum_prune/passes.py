"""A pass is one step of a recipe. It declares its stage; the core asks nothing else about its nature."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from optimum_prune.cuts import Cuts, Decision
from optimum_prune.options import option

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from optimum_prune.anatomy import Family
    from optimum_prune.calibration import Calibration
    from optimum_prune.cost import Cost, Workload
    from optimum_prune.progress import Progress
    from optimum_prune.prospect import Prospect
    from optimum_prune.runtime import Runtime
    from optimum_prune.shape import Shape


class Stage(IntEnum):
    """When a pass runs. Stages of a recipe only ever go forward."""

    PRUNE = 1
    RECOVER = 2
    QUANTIZE = 3
    EXPORT = 4


@dataclass(frozen=True, kw_only=True)
class Pass(ABC):
    """One step. Its dataclass fields, made with `option()`, are its YAML keys and its command-line flags.

    The first line of a pass's docstring is its summary in listings. Impossible option values raise `RecipeError` in
    `__post_init__`.
    """

    name: ClassVar[str]
    """What recipes call it."""
    stage: ClassVar[Stage]
    requires: ClassVar[Mapping[str, str]] = {}
    """Importable modules that the core does not bring along, each with what pip calls it, such as `{"onnx": "onnx>=1.20"}`."""

    @classmethod
    def summary(cls) -> str:
        """The first line of the docstring."""
        return (cls.__doc__ or "").strip().split("\n")[0]

    @classmethod
    def missing(cls) -> tuple[str, ...]:
        """The modules in `requires` that are not installed."""
        return tuple(name for name in cls.requires if not _is_there(name))


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it would be in
        return False


class PrunePass(Pass):
    """A pass that makes the model smaller: it decides, and `surgery` cuts."""

    stage = Stage.PRUNE
    foresees_layers: ClassVar[bool] = True
    """Whether `foresee` knows how many layers will be left, or only about how large the model will be."""

    @abstractmethod
    def foresee(self, shape: Shape) -> Shape:
        """The shape that the model will have afterwards, from the shape before; reads no weight.

        Where a search decides which layers go or how wide each becomes, it is a shape of that size, with `searched`.

        Raises:
            RecipeError: the options ask for more than a model of this shape has.
        """

    def estimate(self, shape: Shape, work: Workload) -> Cost:
        """What deciding and cutting will take of a model of this shape, for `compress plan`; reads no weight.

        If a pass does not say, it is as if it moved the calibration windows through the model once.
        """
        return work.walk(shape)

    @abstractmethod
    def decide(
        self, model: PreTrainedModel, family: Family, calibration: Calibration, progress: Progress
    ) -> Iterator[Decision]:
        """Yields decisions; each is carried out on `model` before the next is asked for.

        A pass that looks at one layer at a time can therefore yield a decision for a layer and go on with the stream of
        the model as it is after that cut. The pass itself changes nothing.

        Of a run that was killed, a pass that was not done is decided again; `progress.once` spares it what it had computed by then.
        """


@dataclass(frozen=True)
class Job:
    """What a pass from folder to folder is to do."""

    source: Path
    """The checkpoint to read."""
    target: Path
    """An empty folder to fill."""
    calibration: Calibration
    """The recipe's windows, for passes that choose by text."""
    device: str
    """Where to compute, as torch calls it."""
    progress: Progress
    seed: int = 0
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class FolderPass(Pass):
    """A pass that reads one checkpoint folder and writes another: quantizers and exporters.

    What a QUANTIZE pass writes is the checkpoint from there on, with its tokenizer; what an EXPORT pass writes lies beside it, in
    a folder with the pass's name, with its tokenizer and `example.py`, a script that runs it without this package. Either is
    opened again, run, and compared with the checkpoint that it was made from.

    With `python`, all of that happens in another interpreter, which needs torch, transformers and what is in `requires`, but
    not this package.
    """

    takes_odd: ClassVar[bool] = False
    """Whether it can read a checkpoint whose layers differ in shape or lack a block."""
    takes_experts: ClassVar[bool] = True
    """Whether it converts the experts of a mixture too, whose weights transformers keep in one tensor."""
    takes_quantized: ClassVar[bool] = False
    """Whether it can read what a QUANTIZE pass wrote."""
    usual_tolerance: ClassVar[float]
    """The tolerance if none is given: about twice what it does to a real model. A property, where that depends on the options."""

    python: str | None = option("Interpreter that runs this pass, if its libraries need another environment.", None)
    tolerance: float | None = option(
        "How far logits may be from those before this pass, relative to their spread; beyond it the run fails.", None
    )

    @abstractmethod
    def check(self, prospect: Prospect) -> None:
        """Looks at what is known of the checkpoint that it will read, before anything runs.

        Raises:
            RecipeError: it could not convert that, or not with these options; the message has the remedy.
        """

    @abstractmethod
    def convert(self, job: Job) -> Mapping[str, Any]:
        """Reads the checkpoint in `job.source`, fills `job.target`, and returns evidence for the report, as plain data."""

    @abstractmethod
    def open(self, folder: Path, device: str) -> Runtime:
        """What `convert` wrote, read from its folder and ready to run, as its users will run it."""


@dataclass(frozen=True)
class Outcome:
    """What a pass did."""

    name: str
    stage: Stage
    options: Mapping[str, Any]
    seconds: float
    peak_memory: int
    """Peak memory of the process during the pass, in bytes."""
    cuts: Cuts = field(default_factory=Cuts)
    evidence: tuple[Mapping[str, Any], ...] = ()
    """Why it decided so, one entry for each decision."""
    artefact: Mapping[str, Any] | None = None
    """Of a pass from folder to folder: what it wrote, how far that is from what it was made from, and how well it runs."""

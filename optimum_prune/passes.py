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

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from optimum_prune.anatomy import Family
    from optimum_prune.calibration import Calibration
    from optimum_prune.progress import Progress
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
    requires: ClassVar[tuple[str, ...]] = ()
    """Importable modules that the core does not bring along."""

    @classmethod
    def summary(cls) -> str:
        """The first line of the docstring."""
        return (cls.__doc__ or "").strip().split("\n")[0]

    @classmethod
    def missing(cls) -> tuple[str, ...]:
        """The modules in `requires` that are not installed."""
        return tuple(name for name in cls.requires if importlib.util.find_spec(name) is None)


class PrunePass(Pass):
    """A pass that makes the model smaller: it decides, and `surgery` cuts."""

    stage = Stage.PRUNE
    foresees_layers: ClassVar[bool] = True
    """Whether `foresee` knows how many layers will be left, or only about how large the model will be."""

    @abstractmethod
    def foresee(self, shape: Shape) -> Shape:
        """The shape that the model will have afterwards, from the shape before; reads no weight.

        Where a search decides which layers go or how wide each becomes, it is a shape of that size.

        Raises:
            RecipeError: the options ask for more than a model of this shape has.
        """

    @abstractmethod
    def decide(
        self, model: PreTrainedModel, family: Family, calibration: Calibration, progress: Progress
    ) -> Iterator[Decision]:
        """Yields decisions; each is carried out on `model` before the next is asked for.

        A pass that looks at one layer at a time can therefore yield a decision for a layer and go on with the stream of
        the model as it is after that cut. The pass itself changes nothing.
        """


class FolderPass(Pass):
    """A pass that reads one checkpoint folder and writes another: quantizers and exporters."""

    @abstractmethod
    def convert(self, source: Path, target: Path, calibration: Calibration, progress: Progress) -> Mapping[str, Any]:
        """Reads the checkpoint in `source`, fills the empty folder `target`, and returns evidence for the report.

        What a QUANTIZE pass writes is the checkpoint from there on; what an EXPORT pass writes lies beside it, in a
        folder with the pass's name.
        """


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

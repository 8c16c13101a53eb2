"""Passes: the steps of a recipe. Each declares its stage, from which everybody else knows what it needs and what it gives."""

from __future__ import annotations

import importlib.util
from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, ClassVar

from optimum_prune.options import check_options

if TYPE_CHECKING:
    from optimum_prune.anatomy.decoder import Decoder
    from optimum_prune.anatomy.shape import Shape
    from optimum_prune.anatomy.workload import Cost, Workload


class Stage(IntEnum):
    """When a pass runs, what it needs and what it gives. Stages of a recipe only ever go forward."""

    PRUNE = 1
    """Makes the model in memory smaller."""
    RECOVER = 2
    """Gives the weights of the model in memory new values."""
    QUANTIZE = 3
    """Makes of a checkpoint's folder another, whose weights are packed, and which takes its place."""
    EXPORT = 4
    """Makes of a checkpoint's folder another, which lies beside it."""

    @property
    def in_memory(self) -> bool:
        """Whether a pass needs the model in memory and changes it there; else it goes from folder to folder."""
        return self <= Stage.RECOVER

    @property
    def makes_checkpoint(self) -> bool:
        """Whether what a pass from folder to folder writes is the checkpoint from there on."""
        return self is Stage.QUANTIZE


@dataclass(frozen=True, kw_only=True)
class Pass(ABC):
    """One step of a recipe. Its dataclass fields, made with `option()`, are its YAML keys and its command-line flags.

    The first line of a pass's docstring is its summary in listings. A pass is a `PrunePass`, a `RecoverPass` or a `FolderPass`, as
    its stage says.

    Raises:
        RecipeError: an option has a value that it cannot have. Options that do not go together raise it in a `__post_init__`, which
            calls this one.
    """

    name: ClassVar[str]
    """What recipes call it."""
    stage: ClassVar[Stage]
    requires: ClassVar[Mapping[str, str]] = {}
    """Importable modules that the core does not bring along, each with what pip calls it, such as `{"onnx": "onnx>=1.20"}`."""
    takes_quantized: ClassVar[bool] = False
    """Whether it can read what a QUANTIZE pass wrote whose weights unpack."""
    needs_teacher: ClassVar[bool] = False
    """Whether it looks at the dense model."""
    compares_hidden: ClassVar[bool] = False
    """Whether it compares hidden states with those of the dense model, which must have as many features."""
    sparsifies: ClassVar[bool] = False
    """Whether it leaves zeros in the weights, and every shape as it is."""
    trains: ClassVar[bool] = False
    """Whether it is given text to train on."""

    def __post_init__(self) -> None:
        check_options(self, self.name)

    @property
    def needs(self) -> Mapping[str, str]:
        """What `requires` says, and what its options ask for besides."""
        return self.requires

    @property
    def keeps_in(self) -> tuple[str, ...]:
        """Folders in which it keeps something for other runs: none of them may lie in the output."""
        return ()

    @property
    def unpacks(self) -> bool:
        """Whether what a QUANTIZE pass leaves computes the same once torch has unpacked its weights (`Tensor.dequantize`)."""
        return False

    def keeps(self, shape: Shape, work: Workload) -> float:  # noqa: ARG002 - whoever keeps something needs them
        """Bytes that it keeps on disk while it runs, beside what it leaves, for a run that goes on after a kill; reads no weight."""
        return 0

    def tokens_wanted(self) -> int | None:
        """How many tokens a pass that trains is trained on; None where nobody knows beforehand."""
        return None

    def foresee(self, shape: Shape) -> Shape:
        """The shape that the model will have afterwards, from the shape before; reads no weight.

        Raises:
            RecipeError: the options ask for more than a model of this shape has.
        """
        return shape

    def look_at(self, model: Decoder) -> None:  # noqa: B027 - most have nothing to look for
        """Looks at the model as it is before the recipe, whose weights hold nothing, before anything runs.

        Raises:
            RecipeError: the options name what it has not.
        """

    def estimate(self, shape: Shape, work: Workload) -> Cost | None:  # noqa: ARG002 - whoever can say needs them
        """What it will take of a model of this shape, for `compress plan`; reads no weight.

        Returns:
            None where nobody can say.
        """
        return None

    def remark(self, shape: Shape) -> str:  # noqa: ARG002 - whoever has something to say needs it
        """A sentence for `compress plan` about what it will do to a model of this shape on this machine; empty for none."""
        return ""

    @property
    def needs_text(self) -> bool:
        """Whether what it does depends on the calibration windows."""
        return True

    @property
    def may_end_early(self) -> bool:
        """Whether the estimate is what it takes at most, since it may find what it looks for before its end."""
        return False

    @classmethod
    def summary(cls) -> str:
        """The first line of the docstring."""
        return (cls.__doc__ or "").strip().split("\n")[0]

    @classmethod
    def missing(cls) -> tuple[str, ...]:
        """The modules in `requires` that are not installed."""
        return tuple(name for name in cls.requires if not _is_there(name))

    def lacking(self) -> tuple[str, ...]:
        """The modules in `needs` that are not installed."""
        return tuple(name for name in self.needs if not _is_there(name))


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it would be in
        return False

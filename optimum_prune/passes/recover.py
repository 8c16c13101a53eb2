"""Recover passes: they give the weights of the pruned model new values, so that it computes again what the dense model does."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from optimum_prune.calibration.stream import walk_cost
from optimum_prune.passes.base import Pass, Stage

if TYPE_CHECKING:
    from optimum_prune.anatomy.decoder import Decoder
    from optimum_prune.anatomy.shape import Shape
    from optimum_prune.anatomy.workload import Cost, Workload
    from optimum_prune.calibration.calibration import Calibration
    from optimum_prune.training.lesson import Lesson


@dataclass(frozen=True)
class Recovery:
    """A pruned model that is to be recovered, and all that a pass may look at."""

    decoder: Decoder
    """The pruned model."""
    open_teacher: Callable[[], Decoder]
    """Gives the dense model, opened again if it is not open."""
    layers: tuple[int, ...]
    """Of each layer of the pruned model, the layer of the dense model that it was."""
    calibration: Calibration
    """The windows that passes choose by."""
    lesson: Lesson | None = None
    """Text to train on, for a pass that trains."""
    let_teacher_go: Callable[[], None] = lambda: None
    """Gives back the memory of the dense model, for a pass that has seen enough of it."""

    @property
    def teacher(self) -> Decoder:
        """The dense model, as it was before the recipe, to look at only; `decoder` again for a pass that needs none."""
        return self.open_teacher()


class RecoverPass(Pass):
    """A pass that changes the values of weights, and no shape."""

    stage = Stage.RECOVER
    needs_teacher: ClassVar[bool] = True

    def estimate(self, shape: Shape, work: Workload) -> Cost:
        """What it will take of a pruned model of this shape, for `compress plan`, beside the weights of the teacher; reads no weight.

        If a pass does not say, it is as if it moved the calibration windows through the model and through its teacher once.
        """
        return walk_cost(work, shape, streams=2 if self.needs_teacher else 1)

    @abstractmethod
    def recover(self, recovery: Recovery) -> Mapping[str, Any]:
        """Changes weights of the pruned model in place.

        Shapes, names and dtypes of its parameters stay, and all values must be finite. Buffers, the config and the list of layers
        are not to be touched. Hooks that it registers it removes; gradients and the training mode are put back for it.

        Of a run that was killed, a pass that was not done is carried out again, from the weights as they were before it;
        `recovery.calibration.once` spares it what it had computed by then, and what it leaves in the folder of its lesson is there
        again. What it does may depend on nothing but the model, the text and its options, so that what comes out is the same to the
        bit, and the same in each of several processes.

        Returns:
            Evidence for the report, as plain data.
        """

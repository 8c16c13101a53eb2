"""Recover passes: they give the weights of the pruned model new values, so that it computes again what the dense model does."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from optimum_prune.calibration.stream import walk_cost
from optimum_prune.passes.base import Pass, Stage

if TYPE_CHECKING:
    from optimum_prune.anatomy.decoder import Decoder
    from optimum_prune.anatomy.shape import Shape
    from optimum_prune.anatomy.workload import Cost, Workload
    from optimum_prune.calibration.calibration import Calibration


@dataclass(frozen=True)
class Recovery:
    """A pruned model that is to be recovered, and all that a pass may look at."""

    decoder: Decoder
    """The pruned model."""
    teacher: Decoder
    """The dense model, as it was before the recipe, to look at only; `decoder` again for a pass that needs none."""
    layers: tuple[int, ...]
    """Of each layer of the pruned model, the layer of the dense model that it was."""
    calibration: Calibration
    """The recipe's windows."""


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
    def recover(self, decoder: Decoder, teacher: Decoder, calibration: Calibration) -> Mapping[str, Any]:
        """Changes weights of `decoder.model` in place.

        Shapes, names and dtypes of its parameters stay, and all values must be finite. Buffers, the config and the list of layers
        are not to be touched. Hooks that it registers it removes; gradients and the training mode are put back for it.

        Of a run that was killed, a pass that was not done is carried out again, from the weights as they were before it;
        `calibration.once` spares it what it had computed by then. What it does may depend on nothing but the model, the text and
        its options, so that what comes out is the same to the bit, and the same in each of several processes.

        Args:
            decoder: the pruned model.
            teacher: the dense model, as it was before the recipe, to look at only; `decoder` again if `needs_teacher` is False.
            calibration: the recipe's windows.

        Returns:
            Evidence for the report, as plain data.
        """

"""Pruning passes: they decide what is kept of a model, and surgery cuts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from optimum_prune.calibration.stream import walk_cost
from optimum_prune.passes.base import Pass, Stage
from optimum_prune.surgery.cuts import Decision

if TYPE_CHECKING:
    from optimum_prune.anatomy.decoder import Decoder
    from optimum_prune.anatomy.shape import Shape
    from optimum_prune.anatomy.workload import Cost, Workload
    from optimum_prune.calibration.calibration import Calibration


class PrunePass(Pass):
    """A pass that makes the model smaller: it decides, and surgery cuts."""

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

    def estimate(self, shape: Shape, work: Workload) -> Cost | None:
        """What deciding and cutting will take of a model of this shape, for `compress plan`; reads no weight.

        If a pass does not say, it is as if it moved the calibration windows through the model once.
        """
        return walk_cost(work, shape)

    @abstractmethod
    def decide(self, decoder: Decoder, calibration: Calibration) -> Iterator[Decision]:
        """Yields decisions; each is carried out on the model before the next is asked for.

        A pass that looks at one layer at a time can therefore yield a decision for a layer and go on with the stream of
        the model as it is after that cut. The pass itself changes nothing. One that `trains` is given a `Lesson` as a third argument.

        Of a run that was killed, a pass that was not done is decided again; `calibration.once` spares it what it had computed by then.
        """

"""How many units each layer keeps so that a model of a given size predicts best: the search of `budget`, over some axes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from optimum_prune.anatomy.shape import LayerShape, Shape
from optimum_prune.anatomy.workload import Cost, Workload
from optimum_prune.refit.pricing import priced, prices_told, pricing_cost
from optimum_prune.selection.allowed import Allowed
from optimum_prune.selection.divergence import split, trial_workloads
from optimum_prune.selection.measures import Weights
from optimum_prune.selection.shapes import PriceList

if TYPE_CHECKING:
    from optimum_prune.anatomy.decoder import Decoder
    from optimum_prune.calibration.calibration import Calibration
    from optimum_prune.refit.narrowing import Narrowing


@dataclass(frozen=True)
class Allocating:
    """A search over some axes of every layer."""

    allowed: Allowed
    """Which may become less."""
    narrowing: Narrowing
    """How."""

    def found(
        self, decoder: Decoder, calibration: Calibration, start: Sequence[LayerShape], parameters: int
    ) -> tuple[Sequence[LayerShape], dict[str, Any]]:
        """What each layer is to be, and the prices as evidence; the model stays as it is.

        Args:
            start: the layers as they would be before anything of these axes goes.
            parameters: of the whole model, which has no more than that and half of the smallest step.
        """
        shape, narrowing = decoder.shape(), replace(self.narrowing, swaps=0)
        fitted, held_out = (calibration.on(windows) for windows in split(calibration.windows))
        prices = priced(decoder, fitted, held_out, self.allowed, narrowing)
        started = [replace(each, shape=layer) for each, layer in zip(prices, start, strict=True)]
        step = min((each.smallest_step for each in started if each.curves), default=0)
        found = PriceList(started, shape.rest, Weights()).at_most(parameters + step / 2)
        return [layer for layer in found if layer is not None], prices_told(prices, shape)

    def cost(self, work: Workload, shape: Shape) -> Cost:
        """What `found` takes."""
        return pricing_cost(*trial_workloads(work), shape, self.allowed, self.narrowing)

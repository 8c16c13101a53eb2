"""SparseGPT: weights become zero, and those behind them in their row make up for it (Frantar and Alistarh, ICML 2023, arXiv 2301.00774).

Of each linear module of a layer, columns are gone through one after the other. Which weights of the next go is decided by what their
loss would change of the output given that the rest may follow, `w^2 / [H^-1]_jj`, with H the gram of the inputs; then the rest does
follow. Grams are summed exactly and solved in float64. The layers are gone through in order, each on the stream of the sparse ones
before it. What stays as it is, is what Wanda leaves as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from optimum_prune.anatomy.shape import Shape
from optimum_prune.anatomy.workload import Cost, Workload
from optimum_prune.calibration.statistics import Gram
from optimum_prune.hooks.marker import hookimpl
from optimum_prune.options import option
from optimum_prune.passes.base import Pass
from optimum_prune.passes.prune import PrunePass
from optimum_prune.refit.solving import damp
from optimum_prune.refit.sparsifying import REMARK, Sparsifying, inverse_factor, sparsifying_cost, without_lowest
from optimum_prune.selection.sparsity import Sparsity
from optimum_prune.selection.targets import check_named_once, check_protected

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from optimum_prune.anatomy.decoder import Decoder
    from optimum_prune.calibration.calibration import Calibration
    from optimum_prune.surgery.cuts import Decision

DAMPING = 0.01
"""The paper's, of 262,144 tokens; fewer tell less of how inputs go together."""


@dataclass(frozen=True, kw_only=True)
class SparseGPT(PrunePass):
    """Sets weights to zero and lets those that are left in a row make up for them; no shape changes."""

    name: ClassVar[str] = "sparsegpt"
    sparsifies: ClassVar[bool] = True
    ratio: float | None = option("Fraction of the weights that become zero, between 0 and 1.", None, above=0, below=1)
    pattern: str | None = option(
        "Of how many consecutive inputs of a row how many weights stay, instead of 'ratio': 2:4 or 4:8.", None
    )
    damping: float | None = option(
        "Added to the gram's diagonal, relative to its mean. If not given: 0.01, or the number of inputs over that of tokens if that is more.",
        None,
        above=0,
        below=math.inf,
    )
    columns: int = option(
        "For 'ratio': in how many columns at a time the weights are compared with one another.", 128, at_least=1
    )
    protect: tuple[int, ...] = option("Layers to leave as they are.", ())

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self._sparsity
        check_named_once(self.name, self.protect)

    @property
    def _sparsity(self) -> Sparsity:
        return Sparsity.asked(self.name, self.ratio, self.pattern)

    def foresee(self, shape: Shape) -> Shape:
        check_protected(self.name, self.protect, shape)
        self._sparsity.check(self.name, shape)
        return shape

    def remark(self, _: Shape) -> str:
        return REMARK

    def estimate(self, shape: Shape, work: Workload) -> Cost:
        return sparsifying_cost(shape, work, self.protect, solves=True)

    def decide(self, decoder: Decoder, calibration: Calibration) -> Iterator[Decision]:
        def make(features: int, device: torch.device) -> Gram:
            return Gram(features, device, calibration.activations)

        sparsifying = Sparsifying(self.name, self._sparsity, self.protect, make, self._sparse)
        yield from sparsifying.decisions(decoder, calibration, "SparseGPT, layer by layer")

    def _sparse(self, weights: Sequence[Tensor], inputs: Gram) -> list[Tensor]:
        damping = max(DAMPING, inputs.features / max(inputs.tokens, 1)) if self.damping is None else self.damping
        factor = inverse_factor(damp(inputs.exact, damping))
        together = self._sparsity.of or self.columns
        return [without_lowest(weight, factor, self._sparsity.lowest_of_all, together) for weight in weights]


@hookimpl
def passes() -> Iterator[type[Pass]]:
    yield SparseGPT

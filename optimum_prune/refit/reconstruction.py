"""What an output projection is to compute once something in the model was cut, by least squares.

With X its inputs over the calibration tokens, `H = X'X + damping * mean(diag X'X) * I`, B its weights, and E what the hidden states
behind its block lack of what they should be, `B + strength * H^-1 X'E` brings them nearer: a ridge regression towards the old
weights. A bias takes the mean of E, as far as X does not give it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # documented, but not declared public

from optimum_prune.anatomy.axis import Axis
from optimum_prune.anatomy.linear import Projection
from optimum_prune.anatomy.shape import ATTENTION, FEED_FORWARD, LayerShape
from optimum_prune.anatomy.workload import Cost, Workload
from optimum_prune.calibration.statistics import Cross, Gram, gram_cost, gram_memory, solving_device
from optimum_prune.calibration.visit import LayerVisit
from optimum_prune.errors import NumericalError
from optimum_prune.refit.elimination import Elimination
from optimum_prune.refit.solving import cholesky, damp, solved, solver_memory

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True)
class ProjectionTarget:
    """The linear map that a projection, or what is kept of it, is to compute; where float64 is computed."""

    weight: Float[Tensor, "out in"]
    bias: Float[Tensor, " out"] | None

    @classmethod
    def of(cls, projection: Projection, group: int = 0) -> ProjectionTarget:
        """What a projection, or that of a group, computes as it is."""
        device, bias = solving_device(projection.device), projection.bias
        return cls(projection.maps[group].to(device), None if bias is None else bias.to(device))

    def moments(self, gram: Gram, damping: float) -> Float[Tensor, "in in"]:
        """H above; of the inputs less their mean if there is a bias to take that over."""
        return damp(gram.exact if self.bias is None else gram.centered, damping)

    def bias_for(self, result: Elimination, gram: Gram, inputs: Sequence[int]) -> Float[Tensor, " out"] | None:
        """The bias that takes over the mean of what the kept inputs do not give."""
        if self.bias is None:
            return None
        return self.bias + (self.weight.double() @ gram.mean - result.weight @ gram.mean[list(inputs)])


def moved(
    visit: LayerVisit, axis: Axis, gram: Gram, goal: Iterable[Float[Tensor, "w t h"]], damping: float, strength: float
) -> ProjectionTarget | None:
    """What a block's output projection is to compute to bring the hidden states behind the block nearer to a goal.

    Args:
        axis: the units in front of the projection.
        gram: of its inputs, which the visit has observed.
        goal: hidden states behind the block as they should be, batch by batch.
        strength: 0 not at all, 1 as near as the least squares can.

    Returns:
        None where a norm follows the projection.

    Raises:
        NumericalError: activations that are not finite.
    """
    if not visit.adds_output(axis.block):
        return None
    projection = visit.layer.projection(axis.output)
    target = ProjectionTarget.of(projection)
    lack = Cross(gram.features, target.weight.shape[0], projection.device)
    for (rows, hidden), (batch, _), wanted in zip(visit.outputs(axis.block), visit.stream, goal, strict=True):
        counted = batch.mask.flatten().to(hidden.device)
        lack.add(rows[counted], (wanted.to(hidden.device).float() - hidden.float()).flatten(0, -2)[counted])
        visit.activations.release(rows, wanted)
    path = axis.output.rpartition(".")[0]
    with named(f"The projection '{path}' of layer {visit.index}", target.weight, damping):
        factor = cholesky(target.moments(gram, damping))
    products = lack.value if target.bias is None else lack.centered(gram)
    move = strength * solved(factor, products).T
    bias = None if target.bias is None else target.bias + strength * lack.mean - move @ gram.mean
    return ProjectionTarget(target.weight + move, bias)


def refitted(
    visit: LayerVisit, block: str, goal: Iterable[Float[Tensor, "w t h"]], damping: float, strength: float = 1.0
) -> dict[str, Tensor]:
    """New weights, by their names in the model, of a block's output projection that brings the hidden states to a goal.

    Returns:
        An empty mapping where a norm follows the projection.
    """
    axis = axis_in_front(visit, block)
    target = moved(visit, axis, visit.gram(axis), goal, damping, strength)
    if target is None:
        return {}
    stored = visit.layer.projection(axis.output).stored([target.weight], target.bias)
    return cast("dict[str, Tensor]", visit.layer.named(stored))


def axis_in_front(visit: LayerVisit, block: str) -> Axis:
    """The axis of the inputs of a block's output projection; each input by itself, where no axis of the layer says more."""
    output = visit.layer.output_of(block)
    found = (axis for axis in visit.layer.axes.values() if axis.output == output)
    return next(found, Axis("inputs", visit.layer.projection(output).maps[0].shape[1], (), output, block))


@contextmanager
def named(what: str, weight: Tensor, damping: float) -> Iterator[None]:
    """Gives numerical trouble in a solver the name of what it is about."""
    if not weight.isfinite().all():
        raise NumericalError(f"{what} has output weights that are not finite. Mend the checkpoint.")
    try:
        yield
    except LinAlgError as error:
        raise NumericalError(
            f"{what} has activations that are not finite, or too ill-conditioned to solve for. Look for NaN or infinity in the "
            f"weights, or raise 'damping' above {damping}."
        ) from error


def fitting_cost(work: Workload, features: int) -> Cost:
    """Refits a projection by least squares towards other hidden states."""
    return Cost(
        memory=solver_memory(work, features, 3.5 * features * work.hidden),
        statistics=2 * work.tokens * features * work.hidden,
        solving=features**3 / 3 + 4 * features**2 * work.hidden,
    )


def refitting_cost(work: Workload, layer: LayerShape, *blocks: str) -> Cost:
    """Observes the inputs of the output projections of some blocks of a layer and refits these, as healing does."""
    widths = [layer.width(block) for block in blocks if layer.width(block) and _is_refitted(layer, block)]
    fits = [
        gram_cost(work, width).with_memory(gram_memory(work, width)).followed_by(fitting_cost(work, width))
        for width in widths
    ]
    observed = work.observed(layer, *(block for block in blocks if block == ATTENTION))
    cost = Cost().followed_by(*fits, work.run(layer, work.tokens)).with_memory(observed)
    return Cost(**{**vars(cost), "left": work.itemsize * work.hidden * sum(widths)})


def _is_refitted(layer: LayerShape, block: str) -> bool:
    """Whether healing refits the output of a block: that of a mixture it leaves alone."""
    return block != FEED_FORWARD or not layer.routed

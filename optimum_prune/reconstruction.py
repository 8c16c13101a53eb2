"""What an output projection is to compute once something in the model was cut, by least squares.

With X its inputs over the calibration tokens, `H = X'X + damping * mean(diag X'X) * I`, B its weights, and E what the hidden states
behind its layer lack of what they should be, `B + strength * H^-1 X'E` brings them nearer: a ridge regression towards the old
weights. A bias takes the mean of E, as far as X does not give it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # documented, but not declared public

from optimum_prune.anatomy import Linear
from optimum_prune.elimination import Elimination, cholesky, damp, solved
from optimum_prune.errors import NumericalError
from optimum_prune.layerwise import Visit
from optimum_prune.statistics import Cross, Gram, solving_device

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from optimum_prune.anatomy import Family


@dataclass(frozen=True)
class Aim:
    """The linear map that a projection, or what is kept of it, is to compute; where float64 is computed."""

    weight: Float[Tensor, "out in"]
    bias: Float[Tensor, " out"] | None

    @classmethod
    def of(cls, linear: Linear) -> Aim:
        """What a projection computes as it is."""
        device = solving_device(linear.weight.device)
        return cls(linear.weight.to(device), None if linear.bias is None else linear.bias.to(device))

    def moments(self, gram: Gram, damping: float) -> Float[Tensor, "in in"]:
        """H above; of the inputs less their mean if there is a bias to take that over."""
        return damp(gram.exact if self.bias is None else gram.centered, damping)

    def fitted(
        self, name: str, linear: Linear, result: Elimination, gram: Gram, inputs: Sequence[int]
    ) -> dict[str, Tensor]:
        """New weights of the projection by their names; its bias takes over the mean of what the kept inputs do not give."""
        weights = {f"{name}.weight": linear.stored(result.weight.to(linear.weight.dtype))}
        if self.bias is not None:
            lost = self.weight.double() @ gram.mean - result.weight @ gram.mean[list(inputs)]
            weights[f"{name}.bias"] = self.bias + lost
        return weights

    def whole(self, name: str, linear: Linear) -> dict[str, Tensor]:
        """New weights of the projection by their names, with all its inputs."""
        weights = {f"{name}.weight": linear.stored(self.weight.to(linear.weight.dtype))}
        return weights if self.bias is None else {**weights, f"{name}.bias": self.bias}


def gram_for(linear: Linear, visit: Visit) -> Gram:
    """A gram for the inputs of a projection in the visited layer."""
    return Gram(linear.weight.shape[1], linear.weight.device, visit.shelf)


def observed_channels(visit: Visit, family: Family) -> Gram:
    """The gram of the FFN channels of the visited layer."""
    gram = gram_for(family.linear(visit.layer, family.feed_forward.output), visit)
    visit.observe_channels(gram.add)
    return gram


def observed_heads(visit: Visit, family: Family) -> Gram:
    """The gram of what the attention heads of the visited layer put out."""
    gram = gram_for(family.linear(visit.layer, family.attention_output), visit)
    visit.observe_heads(gram.add)
    return gram


def moved(
    visit: Visit,
    family: Family,
    gram: Gram,
    goal: Iterable[Float[Tensor, "w t h"]],
    damping: float,
    strength: float,
) -> Aim:
    """What the FFN's output projection is to compute to bring the hidden states behind the layer nearer to a goal.

    Where a norm follows the projection, it stays as it is.

    Args:
        gram: of the projection's inputs, which the visit observed last.
        goal: hidden states behind the layer as they should be, batch by batch.
        strength: 0 not at all, 1 as near as the least squares can.

    Raises:
        NumericalError: activations that are not finite.
    """
    path = family.feed_forward.output
    return _moved(visit, family, gram, goal, damping, strength, path) or Aim.of(family.linear(visit.layer, path))


def _moved(
    visit: Visit,
    family: Family,
    gram: Gram,
    goal: Iterable[Float[Tensor, "w t h"]],
    damping: float,
    strength: float,
    path: str,
) -> Aim | None:
    """The same for the projection at a path, of attention towards a goal behind attention; None where a norm follows it."""
    if not visit.adds_output(path):
        return None
    aim = Aim.of(family.linear(visit.layer, path))
    lack = Cross(gram.features, aim.weight.shape[0], family.linear(visit.layer, path).weight.device)
    for (rows, hidden), (batch, _), wanted in zip(visit.outputs(), visit.stream, goal, strict=True):
        counted = batch.mask.flatten().to(hidden.device)
        lack.add(rows[counted], (wanted.to(hidden.device).float() - hidden.float()).flatten(0, -2)[counted])
        visit.put_back(rows, wanted)
    with named(f"The projection '{path}' of layer {visit.index}", aim.weight, damping):
        factor = cholesky(aim.moments(gram, damping))
    products = lack.value if aim.bias is None else lack.centered(gram)
    move = strength * solved(factor, products).T
    bias = None if aim.bias is None else aim.bias + strength * lack.mean - move @ gram.mean
    return Aim(aim.weight + move, bias)


def refitted(
    visit: Visit,
    family: Family,
    goal: Iterable[Float[Tensor, "w t h"]],
    damping: float,
    path: str | None = None,
    strength: float = 1.0,
) -> dict[str, Tensor]:
    """New weights, by their names in the model, of the output projection that brings the hidden states to a goal.

    Returns:
        An empty mapping where a norm follows the projection.
    """
    path = path or family.feed_forward.output
    observed = observed_channels if path == family.feed_forward.output else observed_heads
    aim = _moved(visit, family, observed(visit, family), goal, damping, strength, path)
    if aim is None:
        return {}
    return aim.whole(f"{family.layers}.{visit.index}.{path}", family.linear(visit.layer, path))


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

"""OSSCAR: one-shot structured pruning by combinatorial optimization (Meng et al., ICML 2024, arXiv 2403.12983).

Layer by layer, FFN channels are removed so that the FFN's output changes least over the calibration tokens. With `X` the
inputs of the output projection, `B` its dense weights and `H = X'X + damping * mean(diag X'X) * I`, a set S of channels
leaves the loss

    min over W supported on S of  1/2 tr((W - B)' H (W - B))

Channels are eliminated greedily. With `inv` the inverse of H restricted to what is still alive, and W the optimal weights on
it, removing channel j costs `1/2 |W_j|^2 / inv_jj`; the cheapest goes, and W and inv follow by a rank-one update. Pairs of
channels may then be swapped as long as the loss falls, and the weights on what is left are refitted exactly in the end. Later
layers see the stream of the pruned layers before them. Where the projection has a bias, X is taken less its mean, and the bias
takes over the mean of what is lost.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # documented, but not declared public

from optimum_prune import layerwise
from optimum_prune.anatomy import Shape
from optimum_prune.cuts import Cuts, Decision, Indices
from optimum_prune.errors import NumericalError, RecipeError
from optimum_prune.hookspecs import hookimpl
from optimum_prune.options import option
from optimum_prune.passes import Pass, PrunePass
from optimum_prune.statistics import Gram

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor
    from transformers import PreTrainedModel

    from optimum_prune.anatomy import Family
    from optimum_prune.calibration import Calibration
    from optimum_prune.progress import Progress

LARGEST_MULTIPLE = 64
PATIENCE = 16
"""Channels in a row that could not be swapped with a gain before the local search ends."""
PENDING = 128
"""Eliminations kept as a low-rank factor before the matrices are brought up to date: 32 to 256 are about equally fast."""
SHRINK = 0.7
"""The matrices are cut down to what is alive when less than this fraction is."""


@dataclass(frozen=True, kw_only=True)
class Osscar(PrunePass):
    """Removes FFN channels by exact greedy elimination and refits the output projection by least squares."""

    name: ClassVar[str] = "osscar"
    ratio: float = option("Fraction of the FFN channels to remove from every layer, between 0 and 1.")
    multiple_of: int | None = option(
        "Keep a multiple of this many channels. If not given: 64, or less for layers narrower than 1024.", None
    )
    damping: float = option("Added to the gram's diagonal, relative to its mean.", 0.01)
    step: int = option("Channels removed before the rest are ranked anew; 1 is the exact greedy.", 1)
    swaps: int = option("After the elimination, swap up to this many pairs of channels where the loss falls.", 0)
    one_shot: bool = option("Rank the channels once instead of eliminating them; faster for very wide layers.", False)

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise RecipeError(f"osscar has ratio {self.ratio}. Give the fraction to remove, above 0 and below 1.")
        if self.multiple_of is not None and self.multiple_of < 1:
            raise RecipeError(f"osscar has multiple_of {self.multiple_of}. Give a whole number of at least 1.")
        if not 0 < self.damping < torch.inf:
            raise RecipeError(f"osscar has damping {self.damping}. Give a number above 0; 0.01 is usual.")
        if self.step < 1:
            raise RecipeError(f"osscar has step {self.step}. Give a whole number of at least 1.")
        if self.swaps < 0:
            raise RecipeError(f"osscar has swaps {self.swaps}. Give 0 or more.")

    def foresee(self, shape: Shape) -> Shape:
        return Shape(shape.layers, self.kept_width(shape.width))

    def kept_width(self, width: int) -> int:
        """Channels kept of `width`: the multiple nearest to what the ratio asks for; never none, never all.

        Raises:
            RecipeError: no multiple lies between none and all.
        """
        multiple = self.multiple_of or _usual_multiple(width)
        kept = round(width * (1 - self.ratio) / multiple) * multiple
        kept = min(max(kept, multiple), (width - 1) // multiple * multiple)
        if kept < 1:
            raise RecipeError(
                f"osscar is to keep a multiple of {multiple} channels, and fewer than {width}. Lower multiple_of."
            )
        return kept

    def decide(
        self, model: PreTrainedModel, family: Family, calibration: Calibration, progress: Progress
    ) -> Iterator[Decision]:
        output = family.feed_forward.output
        for visit in layerwise.walk(model, family, calibration, progress, "OSSCAR, layer by layer"):
            linear = family.linear(visit.layer, output)
            width = linear.weight.shape[1]
            gram = Gram(width, linear.weight.device)
            visit.observe_channels(gram.add)
            keep = self.kept_width(width)
            step = width if self.one_shot else self.step
            moments = gram.value if linear.bias is None else gram.centered
            try:
                result = eliminate(damped(moments, self.damping), linear.weight, keep, step, self.swaps)
            except LinAlgError as error:
                raise NumericalError(
                    f"The FFN activations of layer {visit.index} are not finite, or too ill-conditioned to solve for. Look for "
                    f"NaN or infinity in the weights, or raise 'damping' above {self.damping}."
                ) from error
            visit.narrow(result.kept)
            name = f"{family.layers}.{visit.index}.{output}"
            weights = {f"{name}.weight": linear.stored(result.weight)}
            if linear.bias is not None:
                lost = linear.weight.double() @ gram.mean - result.weight @ gram.mean[list(result.kept)]
                weights[f"{name}.bias"] = linear.bias + lost
            yield Decision(
                cuts=Cuts(channels={visit.index: result.kept}),
                weights=weights,
                evidence={"layer": visit.index, "width": keep, "relative_error": result.relative_error},
            )


def _usual_multiple(width: int) -> int:
    """64, and for narrow layers the largest power of two that leaves at least 16 multiples."""
    multiple = LARGEST_MULTIPLE
    while multiple > 1 and width // multiple < 16:
        multiple //= 2
    return multiple


@dataclass(frozen=True)
class Elimination:
    """What is left of a linear layer."""

    kept: Indices
    """Kept input channels, ascending."""
    weight: Float[Tensor, "out kept"]
    """Refitted weights on them, float64."""
    loss: float
    """`1/2 tr((W - B)' H (W - B))` of the refitted weights."""
    relative_error: float
    """The loss relative to that of removing everything."""


def damped(gram: Float[Tensor, "in in"], damping: float) -> Float[Tensor, "in in"]:
    """`X'X + damping * mean(diag X'X) * I` in float64; for a gram of zeros, as if its mean were 1."""
    gram = gram.to(torch.float64, copy=True)
    mean = gram.diagonal().mean().item() or 1.0
    gram.diagonal().add_(damping * mean)
    return gram


def eliminate(
    gram: Float[Tensor, "in in"], weight: Float[Tensor, "out in"], keep: int, step: int = 1, swaps: int = 0
) -> Elimination:
    """Greedy backward elimination of input channels down to `keep`, then swaps, then the exact refit.

    Args:
        gram: H above, symmetric positive definite.
        weight: B' above, the dense weights.
        keep: how many channels stay, 1 to all.
        step: how many channels go before the rest are ranked anew: 1 is the exact greedy, all of them a one-shot ranking.
        swaps: how many pairs of a kept and a removed channel may at most change places, each lowering the loss.

    Raises:
        torch.linalg.LinAlgError: the gram is not positive definite, or not finite.
    """
    gram, dense = gram.double(), weight.double().T
    products = dense @ dense.T
    everything = 0.5 * (gram * products).sum().item()
    kept = _survivors(torch.cholesky_inverse(torch.linalg.cholesky(gram)), products, keep, step)
    refitted, loss = refit(gram, dense, kept)
    if swaps:
        other = swapped(gram, dense, kept, swaps)
        refitted_other, loss_other = refit(gram, dense, other)
        if loss_other < loss:
            kept, refitted, loss = other, refitted_other, loss_other
    return Elimination(tuple(kept.tolist()), refitted.T, loss, loss / everything if everything else 0.0)


def _survivors(inverse: Float[Tensor, "in in"], products: Float[Tensor, "in in"], keep: int, step: int) -> Tensor:
    """Indices of the channels that greedy elimination leaves, ascending. Overwrites both matrices.

    Args:
        inverse: inverse of the gram.
        products: inner products `W W'` of the weights of each channel; the weights themselves are not needed.
    """
    if step >= len(inverse) - keep:
        cost = products.diagonal() / inverse.diagonal()
        return cost.topk(keep).indices.sort().values
    indices = torch.arange(len(inverse), device=inverse.device)
    alive = torch.ones_like(indices, dtype=torch.bool)
    left = len(indices)
    while left > keep:
        pending = min(max(PENDING // step, 1) * step, left - keep)  # whole steps
        u, q, m = _eliminate_some(inverse, products, alive, pending, step)
        left -= pending
        if left == keep:
            break
        inverse.addmm_(u.T, u, alpha=-1)
        half = torch.addmm(q, m, u, alpha=-0.5)
        products.addmm_(u.T, half, alpha=-1).addmm_(half.T, u, alpha=-1)
        if left < SHRINK * len(alive):
            inverse, products = inverse[alive][:, alive], products[alive][:, alive]
            indices, alive = indices[alive], alive[alive]
    return indices[alive]


def _eliminate_some(
    inverse: Float[Tensor, "n n"], products: Float[Tensor, "n n"], alive: Bool[Tensor, " n"], count: int, step: int
) -> tuple[Float[Tensor, "count n"], Float[Tensor, "count n"], Float[Tensor, "count count"]]:
    """Eliminates `count` of the channels that are `alive`, which follows in place, while the two matrices stay.

    Only three things are needed of the current inverse and weights: the inverse's diagonal, the squared
    norms of the weights' rows, and, for the channel that goes, one column of the inverse and one of the inner products. With U
    the scaled columns of the inverse and V the scaled rows of the weights at the eliminated channels, the inverse has become
    `inverse - U U'` and the weights `W - U V`, so these columns follow from those at the start, U, `Q = W V'` and `M = V V'`:
    O(n k) for the k-th channel.

    Returns:
        U', Q' and M, by which both matrices can be brought up to date.
    """
    size = len(inverse)
    u, q = inverse.new_empty(count, size), inverse.new_empty(count, size)
    m = inverse.new_zeros(count, count)
    diagonal = inverse.diagonal().where(alive, 1.0)
    norms = products.diagonal().where(alive, torch.inf)  # what is gone costs infinitely much to remove again
    queue: list[int] = []
    for k in range(count):
        if not queue:
            cost = norms / diagonal
            queue = (
                [int(cost.argmin())] if step == 1 else cost.topk(min(step, count - k), largest=False).indices.tolist()
            )
        j = queue.pop(0)
        inverse_jj, norm = diagonal[j].item(), norms[j].item()
        scale = math.sqrt(inverse_jj)
        u_past, q_past, past = u[:k], q[:k], u[:k, j].clone()
        mixed = torch.addmv(q_past[:, j], m[:k, :k], past, alpha=-1).div_(scale)
        torch.addmv(inverse[j], u_past.T, past, alpha=-1, out=u[k]).div_(scale)
        torch.addmv(products[j], q_past.T, past, alpha=-1, out=q[k]).div_(scale)
        m[k, :k] = mixed
        m[:k, k] = mixed
        m[k, k] = norm / inverse_jj
        # What is lost of the norms: 2 u p - u^2 |v|^2, with p the inner products of the current weights with v.
        lost = torch.addmv(q[k], u_past.T, mixed, alpha=-1).mul_(2).sub_(u[k], alpha=norm / inverse_jj)
        norms.addcmul_(u[k], lost, value=-1)
        diagonal.addcmul_(u[k], u[k], value=-1)
        norms[j], diagonal[j], alive[j] = torch.inf, 1.0, False
    return u, q, m


def refit(
    gram: Float[Tensor, "in in"], dense: Float[Tensor, "in out"], kept: Tensor
) -> tuple[Float[Tensor, "kept out"], float]:
    """The weights on `kept` that minimise the loss, `B_S + H_SS^-1 H_SD B_D` with D what is gone; and the loss."""
    alive = torch.zeros(len(gram), dtype=torch.bool, device=gram.device)
    alive[kept] = True
    inside, outside = gram[alive], gram[~alive]
    lost = dense[~alive]
    pull = inside[:, ~alive] @ lost
    correction = torch.cholesky_solve(pull, torch.linalg.cholesky(inside[:, alive]))
    loss = 0.5 * ((lost * (outside[:, ~alive] @ lost)).sum() - (pull * correction).sum())
    return dense[alive] + correction, max(loss.item(), 0.0)


def swapped(gram: Float[Tensor, "in in"], dense: Float[Tensor, "in out"], kept: Tensor, swaps: int) -> Tensor:
    """Local search: lets the cheapest kept channel go and takes in the one that then lowers the loss most, while that helps.

    The table holds `[H | H B]` swept on the kept channels: there it is `-H_SS^-1` and the refitted weights, elsewhere the Schur
    complement and the gradient. Taking channel k in or out is one sweep, O(in (in + out)).

    Returns:
        Indices of as many channels, ascending; their loss is not above that of `kept`.
    """
    size = len(gram)
    inside = torch.zeros(size, dtype=torch.bool, device=gram.device)
    inside[kept] = True
    table = _swept_table(gram, dense, inside)
    passed_over: set[int] = set()
    while swaps and len(passed_over) < min(PATIENCE, len(kept)):
        cost = 0.5 * table[:, size:].square().sum(1) / table[:, :size].diagonal().abs()
        open_to_go = inside.clone()
        open_to_go[list(passed_over)] = False
        out = int(cost.where(open_to_go, torch.inf).argmin())
        _sweep(table, out, inwards=False)
        inside[out] = False
        gain = 0.5 * table[:, size:].square().sum(1) / table[:, :size].diagonal().abs()
        best = int(gain.where(~inside, -torch.inf).argmax())
        if best != out and gain[best] > cost[out] * (1 + 1e-9):
            swaps -= 1
            passed_over.clear()
        else:
            best = out
            passed_over.add(out)
        _sweep(table, best, inwards=True)
        inside[best] = True
    return inside.nonzero().flatten()


def _swept_table(
    gram: Float[Tensor, "in in"], dense: Float[Tensor, "in out"], inside: Tensor
) -> Float[Tensor, "in in+out"]:
    size = len(gram)
    target = gram @ dense
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram[inside][:, inside]))
    across = inverse @ gram[inside][:, ~inside]
    weights = inverse @ target[inside]
    table = torch.cat([torch.empty_like(gram), target], dim=1)
    ins, outs = inside.nonzero(), (~inside).nonzero()
    table[ins, ins.T] = -inverse
    table[ins, outs.T] = across
    table[outs, ins.T] = across.T
    table[outs, outs.T] = gram[~inside][:, ~inside] - gram[~inside][:, inside] @ across
    table[inside, size:] = weights
    table[~inside, size:] = target[~inside] - gram[~inside][:, inside] @ weights
    return table


def _sweep(table: Float[Tensor, "in in+out"], k: int, *, inwards: bool) -> None:
    """Takes channel k into the support, or out of it, in place."""
    pivot = table[k, k].item()
    row, column = table[k].clone(), table[:, k].clone()
    table.addr_(column, row, alpha=-1 / pivot)
    sign = 1 if inwards else -1
    table[k] = sign * row / pivot
    table[:, k] = sign * column / pivot
    table[k, k] = -1 / pivot


@hookimpl
def passes() -> Iterator[type[Pass]]:
    yield Osscar

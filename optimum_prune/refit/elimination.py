"""Which inputs of a linear layer to keep, and the weights on them that change its output least.

With `X` the inputs, `B` the dense weights and `H = X'X + damping * mean(diag X'X) * I`, a set S of kept inputs leaves the loss

    min over W supported on S of  1/2 tr((W - B)' H (W - B))

Greedy backward elimination: with `inv` the inverse of H restricted to what is still alive, and W the optimal weights on it,
removing input j costs `1/2 |W_j|^2 / inv_jj`, and removing a group g of inputs `1/2 tr(W_g' inv_gg^-1 W_g)`; the cheapest goes, and
W and inv follow. Everything is float64, and every factor a Cholesky factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # documented, but not declared public

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

from optimum_prune.anatomy.axis import Indices
from optimum_prune.anatomy.workload import Cost, Workload
from optimum_prune.refit.local_search import swapped
from optimum_prune.refit.solving import FEW, ROWS, cholesky, made, packed, quadratic, refit_cheaply, solver_memory

MATRIX_BY_VECTOR = 8
"""How much longer an operation takes in a product of a matrix and a vector than in one of matrices."""
PENDING = 128
"""Eliminations kept as a low-rank factor before the matrices are brought up to date: 32 to 256 are about equally fast."""
AHEAD = 64
"""Channels whose inner products with all others are computed at a time: of those that are likely to go soon, the most are."""
SHRINK = 0.7
"""The matrices are cut down to what is alive when less than this fraction is."""


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


def eliminate(
    gram: Float[Tensor, "in in"] | Callable[[], Float[Tensor, "in in"]],
    weight: Float[Tensor, "out in"],
    keep: int,
    step: int = 1,
    swaps: int = 0,
) -> Elimination:
    """Greedy backward elimination of input channels down to `keep`, then swaps, then the exact refit; see `eliminations`."""
    (found,) = eliminations(gram, weight, (keep,), step, swaps)
    return found


def eliminations(
    gram: Float[Tensor, "in in"] | Callable[[], Float[Tensor, "in in"]],
    weight: Float[Tensor, "out in"],
    sizes: Sequence[int],
    step: int = 1,
    swaps: int = 0,
) -> list[Elimination]:
    """Greedy backward elimination of input channels, and at each of some sizes that it comes by, swaps and the exact refit.

    Args:
        gram: H above, symmetric positive definite; or a function that makes it, in float64 and to be overwritten: it is asked
            again for each refit, so that no more than two such matrices are held at a time.
        weight: B' above, the dense weights.
        sizes: how many channels stay, 1 to all, from many to few.
        step: how many channels go before the rest are ranked anew: 1 is the exact greedy, all of them a one-shot ranking.
        swaps: how many pairs of a kept and a removed channel may at most change places, each lowering the loss.

    Raises:
        torch.linalg.LinAlgError: the gram is not positive definite, or not finite.
    """
    inverse = made(gram)
    everything = 0.5 * quadratic(inverse, weight)
    if not math.isfinite(everything):
        raise LinAlgError("The gram or the weights are not finite.")
    factor = cholesky(inverse)
    torch.cholesky_inverse(factor, out=factor)
    survivors = list(_survivors(inverse, weight, sizes, step))
    del factor, inverse
    return [_on_survivors(gram, weight, kept, swaps, everything) for kept in survivors]


def _on_survivors(
    gram: Tensor | Callable[[], Tensor], weight: Float[Tensor, "out in"], kept: Tensor, swaps: int, everything: float
) -> Elimination:
    """The refitted weights on what an elimination left, or on what is better once some of it has changed places.

    Args:
        everything: the loss of removing everything.
    """
    refitted, loss = refit_cheaply(gram, weight, kept)
    if swaps:
        other = swapped(made(gram), weight.double().T, kept, swaps)
        refitted_other, loss_other = refit_cheaply(gram, weight, other)
        if loss_other < loss:
            kept, refitted, loss = other, refitted_other, loss_other
    return Elimination(tuple(kept.tolist()), refitted.T, loss, loss / everything if everything else 0.0)


def refit_on(
    gram: Callable[[], Float[Tensor, "in in"]], weight: Float[Tensor, "out in"], kept: Indices, inputs: Tensor
) -> Elimination:
    """The refitted weights on inputs that were chosen elsewhere.

    Args:
        kept: the units that were.
        inputs: theirs.
    """
    everything = 0.5 * quadratic(made(gram), weight)
    refitted, loss = refit_cheaply(gram, weight, inputs.to(weight.device))
    return Elimination(kept, refitted.T, loss, loss / everything if everything else 0.0)


def eliminate_groups(
    gram: Float[Tensor, "in in"], weight: Float[Tensor, "out in"], keep: int, size: int
) -> Elimination:
    """The same as `eliminate` for groups of `size` inputs that lie side by side; see `group_eliminations`."""
    (found,) = group_eliminations(gram, weight, (keep,), size)
    return found


def group_eliminations(
    gram: Float[Tensor, "in in"], weight: Float[Tensor, "out in"], sizes: Sequence[int], size: int
) -> list[Elimination]:
    """The same for groups of `size` inputs that lie side by side, such as the features of a head; one group at a time.

    Args:
        sizes: how many groups stay, from many to few.

    Returns:
        `kept` of each holds the indices of the kept groups.

    Raises:
        torch.linalg.LinAlgError: the gram is not positive definite, or not finite.
    """
    gram, dense = gram.double(), weight.double().T
    everything = 0.5 * (dense * (gram @ dense)).sum().item()
    inverse, weights = torch.cholesky_inverse(torch.linalg.cholesky(gram)), dense.clone()
    alive, found = list(range(len(gram) // size)), []
    for keep in sizes:
        while len(alive) > keep:
            groups = torch.arange(len(gram), device=gram.device).view(-1, size)[alive]
            blocks = inverse[groups[:, :, None], groups[:, None, :]]
            cost = (weights[groups] * torch.linalg.solve(blocks, weights[groups])).sum((1, 2))
            gone = groups[int(cost.argmin())]
            pull = torch.linalg.solve(inverse[gone][:, gone], inverse[gone]).T
            weights -= pull @ weights[gone]
            inverse -= pull @ inverse[gone]
            del alive[int(cost.argmin())]
        inputs = torch.arange(len(gram), device=gram.device).view(-1, size)[alive].flatten()
        refitted, loss = refit_cheaply(gram, weight, inputs)
        found.append(Elimination(tuple(alive), refitted.T, loss, loss / everything if everything else 0.0))
    return found


def _survivors(
    inverse: Float[Tensor, "in in"], weight: Float[Tensor, "out in"], sizes: Sequence[int], step: int
) -> Iterator[Tensor]:
    """Indices of the channels that greedy elimination leaves at each size, ascending.

    Args:
        inverse: inverse of the gram, which is overwritten.
    """
    sizes = list(sizes)
    if step >= len(inverse) - sizes[-1]:
        cost = _squared_norms(weight) / inverse.diagonal()
        yield from (cost.topk(keep).indices.sort().values for keep in sizes)
        return
    weights = weight.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
    indices = torch.arange(len(inverse), device=inverse.device)
    alive = torch.ones_like(indices, dtype=torch.bool)
    left = len(indices)
    for keep in sizes:
        while left > keep:
            pending = min(max(PENDING // step, 1) * step, left - keep)  # whole steps
            u, v = _eliminate_some(inverse, weights, alive, pending, step)
            left -= pending
            if left == sizes[-1]:
                break
            inverse.addmm_(u.T, u, alpha=-1)
            weights.addmm_(v.T, u, alpha=-1)
            if left < SHRINK * len(alive):
                inverse, weights = packed(inverse, alive, alive), packed(weights, None, alive)
                indices, alive = indices[alive], alive[alive]
        yield indices[alive]


def _squared_norms(weights: Float[Tensor, "out n"]) -> Float[Tensor, " n"]:
    norms: Tensor = torch.linalg.vector_norm(weights, dim=0, dtype=torch.float64)
    return norms.square_()


class _Products:
    """Inner products of the weights of a channel with those of all, computed for channels that are likely to be asked for."""

    def __init__(self, weights: Float[Tensor, "out n"]) -> None:
        self._weights = weights
        self._rows: dict[int, Tensor] = {}

    def of(self, index: int, costs: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Those of a channel; if they are not known yet, then with those of the cheapest others."""
        if index not in self._rows:
            unknown = costs.clone()
            unknown[list(self._rows)] = torch.inf
            unknown[index] = -torch.inf
            chosen = unknown.topk(min(AHEAD, len(unknown)), largest=False).indices
            self._rows |= zip(chosen.tolist(), self._weights[:, chosen].T @ self._weights, strict=True)
        return self._rows[index]


def _eliminate_some(
    inverse: Float[Tensor, "n n"], weights: Float[Tensor, "out n"], alive: Bool[Tensor, " n"], count: int, step: int
) -> tuple[Float[Tensor, "count n"], Float[Tensor, "count out"]]:
    """Eliminates `count` of the channels that are `alive`, which follows in place, while the two matrices stay.

    Only three things are needed of the current inverse and weights W (a row for each channel): the inverse's diagonal, the squared
    norms of the weights' rows, and, for the channel that goes, one column of the inverse and one of the inner products `W W'`. With U
    the scaled columns of the inverse and V the scaled rows of the weights at the eliminated channels, the inverse has become
    `inverse - U U'` and the weights `W - U V`, so these columns follow from those at the start, U, V and `Q = W V'`: O(n k) for the
    k-th channel.

    Returns:
        U' and V, by which both matrices can be brought up to date.
    """
    size = len(inverse)
    u, q, v = (inverse.new_empty(count, features) for features in (size, size, len(weights)))
    diagonal = inverse.diagonal().where(alive, 1.0)
    norms = _squared_norms(weights).where(alive, torch.inf)  # what is gone costs infinitely much to remove again
    products = _Products(weights)
    queue: list[int] = []
    for k in range(count):
        cost = norms / diagonal
        if not queue:
            queue = (
                [int(cost.argmin())] if step == 1 else cost.topk(min(step, count - k), largest=False).indices.tolist()
            )
        j = queue.pop(0)
        scale = math.sqrt(diagonal[j].item())
        u_past, past = u[:k], u[:k, j].clone()
        torch.addmv(inverse[j], u_past.T, past, alpha=-1, out=u[k]).div_(scale)
        torch.addmv(products.of(j, cost), q[:k].T, past, alpha=-1, out=q[k]).div_(scale)
        torch.addmv(weights[:, j], v[:k].T, past, alpha=-1, out=v[k]).div_(scale)
        # What is lost of the norms: 2 u p - u^2 |v|^2, with p the inner products of the current weights with v.
        lost = torch.addmv(q[k], u_past.T, v[:k] @ v[k], alpha=-1).mul_(2)
        lost.sub_(u[k], alpha=torch.vdot(v[k], v[k]).item())
        norms.addcmul_(u[k], lost, value=-1)
        diagonal.addcmul_(u[k], u[k], value=-1)
        norms[j], diagonal[j], alive[j] = torch.inf, 1.0, False
    return u, v


def elimination_cost(work: Workload, features: int, keep: int, *, one_shot: bool = False, swaps: int = 0) -> Cost:
    """Eliminates inputs of a projection to the hidden states down to so many, and refits the others."""
    gone, outputs = features - keep, work.hidden
    steps, alive = 0 if one_shot else gone, (features + keep) / 2
    pending, ahead = PENDING, 2 * AHEAD
    greedy = features * (outputs + 2 * pending + ahead) + pending * outputs if steps else 0
    if gone < FEW * keep:  # columns of the inverse, and those of them that go and that stay
        refitting = outputs * (keep + 2 * gone) + 3 * features * gone
    else:
        refitting = outputs * (keep + gone) + 3 * ROWS * keep
    table = 3 * features**2 + 3 * features * outputs if swaps else 0
    return Cost(
        memory=solver_memory(work, features, max(2 * features * ROWS, greedy, refitting, table)),
        solving=4 / 3 * features**3  # the factor and the inverse
        + 2 * features**2 * outputs  # the loss of everything
        + 2 * steps * alive * (alive + 2 * outputs)  # both matrices brought up to date, and inner products
        + MATRIX_BY_VECTOR * 3 * steps * pending * alive
        + MATRIX_BY_VECTOR * 2 * swaps * features * (features + outputs)
        + min(gone, keep) ** 3 / 3
        + 2 * features * gone * outputs,
    )

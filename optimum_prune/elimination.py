"""Which inputs of a linear layer to keep, and the weights on them that change its output least.

With `X` the inputs, `B` the dense weights and `H = X'X + damping * mean(diag X'X) * I`, a set S of kept inputs leaves the loss

    min over W supported on S of  1/2 tr((W - B)' H (W - B))

Greedy backward elimination: with `inv` the inverse of H restricted to what is still alive, and W the optimal weights on it,
removing input j costs `1/2 |W_j|^2 / inv_jj`, and removing a group g of inputs `1/2 tr(W_g' inv_gg^-1 W_g)`; the cheapest goes, and
W and inv follow. Everything is float64, and every factor a Cholesky factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # documented, but not declared public

from optimum_prune.cuts import Indices

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

PATIENCE = 16
"""Channels in a row that could not be swapped with a gain before the local search ends."""
PENDING = 128
"""Eliminations kept as a low-rank factor before the matrices are brought up to date: 32 to 256 are about equally fast."""
AHEAD = 64
"""Channels whose inner products with all others are computed at a time: of those that are likely to go soon, the most are."""
SHRINK = 0.7
"""The matrices are cut down to what is alive when less than this fraction is."""
FEW = 0.25
"""Weights are refitted through the inputs that go, rather than those that stay, while they are fewer than this fraction of them."""
ROWS = 256
"""Rows of a gram, or columns of the weights, that are worked on at a time where a copy of them is needed."""


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
    return damp(gram.to(torch.float64, copy=True), damping)


def damp(gram: Float[Tensor, "in in"], damping: float) -> Float[Tensor, "in in"]:
    """The same in place, for a gram in float64."""
    mean = gram.diagonal().mean().item() or 1.0
    gram.diagonal().add_(damping * mean)
    return gram


def eliminate(
    gram: Float[Tensor, "in in"] | Callable[[], Float[Tensor, "in in"]],
    weight: Float[Tensor, "out in"],
    keep: int,
    step: int = 1,
    swaps: int = 0,
) -> Elimination:
    """Greedy backward elimination of input channels down to `keep`, then swaps, then the exact refit.

    Args:
        gram: H above, symmetric positive definite; or a function that makes it, in float64 and to be overwritten: it is asked
            again for the refit, so that no more than two such matrices are held at a time.
        weight: B' above, the dense weights.
        keep: how many channels stay, 1 to all.
        step: how many channels go before the rest are ranked anew: 1 is the exact greedy, all of them a one-shot ranking.
        swaps: how many pairs of a kept and a removed channel may at most change places, each lowering the loss.

    Raises:
        torch.linalg.LinAlgError: the gram is not positive definite, or not finite.
    """
    inverse = _made(gram)
    everything = 0.5 * _quadratic(inverse, weight)
    if not math.isfinite(everything):
        raise LinAlgError("The gram or the weights are not finite.")
    factor = cholesky(inverse)
    torch.cholesky_inverse(factor, out=factor)
    kept = _survivors(inverse, weight, keep, step)
    del factor, inverse
    refitted, loss = _refit(gram, weight, kept)
    if swaps:
        other = swapped(_made(gram), weight.double().T, kept, swaps)
        refitted_other, loss_other = _refit(gram, weight, other)
        if loss_other < loss:
            kept, refitted, loss = other, refitted_other, loss_other
    return Elimination(tuple(kept.tolist()), refitted.T, loss, loss / everything if everything else 0.0)


def cholesky(gram: Float[Tensor, "in in"]) -> Float[Tensor, "in in"]:
    """The Cholesky factor of a symmetric matrix, in its own memory: as its transpose it has the layout that LAPACK works on."""
    factor = gram.mT
    torch.linalg.cholesky(factor, out=factor)
    return factor


def solved(factor: Float[Tensor, "in in"], right: Float[Tensor, "in columns"]) -> Float[Tensor, "in columns"]:
    """`H^-1 right` by the Cholesky factor of H, which `torch.cholesky_solve` would copy."""
    half = torch.linalg.solve_triangular(factor, right, upper=False)
    found: Tensor = torch.linalg.solve_triangular(factor.mT, half, upper=True)
    return found


def _made(gram: Tensor | Callable[[], Tensor]) -> Float[Tensor, "in in"]:
    """The gram in float64, to be overwritten."""
    return gram.to(torch.float64, copy=True) if isinstance(gram, torch.Tensor) else gram()


def _quadratic(gram: Float[Tensor, "in in"], weight: Float[Tensor, "out in"]) -> float:
    """`tr(W H W')`, some of the outputs at a time."""
    parts = (some.double() for some in torch.split(weight, ROWS))
    return sum(torch.vdot((some @ gram).flatten(), some.flatten()).item() for some in parts)


def eliminate_groups(
    gram: Float[Tensor, "in in"], weight: Float[Tensor, "out in"], keep: int, size: int
) -> Elimination:
    """The same for groups of `size` inputs that lie side by side, such as the features of a head; one group at a time.

    Returns:
        `kept` holds the indices of the `keep` kept groups.

    Raises:
        torch.linalg.LinAlgError: the gram is not positive definite, or not finite.
    """
    gram, dense = gram.double(), weight.double().T
    everything = 0.5 * (dense * (gram @ dense)).sum().item()
    inverse, weights = torch.cholesky_inverse(torch.linalg.cholesky(gram)), dense.clone()
    alive = list(range(len(gram) // size))
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
    refitted, loss = _refit(gram, weight, inputs)
    return Elimination(tuple(alive), refitted.T, loss, loss / everything if everything else 0.0)


def _survivors(inverse: Float[Tensor, "in in"], weight: Float[Tensor, "out in"], keep: int, step: int) -> Tensor:
    """Indices of the channels that greedy elimination leaves, ascending.

    Args:
        inverse: inverse of the gram, which is overwritten.
    """
    if step >= len(inverse) - keep:
        cost = _squared_norms(weight) / inverse.diagonal()
        return cost.topk(keep).indices.sort().values
    weights = weight.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
    indices = torch.arange(len(inverse), device=inverse.device)
    alive = torch.ones_like(indices, dtype=torch.bool)
    left = len(indices)
    while left > keep:
        pending = min(max(PENDING // step, 1) * step, left - keep)  # whole steps
        u, v = _eliminate_some(inverse, weights, alive, pending, step)
        left -= pending
        if left == keep:
            break
        inverse.addmm_(u.T, u, alpha=-1)
        weights.addmm_(v.T, u, alpha=-1)
        if left < SHRINK * len(alive):
            inverse, weights = _packed(inverse, alive, alive), _packed(weights, None, alive)
            indices, alive = indices[alive], alive[alive]
    return indices[alive]


def _squared_norms(weights: Float[Tensor, "out n"]) -> Float[Tensor, " n"]:
    norms: Tensor = torch.linalg.vector_norm(weights, dim=0, dtype=torch.float64)
    return norms.square_()


def _packed(
    matrix: Float[Tensor, "rows n"], rows: Bool[Tensor, " rows"] | None, columns: Bool[Tensor, " n"]
) -> Float[Tensor, "left_rows left"]:
    """These of the rows, or all, and these of the columns of a matrix, moved together within its memory."""
    index = columns.nonzero().flatten()
    width, memory = len(index), matrix.view(-1)
    chosen = range(len(matrix)) if rows is None else rows.nonzero().flatten().tolist()
    for place, row in enumerate(chosen):  # a row never moves behind where it was
        memory[place * width : (place + 1) * width] = matrix[row, index]
    return memory[: len(chosen) * width].view(len(chosen), width)


class _Products:
    """Inner products of the weights of a channel with those of all, computed for channels that are likely to be asked for."""

    def __init__(self, weights: Float[Tensor, "out n"]) -> None:
        self._weights = weights
        self._rows: dict[int, Tensor] = {}

    def of(self, channel: int, costs: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Those of a channel; if they are not known yet, then with those of the cheapest others."""
        if channel not in self._rows:
            unknown = costs.clone()
            unknown[list(self._rows)] = torch.inf
            unknown[channel] = -torch.inf
            chosen = unknown.topk(min(AHEAD, len(unknown)), largest=False).indices
            self._rows |= zip(chosen.tolist(), self._weights[:, chosen].T @ self._weights, strict=True)
        return self._rows[channel]


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


def _refit(
    gram: Tensor | Callable[[], Tensor], weight: Float[Tensor, "out in"], kept: Tensor
) -> tuple[Float[Tensor, "kept out"], float]:
    """`refit` or `refit_by_factor`, whichever is cheaper."""
    if weight.shape[1] - len(kept) >= FEW * len(kept):
        return refit(_made(gram), weight, kept)
    return refit_by_factor(cholesky(_made(gram)), weight, kept)


def refit(
    gram: Float[Tensor, "in in"], weight: Float[Tensor, "out in"], kept: Tensor
) -> tuple[Float[Tensor, "kept out"], float]:
    """The weights on `kept` that minimise the loss, and the loss: with D what is gone, `B_S + H_SS^-1 H_SD B_D`.

    Args:
        gram: H, which is overwritten: no matrix is needed beside it but weights.
    """
    alive = torch.zeros(len(gram), dtype=torch.bool, device=gram.device)
    alive[kept] = True
    lost = weight[:, ~alive].double().T
    pull, loss = gram.new_empty(len(kept), len(weight)), 0.0
    # Of each input, its place among those that stay, or among those that go.
    place = torch.where(alive, alive.cumsum(0), (~alive).cumsum(0)) - 1
    for rows, lives, places in zip(
        torch.split(gram, ROWS), torch.split(alive, ROWS), torch.split(place, ROWS), strict=True
    ):
        reached = rows[:, ~alive] @ lost
        pull[places[lives]] = reached[lives]
        loss += torch.vdot(reached[~lives].flatten(), lost[places[~lives]].flatten()).item()
    del lost
    factor = cholesky(_packed(gram, alive, alive))
    for some, pulled in zip(torch.split(weight, ROWS), torch.split(pull, ROWS, dim=1), strict=True):
        correction = solved(factor, pulled)
        loss -= torch.vdot(pulled.flatten(), correction.flatten()).item()
        pulled.copy_(correction.add_(some[:, alive].double().T))
    return pull, max(0.5 * loss, 0.0)


def refit_by_factor(
    factor: Float[Tensor, "in in"], weight: Float[Tensor, "out in"], kept: Tensor
) -> tuple[Float[Tensor, "kept out"], float]:
    """The same from the Cholesky factor of H, cheaper where little is gone: with P the inverse of H, `B_S - P_SD P_DD^-1 B_D`."""
    alive = torch.zeros(len(factor), dtype=torch.bool, device=factor.device)
    alive[kept] = True
    lost = weight[:, ~alive].double().T
    units = factor.new_zeros(len(factor), len(lost))
    units[(~alive).nonzero().flatten(), torch.arange(len(lost), device=factor.device)] = 1
    inverse = solved(factor, units)
    share = solved(cholesky(inverse[~alive]), lost)
    loss = 0.5 * torch.vdot(lost.flatten(), share.flatten()).item()
    return weight[:, alive].double().T.addmm_(inverse[alive], share, alpha=-1), loss


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

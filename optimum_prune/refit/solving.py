"""Weights of a linear layer on some of its inputs that change its output least, solved for in float64 by Cholesky factors.

With `X` the inputs, `B` the dense weights and `H = X'X + damping * mean(diag X'X) * I`, a set S of kept inputs leaves the loss

    min over W supported on S of  1/2 tr((W - B)' H (W - B))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

from optimum_prune.anatomy.workload import Workload
from optimum_prune.calibration.statistics import active_of

FEW = 0.25
"""Weights are refitted through the inputs that go, rather than those that stay, while they are fewer than this fraction of them."""
ROUNDING = 1e-6
"""No less is added, relative to the mean: sums in float32 are no more exact."""
ROWS = 256
"""Rows of a gram, or columns of the weights, that are worked on at a time where a copy of them is needed."""


class OfMedian(float):
    """A damping that is relative to the median of a gram's diagonal, and not to its mean.

    In some layers of most models a few inputs are hundreds of times as large as all others, and so is the mean: nothing but these would be
    refitted. The median is that of inputs that are not always 0.
    """


def damped(gram: Float[Tensor, "in in"], damping: float) -> Float[Tensor, "in in"]:
    """`X'X + damping * mean(diag X'X) * I` in float64; for a gram of zeros, as if its mean were 1."""
    return damp(gram.to(torch.float64, copy=True), damping)


def damp(gram: Float[Tensor, "in in"], damping: float) -> Float[Tensor, "in in"]:
    """The same in place, for a gram in float64."""
    diagonal = gram.diagonal()
    mean = diagonal.mean().item() or 1.0
    active = active_of(diagonal)
    if isinstance(damping, OfMedian) and len(active):
        diagonal.add_(max(damping * active.median().item(), ROUNDING * mean))
    else:
        diagonal.add_(damping * mean)
    return gram


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


def made(gram: Tensor | Callable[[], Tensor]) -> Float[Tensor, "in in"]:
    """The gram in float64, to be overwritten."""
    return gram.to(torch.float64, copy=True) if isinstance(gram, torch.Tensor) else gram()


def quadratic(gram: Float[Tensor, "in in"], weight: Float[Tensor, "out in"]) -> float:
    """`tr(W H W')`, some of the outputs at a time."""
    parts = (some.double() for some in torch.split(weight, ROWS))
    return sum(torch.vdot((some @ gram).flatten(), some.flatten()).item() for some in parts)


def packed(
    matrix: Float[Tensor, "rows n"], rows: Bool[Tensor, " rows"] | None, columns: Bool[Tensor, " n"]
) -> Float[Tensor, "left_rows left"]:
    """These of the rows, or all, and these of the columns of a matrix, moved together within its memory."""
    index = columns.nonzero().flatten()
    width, memory = len(index), matrix.view(-1)
    chosen = range(len(matrix)) if rows is None else rows.nonzero().flatten().tolist()
    for place, row in enumerate(chosen):  # a row never moves behind where it was
        memory[place * width : (place + 1) * width] = matrix[row, index]
    return memory[: len(chosen) * width].view(len(chosen), width)


def refit_cheaply(
    gram: Tensor | Callable[[], Tensor], weight: Float[Tensor, "out in"], kept: Tensor
) -> tuple[Float[Tensor, "kept out"], float]:
    """`refit` or `refit_by_factor`, whichever is cheaper."""
    if weight.shape[1] - len(kept) >= FEW * len(kept):
        return refit(made(gram), weight, kept)
    return refit_by_factor(cholesky(made(gram)), weight, kept)


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
    factor = cholesky(packed(gram, alive, alive))
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


def solver_memory(work: Workload, features: int, weights: float) -> float:
    """Bytes of a gram, the same in float64, and so many numbers in float64 besides; at first, all of the gram is read."""
    return 8 * features**2 + max(work.in_memory(4 * features**2) + 8 * weights, 4 * features**2)

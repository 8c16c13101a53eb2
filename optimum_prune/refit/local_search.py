"""Local search behind a greedy elimination: pairs of a kept and a removed input change places where the loss falls."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


PATIENCE = 16
"""Channels in a row that could not be swapped with a gain before the local search ends."""


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

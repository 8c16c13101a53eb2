"""Least-squares problems with solutions by the definition, against which the fast solvers are compared."""

from __future__ import annotations

import torch
from torch import Tensor

from optimum_prune.refit.solving import damped


def problem(size: int, tokens: int, outputs: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Gram of correlated activations and weights, `[out, in]`, whose channels differ in importance."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    activations = normal(tokens, size) + normal(tokens, size // 4) @ normal(size // 4, size)
    return damped(activations.T @ activations, 0.01), normal(outputs, size) * normal(size).exp()


def objective(gram: Tensor, dense: Tensor, weight: Tensor) -> float:
    change = weight - dense
    return 0.5 * torch.trace(change.T @ gram @ change).item()


def least_squares(gram: Tensor, dense: Tensor, kept: tuple[int, ...]) -> tuple[Tensor, float]:
    """`min |A W - A B|` over W supported on `kept`, where `A'A` is the gram."""
    root = torch.linalg.cholesky(gram).T
    weight = torch.zeros_like(dense)
    weight[list(kept)] = torch.linalg.lstsq(root[:, list(kept)], root @ dense).solution
    return weight, objective(gram, dense, weight)


def naive(gram: Tensor, dense: Tensor, keep: int, step: int) -> tuple[int, ...]:
    """The greedy, with every inverse and every weight computed afresh after each removal."""
    alive = list(range(len(gram)))
    while len(alive) > keep:
        inverse = torch.linalg.inv(gram[alive][:, alive])
        weight = inverse @ (gram @ dense)[alive]
        cost = weight.square().sum(1) / inverse.diagonal()
        cheapest = cost.argsort()[: min(step, len(alive) - keep)].tolist()
        alive = [channel for position, channel in enumerate(alive) if position not in cheapest]
    return tuple(alive)


def inputs_of(groups: tuple[int, ...], size: int) -> list[int]:
    return [group * size + feature for group in groups for feature in range(size)]


def naive_groups(gram: Tensor, dense: Tensor, keep: int, size: int) -> tuple[int, ...]:
    """The greedy over groups: each candidate is tried, by least squares on what would be left."""
    alive = list(range(len(gram) // size))
    while len(alive) > keep:
        rests = [[group for group in alive if group != gone] for gone in alive]
        alive = min(rests, key=lambda rest: least_squares(gram, dense, tuple(inputs_of(tuple(rest), size)))[1])
    return tuple(alive)

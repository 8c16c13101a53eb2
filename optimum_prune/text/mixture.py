"""Which windows of which domains a step of training takes: drawn by weights, each window of a domain once before any comes again."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

GOLDEN = (math.sqrt(5) - 1) / 2
"""Multiples of it, less their whole part, lie as evenly between 0 and 1 as any numbers do."""


class Mixture:
    """The order in which the windows of some domains are trained on, step by step. It goes on from its state to the same windows.

    Args:
        sizes: how many windows each domain has.
        weights: how much of a step each domain is.
        windows: of a step.
        seed: of every random choice.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], windows: int, seed: int) -> None:
        self._sizes = tuple(sizes)
        self._windows = windows
        self._seed = seed
        self.weights = list(weights)
        self._step = 0
        self._before = [0] * len(sizes)
        self._taken: list[tuple[int, int]] | None = None
        self._orders: dict[int, tuple[int, Tensor]] = {}

    def of_step(self, step: int) -> list[tuple[int, int]]:
        """The windows of a step, each as its domain and its number in it.

        Steps are asked for in order, each as often as wanted; what a step takes is settled when it is first asked for.
        """
        while self._step < step or self._taken is None:
            if self._taken is not None:
                self._step, self._before = self._step + 1, self._behind()
            self._taken = self._draw()
        return self._taken

    def _behind(self) -> list[int]:
        """How many windows of each domain have been taken after the step at hand."""
        counts = Counter(domain for domain, _ in self._taken or ())
        return [before + counts[domain] for domain, before in enumerate(self._before)]

    def _draw(self) -> list[tuple[int, int]]:
        """The windows of the step at hand, by the weights as they are."""
        drawn = list(self._before)
        bounds = torch.tensor(self.weights, dtype=torch.float64).cumsum(0)
        offset = torch.rand((), generator=self._generator(0, 0), dtype=torch.float64).item()
        taken = []
        for number in range(self._step * self._windows, (self._step + 1) * self._windows):
            point = (offset + number * GOLDEN) % 1.0 * bounds[-1]
            domain = min(int(torch.searchsorted(bounds, point, right=True)), len(self._sizes) - 1)
            taken.append((domain, self._window(domain, drawn[domain])))
            drawn[domain] += 1
        return taken

    def _window(self, domain: int, count: int) -> int:
        """The window of a domain that comes after so many of it."""
        round, place = divmod(count, self._sizes[domain])
        if self._orders.get(domain, (None,))[0] != round:
            order = torch.randperm(self._sizes[domain], generator=self._generator(domain + 1, round))
            self._orders[domain] = round, order
        return int(self._orders[domain][1][place])

    def _generator(self, domain: int, round: int) -> torch.Generator:
        return torch.Generator().manual_seed(hash((self._seed, domain, round)) % 2**63)

    def state(self) -> dict[str, Any]:
        """Plain data, from which `load` goes on with the step that comes next."""
        step = self._step if self._taken is None else self._step + 1
        return {"step": step, "before": self._behind(), "weights": list(self.weights)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state."""
        self._step, self._before, self.weights = state["step"], list(state["before"]), list(state["weights"])
        self._taken = None

"""What passes accumulate over tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optimum_prune.anatomy.workload import Cost, Workload
from optimum_prune.machine import processes
from optimum_prune.machine.activation_store import ActivationStore, InMemory

if TYPE_CHECKING:
    from jaxtyping import Float

BLOCK = 512
"""A gram is symmetric, so only the blocks on and above its diagonal are computed; smaller ones multiply more slowly."""
MASSIVE = 100
"""Inputs are massive where their mean square is so many times the median one: 600 times in one layer of SmolLM2-135M, and 21 times in the next."""


@contextmanager
def _multiplied_as(dtype: torch.dtype) -> Iterator[None]:
    """Lets a CPU multiply float32 numbers that are bfloat16 in truth by its faster bfloat16 products, summed in float32.

    The products are exact, so nothing is lost; where a CPU has no such products, nothing changes.
    """
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # documented, but not declared
    before = settings.fp32_precision
    if dtype == torch.bfloat16:
        settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def solving_device(device: torch.device) -> torch.device:
    """Where float64 is computed of what is on a device: there, or on the CPU where a device (Apple's mps) has none."""
    return torch.device("cpu") if device.type == "mps" else device


def active_of(diagonal: Float[Tensor, " features"]) -> Float[Tensor, " active"]:
    """Of a gram's diagonal, the entries of inputs that are not always 0."""
    return diagonal[diagonal > 0]


class Gram:
    """`X'X` of the activations at one place, summed over tokens, in float32 whatever the dtype of the activations.

    Products of two bfloat16 or float16 values are exact in float32, so only the sum is rounded. Whatever is read of it is the sum over
    all processes as well, so every process has to read it, and add nothing afterwards.

    Args:
        store: where the sum is kept; in memory if not given.
    """

    def __init__(self, features: int, device: torch.device, store: ActivationStore | None = None) -> None:
        self._store = store or InMemory()
        self._upper = self._store.store(
            torch.zeros(features, features, device=device)
        )  # left of the diagonal blocks it stays 0
        self.features = features
        self._solving = solving_device(device)
        self._sum = torch.zeros(features + 1, dtype=torch.float64, device=self._solving)  # the last counts tokens
        self._summed = False

    def add(self, activations: Float[Tensor, "tokens features"]) -> None:
        """Adds the outer products of these rows."""
        rows = activations.to(torch.float32)
        with _multiplied_as(activations.dtype):
            for start in range(0, rows.shape[1], BLOCK):
                columns = rows[:, start : start + BLOCK]
                self._upper[start : start + BLOCK, start:].addmm_(columns.T, rows[:, start:])
        self._sum[:-1] += rows.sum(0).to(self._solving)
        self._sum[-1] += len(rows)
        self._store.release(self._upper)

    def _complete(self) -> None:
        """Adds what other processes have, once."""
        if self._summed or processes.size() == 1:
            return
        self._summed = True
        for start in range(0, self.features, BLOCK):
            block = self._upper[start : start + BLOCK, start:]
            block.copy_(processes.all_sum(block.contiguous()))
        self._sum = processes.all_sum(self._sum)

    @property
    def tokens(self) -> int:
        """How many rows were added."""
        self._complete()
        return int(self._sum[-1])

    @property
    def mean(self) -> Float[Tensor, " features"]:
        """The mean activation, float64; 0 if there was no token."""
        tokens = self.tokens
        return self._sum[:-1] / max(tokens, 1)

    @property
    def massive(self) -> bool:
        """Whether a few inputs carry nearly all there is: those by which a layer makes the massive activations that others attend to."""
        self._complete()
        active = active_of(self._upper.diagonal())
        return bool(len(active) and active.mean() > MASSIVE * active.median())

    @property
    def centered(self) -> Float[Tensor, "features features"]:
        """The gram of the activations less their mean, float64."""
        return self.exact.addr_(self.mean, self.mean, alpha=-self.tokens)

    @property
    def exact(self) -> Float[Tensor, "features features"]:
        """The gram so far, in float64."""
        return self._whole(torch.float64)

    @property
    def value(self) -> Float[Tensor, "features features"]:
        """The gram so far."""
        return self._whole(torch.float32)

    def _whole(self, dtype: torch.dtype) -> Float[Tensor, "features features"]:
        """With what lies below the diagonal filled in, block by block: no other matrix of this size is needed."""
        self._complete()
        whole = self._upper.to(self._solving).to(dtype, copy=True)
        for start in range(0, self.features, BLOCK):
            end = start + BLOCK
            block = whole[start:end, start:end]
            block.copy_(block.triu() + block.triu(1).T)
            whole[end:, start:end] = whole[start:end, end:].T
        self._store.release(self._upper)
        return whole


class SquaredNorms:
    """`||X_j||^2` of each feature of the activations at one place, summed over tokens, and when it is read, over processes; float64."""

    def __init__(self, features: int, device: torch.device) -> None:
        self._solving = solving_device(device)
        self._sum = torch.zeros(features + 1, dtype=torch.float64, device=self._solving)  # the last counts tokens
        self._summed = False

    def add(self, activations: Float[Tensor, "tokens features"]) -> None:
        """Adds these rows."""
        self._sum[:-1] += activations.float().square().sum(0).to(self._solving)
        self._sum[-1] += len(activations)

    def _complete(self) -> None:
        """Adds what other processes have, once."""
        if not self._summed:
            self._summed, self._sum = True, processes.all_sum(self._sum)

    @property
    def tokens(self) -> int:
        """How many rows were added."""
        self._complete()
        return int(self._sum[-1])

    @property
    def value(self) -> Float[Tensor, " features"]:
        """The sums so far."""
        self._complete()
        return self._sum[:-1]


class Cross:
    """`X'E` of activations and of what is lacking elsewhere, summed over tokens, and when it is read, over processes."""

    def __init__(self, features: int, lacking: int, device: torch.device) -> None:
        self._value = torch.zeros(features, lacking, device=device)
        self._solving = solving_device(device)
        self._sum = torch.zeros(lacking + 1, dtype=torch.float64, device=self._solving)  # the last counts tokens
        self._summed = False

    def add(self, activations: Float[Tensor, "tokens features"], lack: Float[Tensor, "tokens lacking"]) -> None:
        """Adds the outer products of these rows."""
        self._value.addmm_(activations.float().T, lack.float())
        self._sum[:-1] += lack.sum(0).to(self._solving)
        self._sum[-1] += len(lack)

    def _complete(self) -> None:
        """Adds what other processes have, once."""
        if not self._summed:
            self._summed = True
            self._value, self._sum = processes.all_sum(self._value), processes.all_sum(self._sum)

    @property
    def tokens(self) -> int:
        """How many rows were added."""
        self._complete()
        return int(self._sum[-1])

    @property
    def mean(self) -> Float[Tensor, " lacking"]:
        """The mean of what is lacking, float64."""
        tokens = self.tokens
        return self._sum[:-1] / max(tokens, 1)

    @property
    def value(self) -> Float[Tensor, "features lacking"]:
        """The products so far, float64."""
        self._complete()
        return self._value.to(self._solving).double()

    def centered(self, gram: Gram) -> Float[Tensor, "features lacking"]:
        """Those of the activations less their mean, which is that of their gram."""
        return self.value - self.tokens * torch.outer(gram.mean, self.mean)


def gram_memory(work: Workload, features: int, tokens: int | None = None) -> float:
    """Bytes of a gram while it is summed: the sum, and a batch of activations in float32."""
    rows = 0 if work.itemsize == 4 else (work.batch if tokens is None else tokens) * features * 4
    return 4 * features**2 + rows


def gram_cost(work: Workload, features: int, tokens: float | None = None) -> Cost:
    """Sums a gram over so many tokens, all if not given; what is computed are the blocks on and above its diagonal."""
    return Cost(statistics=(work.tokens if tokens is None else tokens) * features * (features + min(BLOCK, features)))

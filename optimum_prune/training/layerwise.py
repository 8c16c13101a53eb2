"""Blocks of decoder layers trained one by one: each on what reaches it in the pruned model, towards what the dense model has there.

No gradient passes through the model, so it takes the memory of one layer (LaCo, Layer-wise Compensation; Muralidharan et al. tune
blocks likewise, arXiv 2407.14679). The loss is the relative squared error of the hidden states behind the block, token by token:
one token of enormous activations counts as much as any other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optimum_prune.calibration.visit import LayerVisit
from optimum_prune.machine import processes
from optimum_prune.training.losses import relative_error
from optimum_prune.training.schedule import rate_share
from optimum_prune.training.student import masked

if TYPE_CHECKING:
    from jaxtyping import Float

RATES = (1e-4, 3e-4, 1e-3)
"""Learning rates that are tried if none is given."""
TRIED = 0.1
"""Of the steps, the part after which learning rates are compared."""
NOTHING = 1e-8
"""An error that is none: in front of the first gap, both models compute the same."""
LOOKS = 5
"""How often the held-out error is measured while a block is trained."""
WARMUP = 0.1
"""Of the steps, the part in which the learning rate grows."""
BETAS = (0.9, 0.95)
FUSED = ("cpu", "cuda")
"""Devices on which a step of AdamW needs no memory besides its averages."""

Weights = Mapping[str, Tensor]
"""By their paths from the layer."""


@dataclass(frozen=True)
class Teaching:
    """How a block is trained."""

    steps: int
    rate: float | None
    """Learning rate; None to choose it by the held-out error."""
    held_out: int
    """How many batches, at the end of the stream, are not trained on."""
    zeros_stay: bool = True
    """Whether the zeros of a matrix of which many are zero stay zero."""
    seed: int = 0


@dataclass(frozen=True)
class Taught:
    """A block that was trained."""

    weights: Weights
    """Of its parameters, in their own dtype; none where it is best as it was."""
    rate: float
    before: float
    """The error on the batches that it was not trained on."""
    after: float


def teach(visit: LayerVisit, block: str, goals: Sequence[Float[Tensor, "w t h"]], teaching: Teaching) -> Taught:
    """Trains the parameters of a block, and of the norms around it, towards hidden states behind it, batch by batch."""
    lesson = _Lesson(visit, block, goals, teaching)
    start = lesson.parameters()
    before = lesson.error(start)
    if before <= NOTHING:
        return Taught({}, 0.0, before, before)
    rate = lesson.best_rate(start) if teaching.rate is None else teaching.rate
    best: Weights = {}
    after = before
    dtypes = {name: value.dtype for name, value in visit.layer.module.named_parameters()}
    for weights in lesson.training(start, rate, teaching.steps, looks=LOOKS):
        error = lesson.error(weights)
        if error < after:
            best = {}  # before the next: it is as large as what is trained
            best, after = {name: value.detach().to(dtypes[name], copy=True) for name, value in weights.items()}, error
    return Taught(best, rate, before, after)


class _Lesson:
    """A block, its goals, and which batches it is trained on."""

    def __init__(self, visit: LayerVisit, block: str, goals: Sequence[Tensor], teaching: Teaching) -> None:
        self._visit = visit
        self._block = block
        self._goals = goals
        self._teaching = teaching
        blocks = visit.layer.blocks
        for earlier in blocks[: blocks.index(block)]:
            visit.activations.release(*visit.behind(earlier))  # the visit remembers what the block puts out
        count = len(goals)
        self._held = range(count - teaching.held_out, count)
        self._taught = range(count - teaching.held_out)

    def parameters(self) -> dict[str, Tensor]:
        """Copies of the weights through which the block acts, in float32."""
        every = {
            name: value.detach().requires_grad_()
            for name, value in self._visit.layer.module.named_parameters()
            if value.is_floating_point()
        }
        loss = self._loss(every, self._taught[0])
        gradients = torch.autograd.grad(loss, list(every.values()), allow_unused=True)
        acting = [name for name, gradient in zip(every, gradients, strict=True) if gradient is not None]
        del gradients, loss  # before there are copies
        return {name: every[name].detach().float().clone() for name in acting}

    @torch.no_grad()
    def error(self, weights: Weights) -> float:
        """The mean relative squared error on the batches that are held out."""
        losses = [self._loss(weights, position).item() for position in self._held]
        total, count = processes.all_sums([sum(losses), len(losses)])
        return total / count

    def best_rate(self, start: Weights) -> float:
        """Of the learning rates, the one that leaves the smallest error after a few steps."""
        steps, tried = max(1, int(TRIED * self._teaching.steps)), {}
        for rate in RATES:
            copies = {name: value.clone() for name, value in start.items()}
            *_, weights = self.training(copies, rate, steps, looks=1)
            tried[rate] = self.error(weights)
        return min(tried, key=lambda rate: tried[rate] if math.isfinite(tried[rate]) else math.inf)

    def training(self, start: Weights, rate: float, steps: int, looks: int) -> Iterator[Weights]:
        """Trains in so many steps, in place, and yields the weights so many times, at last at the end."""
        weights = {name: value.requires_grad_() for name, value in start.items()}
        fused = all(value.device.type in FUSED for value in weights.values())
        optimizer = torch.optim.AdamW(weights.values(), lr=rate, betas=BETAS, weight_decay=0.0, fused=fused)
        warmup = max(1, int(WARMUP * steps)) / steps
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: rate_share(step / steps, warmup, 1 / steps)
        )
        order, there = self._order(steps), masked(weights) if self._teaching.zeros_stay else {}
        shown = {math.ceil(steps * look / looks) for look in range(1, looks + 1)}
        for step, position in enumerate(order, start=1):
            optimizer.zero_grad()
            torch.autograd.backward(self._loss(weights, position))
            _average(weights.values())
            optimizer.step()
            schedule.step()
            for name, mask in there.items():
                weights[name].data.mul_(mask)
            if step in shown:
                yield weights

    def _order(self, steps: int) -> Iterator[int]:
        """The batches to train on, each as often as any other, at random."""
        generator = torch.Generator().manual_seed(self._teaching.seed)
        order: list[int] = []
        for _ in range(steps):
            order = order or torch.randperm(len(self._taught), generator=generator).tolist()
            yield self._taught[order.pop()]

    def _loss(self, weights: Weights, position: int) -> Tensor:
        """The mean relative squared error over the tokens of a batch, without padding."""
        batch, _ = self._visit.stream[position]
        found = self._visit.behind_with(weights, self._block, position)
        return relative_error(batch.unpadded(found), batch.unpadded(self._goals[position]))


def _average(values: Iterable[Tensor]) -> None:
    """Makes the gradients of this process the mean over all of the run."""
    if processes.size() == 1:
        return
    for value in values:
        if value.grad is not None:
            value.grad = processes.all_sum(value.grad) / processes.size()

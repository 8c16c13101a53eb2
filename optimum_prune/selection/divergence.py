"""What a change of one layer costs a model, measured as the divergence of its predictions from those of the model as it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from optimum_prune.anatomy.shape import ATTENTION, FEED_FORWARD, Shape
from optimum_prune.anatomy.workload import Cost, Workload
from optimum_prune.calibration.stream import Batch, logits, run_layers
from optimum_prune.evaluation.losses import Reference, losses_cost
from optimum_prune.machine import processes
from optimum_prune.surgery.operation import changed_layer

if TYPE_CHECKING:
    from torch import Tensor, nn

    from optimum_prune.anatomy.decoder import Decoder
    from optimum_prune.calibration.calibration import Calibration
    from optimum_prune.calibration.visit import LayerVisit
    from optimum_prune.surgery.cuts import Decision
    from optimum_prune.text.windows import Windows

HELD_OUT = 4
"""Windows on which costs are measured, at most: nothing is fitted to them."""
LENGTH = 512
"""Tokens of such a window that are used, at most."""
SHORT = 4
"""Of a window, predictions are compared at so many tokens at least."""
STRIDE = 2
"""Predictions are compared at every second token: neighbours tell nearly the same, and the head is dear."""


def held_out_of(windows: int, most: int | None = None) -> int:
    """How many of so many windows are measured on: at most `HELD_OUT`, or whatever is given."""
    return min(most or HELD_OUT, max(windows // 4, 1))


def split(windows: Windows, most: int | None = None, length: int | None = None) -> tuple[Windows, Windows]:
    """Windows to fit to, and others to measure on; with a single window, it serves for both.

    Args:
        most: to measure on, at most; `HELD_OUT` if not given.
        length: tokens of these that are used, at most; `LENGTH` if not given.
    """
    held_out = held_out_of(len(windows), most)
    fitted = slice(0, max(len(windows) - held_out, 1))
    return windows.part(fitted), windows.part(slice(len(windows) - held_out, None), slice(length or LENGTH))


class Divergence:
    """How far a model's predictions diverge from its own once one of its layers is changed, in nats for each token."""

    @torch.no_grad()
    def __init__(self, decoder: Decoder, calibration: Calibration, stride: int = STRIDE) -> None:
        self._decoder = decoder
        self._layers = range(len(decoder))
        self._stride = min(stride, max(calibration.windows.length // SHORT, 1))
        self._tokens = int(calibration.mask[:, :: self._stride].sum())
        self._ends = [run_layers(decoder, batch, hidden, self._layers) for batch, hidden in calibration.embed(decoder)]

    @torch.no_grad()
    def of(self, visit: LayerVisit, decisions: Sequence[Decision], skipped: Sequence[int] = ()) -> list[float]:
        """What each decision about the visited layer would cost; nothing is changed.

        Args:
            skipped: of each decision, how many layers right behind the visited one go as well; none if not given.
        """
        totals = [0.0] * len(decisions)
        layers = [changed_layer(self._decoder, decision, visit.index) for decision in decisions]
        skips = skipped or [0] * len(layers)
        for (batch, hidden), end in zip(visit.stream, self._ends, strict=True):
            ends = [
                self._run(batch, layer, visit.index, skip, hidden) for layer, skip in zip(layers, skips, strict=True)
            ]
            totals = self._added(totals, batch, end, ends)
        return [total / self._tokens for total in processes.all_sums(totals)]

    @torch.no_grad()
    def of_model(self, other: Decoder, calibration: Calibration) -> float:
        """What a whole model costs that was made of this one, on the same windows."""
        total, layers = 0.0, range(len(other))
        for (batch, hidden), end in zip(calibration.embed(other), self._ends, strict=True):
            behind = run_layers(other, batch, hidden, layers)
            pieces = zip(self._logits(self._decoder, batch, end), self._logits(other, batch, behind), strict=True)
            total += sum(Reference(piece).divergence(others) for piece, others in pieces)
        return processes.all_sums([total])[0] / self._tokens

    def _added(self, totals: list[float], batch: Batch, end: Tensor, ends: Sequence[Tensor]) -> list[float]:
        for pieces in zip(*(self._logits(self._decoder, batch, each) for each in (end, *ends)), strict=True):
            reference = Reference(pieces[0])
            totals = [total + reference.divergence(piece) for total, piece in zip(totals, pieces[1:], strict=True)]
        return totals

    def _logits(self, decoder: Decoder, batch: Batch, hidden: Tensor) -> Iterator[Tensor]:
        """Window by window, where tokens count."""
        strided = Batch(batch.tokens[:, :: self._stride], batch.mask[:, :: self._stride], ())
        for one, part in strided.split(hidden[:, :: self._stride]):
            yield logits(decoder, one, part)[one.mask]

    def _run(self, batch: Batch, layer: nn.Module, index: int, skip: int, hidden: Tensor) -> Tensor:
        behind = batch.run(layer, index, hidden)
        return run_layers(self._decoder, batch, behind, self._layers[index + 1 + skip :])


def trial_workloads(work: Workload) -> tuple[Workload, Workload]:
    """The workloads of the windows to fit to, and of those to measure on."""
    few = work.on(min(HELD_OUT, work.windows), min(LENGTH, work.length))
    return replace(work, windows=max(work.windows - few.windows, 1)), few


def trial_cost(
    fitted: Workload, few: Workload, shape: Shape, index: int, decisions: Sequence[tuple[Cost, int]]
) -> Cost:
    """What it takes to measure a layer once it is changed.

    Args:
        decisions: what it takes to make one of several decisions of a kind, and how many there are of it.
    """
    layer, behind = shape.layers[index], shape.layers[index + 1 :]
    costs = [fitted.run(layer, fitted.tokens)]
    for cost, number in decisions:
        count = number + 1
        copies = count * (fitted.layer(layer) + fitted.itemsize * fitted.hidden * layer.width(FEED_FORWARD))
        runs = few.run_all(behind, few.tokens, count)
        runs = runs.followed_by(losses_cost(few, few.tokens / STRIDE, few.length, count))
        observed = fitted.observed(layer, ATTENTION)
        costs += [cost.times(number), runs.with_memory(copies + observed)]
    return replace(Cost().followed_by(*costs), left=0.0)

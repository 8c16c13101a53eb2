"""Which experts of a mixture its output needs least.

`score` tells how much an expert matters, over the calibration tokens that are routed to it; the lowest go:

- `reap`: the mean of the router's weight times the norm of the expert's output (REAP, Lasby et al., arXiv 2510.13999). Where the router
  normalises the weights of those it chose, that is the weight afterwards.
- `frequency`: how many tokens are routed to it.
- `mean_output`: how badly its mean output would stand for it: the fraction of tokens times the variance of its outputs (MoNE, arXiv
  2507.00390). The mean itself is nowhere put in its place, since experts have no bias to hold it in these architectures.

Tokens then go to the next best of those that stay. Where the router divides experts into groups, as many stay of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from optimum_prune.anatomy.matrices import mixture_of
from optimum_prune.anatomy.shape import LayerShape
from optimum_prune.anatomy.workload import Cost, Workload
from optimum_prune.calibration.statistics import solving_device
from optimum_prune.machine import processes
from optimum_prune.surgery.cuts import Cuts, Decision

if TYPE_CHECKING:
    from optimum_prune.calibration.stream import Batch
    from optimum_prune.calibration.visit import LayerVisit

AXIS = "whole_experts"


def best_members(visit: LayerVisit, counts: Sequence[int], score: str) -> list[Decision]:
    """How each of some numbers of experts of a layer is reached."""
    seen, parts = _seen(visit), visit.layer.axes[AXIS].parts
    scores = seen.scores(score)
    evidence = {"layer": visit.index, "scores": scores.tolist(), "tokens": seen.tokens.int().tolist()}
    return [
        Decision(
            Cuts.along(AXIS, {visit.index: _highest(scores, count, parts)}),
            evidence={"experts": count, **evidence},
        )
        for count in counts
    ]


def _highest(scores: Tensor, keep: int, parts: int) -> tuple[int, ...]:
    """The experts with the highest scores, as many of each part; of those that are alike, the first."""
    size = len(scores) // parts
    chosen = scores.view(parts, size).sort(dim=1, descending=True, stable=True).indices[:, : keep // parts]
    return tuple(sorted((chosen + size * torch.arange(parts)[:, None]).flatten().tolist()))


@dataclass(frozen=True)
class _Seen:
    """What is known of the experts of a layer, float64."""

    tokens: Tensor
    """That are routed to each."""
    weighted: Tensor
    """The norms of its outputs, weighted as the router weights them, summed over these."""
    squares: Tensor
    """The squares of these norms, unweighted, summed."""
    outputs: Tensor
    """Its outputs, summed, with shape (experts, hidden)."""

    def scores(self, score: str) -> Tensor:
        """How much each matters; 0 for one that no token was routed to."""
        count = self.tokens.clamp(min=1)
        if score == "reap":
            return self.weighted / count
        if score == "frequency":
            return self.tokens / self.tokens.sum().clamp(min=1)
        variance = self.squares / count - (self.outputs / count[:, None]).square().sum(1)
        return self.tokens / self.tokens.sum().clamp(min=1) * variance.clamp(min=0)


def _seen(visit: LayerVisit) -> _Seen:
    """Runs a layer as it is, and looks at what each of its experts puts out."""
    mixture, axis = mixture_of(visit.layer), visit.layer.axes[AXIS]
    assert mixture is not None
    count, hidden = axis.units, visit.layer.config.hidden_size
    found = torch.zeros(count, hidden + 3, dtype=torch.float64)

    def hear(batch: Batch, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        for number, made, weights in mixture.outputs(module, args, kwargs, batch.mask):
            outputs = made.float()
            norms = outputs.norm(dim=1)
            about = torch.stack([norms.new_tensor(float(len(norms))), (weights * norms).sum(), norms.square().sum()])
            summed = torch.cat([about, outputs.sum(0)])
            found[number] += summed.to(solving_device(summed.device)).double().cpu()

    visit.listen([(mixture.module, hear)])
    tokens, weighted, squares, *_ = (summed := processes.all_sum(found)).unbind(1)
    return _Seen(tokens, weighted, squares, summed[:, 3:])


def seeing_cost(work: Workload, layer: LayerShape) -> Cost:
    """The layer runs, and its experts once more."""
    return work.run(layer, work.tokens, 2)

"""Depth pruning: leave out whole decoder layers.

Of all windows of n consecutive layers, the one whose removal costs the least perplexity on the calibration windows goes.
All candidates are measured on the dense model's weights; nothing is retrained.

The search shares work: candidates that start later than layer i have the same hidden states before i, so the model is
walked once for each batch of windows, and each candidate has a stream of its own only behind its gap.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from optimum_prune import layerwise
from optimum_prune.cuts import Cuts, Decision
from optimum_prune.errors import NumericalError, RecipeError
from optimum_prune.evaluation import next_token_losses
from optimum_prune.hookspecs import hookimpl
from optimum_prune.options import option
from optimum_prune.passes import Pass, PrunePass
from optimum_prune.shape import Shape

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor
    from transformers import PreTrainedModel

    from optimum_prune.anatomy import Family
    from optimum_prune.calibration import Calibration
    from optimum_prune.layerwise import Batch
    from optimum_prune.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Depth(PrunePass):
    """Leaves out the n consecutive decoder layers that cost the least perplexity, or the layers you name."""

    name: ClassVar[str] = "depth"
    layers: int | None = option("How many consecutive decoder layers to leave out; which, is searched for.", None)
    drop: tuple[int, ...] | None = option("Indices of the decoder layers to leave out, instead of a search.", None)

    def __post_init__(self) -> None:
        if (self.layers is None) == (self.drop is None):
            raise RecipeError("depth needs exactly one of 'layers' (how many, searched for) and 'drop' (which ones).")
        if self.layers is not None and self.layers < 1:
            raise RecipeError(f"depth is asked to leave out {self.layers} layers. Ask for at least 1.")
        if self.drop is not None and (not self.drop or len(set(self.drop)) < len(self.drop)):
            raise RecipeError(
                f"depth is asked to drop the layers {list(self.drop)}. Name each layer once, and at least one."
            )

    def foresee(self, shape: Shape) -> Shape:
        count = len(shape.layers)
        if self.drop is not None and not all(0 <= index < count for index in self.drop):
            raise RecipeError(
                f"depth is asked to drop the layers {list(self.drop)}, but there are only 0 to {count - 1}."
            )
        gone = self.layers if self.drop is None else len(self.drop)
        assert gone is not None
        if gone >= count:
            raise RecipeError(f"depth is asked to leave out {gone} layers of {count}. Leave at least one in.")
        return shape.keep(range(count - gone) if self.drop is None else _without(count, self.drop))

    def decide(
        self, model: PreTrainedModel, family: Family, calibration: Calibration, progress: Progress
    ) -> Iterator[Decision]:
        count = len(family.layers_of(model))
        if self.drop is not None:
            yield Decision(Cuts(layers=_without(count, self.drop)), evidence={"dropped": sorted(self.drop)})
            return
        assert self.layers is not None
        losses = window_losses(model, family, calibration, self.layers, progress)
        start = int(losses[1:].argmin())
        gone = range(start, start + self.layers)
        perplexities = losses.exp().tolist()
        evidence = {
            "dropped": list(gone),
            "perplexity_dense": perplexities[0],
            "perplexity_without_window_from": dict(enumerate(perplexities[1:])),
        }
        yield Decision(Cuts(layers=_without(count, gone)), evidence=evidence)


def _without(count: int, gone: Sequence[int]) -> tuple[int, ...]:
    return tuple(index for index in range(count) if index not in gone)


@torch.no_grad()
def window_losses(
    model: PreTrainedModel, family: Family, calibration: Calibration, size: int, progress: Progress
) -> Float[Tensor, " candidates+1"]:
    """Mean loss in nats of the dense model (entry 0), then without the window of `size` layers that starts at 0, 1, ...

    A candidate whose loss is not finite counts as infinitely bad.

    Raises:
        NumericalError: every candidate's loss is infinite.
    """
    stream = layerwise.embed(model, family, calibration)
    layers = len(family.layers_of(model))
    total = torch.zeros(layers - size + 2, dtype=torch.float64)
    steps = progress.track(range(len(stream) * (layers + len(total))), f"Searching windows of {size} layers")
    for batch, hidden in stream:
        total += _batch_losses(model, family, batch, hidden, size, steps)
    means = (total / calibration.mask[:, 1:].sum()).nan_to_num(nan=torch.inf, posinf=torch.inf)
    if means[1:].isinf().all():
        raise NumericalError(
            "No window of layers leaves a model with a finite perplexity. Look for NaN or infinity in the weights, or compute in "
            "bfloat16 or float32 instead of float16."
        )
    return means


def _batch_losses(
    model: PreTrainedModel,
    family: Family,
    batch: Batch,
    dense: Float[Tensor, "w t h"],
    size: int,
    steps: Iterator[int],
) -> Float[Tensor, " candidates+1"]:
    """Summed losses of the dense model and of every candidate, on one batch; a step for each layer and each of them."""
    layers = family.layers_of(model)
    gaps: dict[int, Tensor] = {}  # a window's start -> hidden states of the model without that window
    for index, layer in enumerate(layers):
        if index + size <= len(layers):
            gaps[index] = dense
        for start in gaps:
            if start + size <= index:
                gaps[start] = batch.run(layer, index, gaps[start])
        dense = batch.run(layer, index, dense)
        next(steps)
    ends = zip((dense, *gaps.values()), steps)  # noqa: B905 - the steps go on with the next batch
    return torch.stack([_loss(model, family, batch, hidden) for hidden, _ in ends])


def _loss(model: PreTrainedModel, family: Family, batch: Batch, hidden: Float[Tensor, "w t h"]) -> Float[Tensor, ""]:
    """The summed loss for hidden states behind the last layer; one window at a time, since logits are large."""
    windows = batch.split(hidden)
    losses = [
        next_token_losses(layerwise.logits(model, family, one, part), one.tokens, one.mask) for one, part in windows
    ]
    return torch.cat(losses).sum().cpu()


@hookimpl
def passes() -> Iterator[type[Pass]]:
    yield Depth

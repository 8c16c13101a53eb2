"""BlockPruner (arXiv 2406.10594): leave out attention and FFN blocks, one at a time.

A decoder layer is two residual blocks, attention and FFN, each with its norm. In each round every block that is left is left out
in turn, on top of those that are gone, and the one without which perplexity on the calibration windows is lowest goes. A layer
that has lost both goes as a whole.

A stock config cannot say that a layer has no attention, or no FFN: such a checkpoint has a form of its own, unless `stock` keeps
the blocks with output projections of zeros, which changes what the model computes in the same way, but neither its size nor its speed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from optimum_prune import layerwise
from optimum_prune.cost import Cost, healing, searching
from optimum_prune.cuts import BLOCKS, Cuts, Decision
from optimum_prune.errors import RecipeError
from optimum_prune.healing import heal
from optimum_prune.hookspecs import hookimpl
from optimum_prune.options import option
from optimum_prune.passes import Pass, PrunePass
from optimum_prune.search import Variant, check_finite, measure, perplexities
from optimum_prune.shape import Shape

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from optimum_prune.anatomy import Family
    from optimum_prune.calibration import Calibration
    from optimum_prune.cost import Workload
    from optimum_prune.layerwise import Batch
    from optimum_prune.progress import Progress

Block = tuple[int, str]
"""A layer's index, and "attention" or "feed_forward"."""


@dataclass(frozen=True, kw_only=True)
class BlockPruner(PrunePass):
    """Leaves out the attention and FFN blocks that cost the least perplexity, one at a time."""

    name: ClassVar[str] = "block-pruner"
    foresees_layers: ClassVar[bool] = False
    blocks: int | None = option("How many blocks to leave out, of two in every layer.", None)
    ratio: float | None = option("The same as a fraction of the blocks, between 0 and 1.", None)
    search: Literal["racing", "exact"] = option(
        "Whether candidates that are worse beyond doubt stop early, or all are measured in full.", "racing"
    )
    heal: bool = option("Refit what lies in front of the gaps by least squares.", True)
    damping: float = option("For healing: added to the gram's diagonal, relative to its mean.", 0.1)
    stock: bool = option("Keep the stock form, by output projections of zeros: no smaller, no faster.", False)

    def __post_init__(self) -> None:
        if (self.blocks is None) == (self.ratio is None):
            raise RecipeError(
                "block-pruner needs exactly one of 'blocks' (how many) and 'ratio' (the same as a fraction)."
            )
        if self.blocks is not None and self.blocks < 1:
            raise RecipeError(f"block-pruner is asked to leave out {self.blocks} blocks. Ask for at least 1.")
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise RecipeError(f"block-pruner has ratio {self.ratio}. Give a fraction above 0 and below 1.")
        if not 0 < self.damping < torch.inf:
            raise RecipeError(f"block-pruner has damping {self.damping}. Give a number above 0; 0.1 is usual.")

    def foresee(self, shape: Shape) -> Shape:
        count, total = self._count(shape), 2 * len(shape.layers)
        if count > total - 2:
            raise RecipeError(
                f"block-pruner is asked to leave out {count} blocks of {total}. Leave at least an attention and an FFN in."
            )
        # Which blocks go is for the search to find out: as if those of the last layers did, half of a layer's parameters each.
        whole = len(shape.layers) - (0 if self.stock else count // 2)
        layers = list(shape.layers[:whole])
        if count % 2 and not self.stock:
            layers[-1] = replace(layers[-1], parameters=layers[-1].parameters // 2)
        return replace(shape, layers=tuple(layers), searched_blocks=shape.searched_blocks or not self.stock)

    def _count(self, shape: Shape) -> int:
        if self.blocks is not None:
            return self.blocks
        assert self.ratio is not None
        return max(round(self.ratio * 2 * len(shape.layers)), 1)

    def estimate(self, shape: Shape, work: Workload) -> Cost:
        count = self._count(shape)
        blocks = [(index, index + 1, 0.5) for index in range(len(shape.layers)) for _ in BLOCKS]
        rounds = (
            searching(work, shape, blocks[: len(blocks) - gone], race=self.search == "racing") for gone in range(count)
        )
        healed = [healing(work, shape, count / 2)] if self.heal else []
        return Cost().then(*rounds, *healed)

    def decide(
        self, model: PreTrainedModel, family: Family, calibration: Calibration, progress: Progress
    ) -> Iterator[Decision]:
        count = self._count(family.shape(model))
        race = self.search == "racing"
        gone, rounds = search_blocks(model, family, calibration, count, progress, race=race, whole=not self.stock)
        evidence = {"removed": [list(block) for block in gone], "rounds": rounds}
        if self.heal:
            yield from heal(model, family, calibration, _kept(model, family, gone), self.damping, progress)
        if self.stock:
            yield Decision(weights=_zeros(model, family, gone), evidence={**evidence, "stock": True})
            return
        yield Decision(_cuts(model, family, gone), evidence=evidence)


def search_blocks(
    model: PreTrainedModel,
    family: Family,
    calibration: Calibration,
    count: int,
    progress: Progress,
    *,
    race: bool,
    whole: bool = True,
) -> tuple[list[Block], list[dict[str, Any]]]:
    """The blocks to leave out, in the order in which they go, and what was measured in each round.

    Args:
        race: let candidates that are worse beyond doubt stop early.
        whole: a layer that has lost both blocks hands on what it is given, norms left out as well.
    """
    layers = family.layers_of(model)
    left = [(index, block) for index, layer in enumerate(layers) for block in family.blocks_of(layer)]
    gone: list[Block] = []
    rounds = []

    def run_without(index: int, also: str, batch: Batch, hidden: Tensor) -> Tensor:
        blocks = family.blocks_of(layers[index])
        missing = [block for block in blocks if (index, block) in gone or block == also]
        if whole and len(missing) == len(blocks):
            return hidden
        return layerwise.run_without(family, batch, layers[index], index, hidden, missing)

    def run_layer(batch: Batch, index: int, hidden: Tensor) -> Tensor:
        return run_without(index, "", batch, hidden)

    for number in range(count):
        # Of each kind one stays: a model without attention, or without an FFN, is another thing.
        open_ = [block for block in left if sum(other[1] == block[1] for other in left) > 1]
        variants = [Variant(index, index + 1, partial(run_without, index, block)) for index, block in open_]
        losses = measure(
            model,
            family,
            calibration,
            variants,
            progress,
            f"Round {number + 1} of {count}",
            race=race,
            run_layer=run_layer,
        )
        check_finite(losses, "block")
        chosen = open_[losses.ranked[0]]
        named = [f"{block} of layer {index}" for index, block in open_]
        rounds.append({"removed": list(chosen), **perplexities(losses, "block", named)})
        gone.append(chosen)
        left.remove(chosen)
    return gone, rounds


def _kept(model: PreTrainedModel, family: Family, gone: Sequence[Block]) -> dict[int, tuple[str, ...]]:
    """Of each layer, the blocks that stay."""
    return {
        index: tuple(block for block in family.blocks_of(layer) if (index, block) not in gone)
        for index, layer in enumerate(family.layers_of(model))
    }


def _cuts(model: PreTrainedModel, family: Family, gone: Sequence[Block]) -> Cuts:
    """Layers that lost every block go; the others keep what they have left."""
    kept = _kept(model, family, gone)
    layers = tuple(index for index, blocks in kept.items() if blocks)
    changed = {index: kept[index] for index, _ in sorted(gone) if kept[index]}
    return Cuts(layers=None if len(layers) == len(kept) else layers, blocks=changed)


def _zeros(model: PreTrainedModel, family: Family, gone: Sequence[Block]) -> dict[str, Tensor]:
    """Output projections that put out nothing, by the names of their weights."""
    zeros = {}
    for index, block in gone:
        layer = family.layers_of(model)[index]
        for path in _outputs(family, layer, block):
            for name, parameter in layer.named_parameters():
                if name == path or name.rpartition(".")[0] == path:
                    zeros[f"{family.layers}.{index}.{name}"] = torch.zeros_like(parameter)
    return zeros


def _outputs(family: Family, layer: torch.nn.Module, block: str) -> Sequence[str]:
    """Paths of the projections, or of the parameter, that a block puts out what it computes through."""
    if block == "attention":
        return [family.attention_output]
    if family.experts_of(layer) is None or family.experts is None:
        return [family.feed_forward.output]
    shared = [] if family.experts.shared is None else [family.experts.shared.output]
    return [f"{family.experts.module}.{family.experts.output}", *shared]


@hookimpl
def passes() -> Iterator[type[Pass]]:
    yield BlockPruner

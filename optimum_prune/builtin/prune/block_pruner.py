"""BlockPruner (arXiv 2406.10594): leave out attention and FFN blocks, one at a time.

A decoder layer is two residual blocks, attention and FFN, each with its norm. In each round every block that is left is left out
in turn, on top of those that are gone, and the one without which perplexity on the calibration windows is lowest goes. A layer
that has lost both goes as a whole.

A stock config cannot say that a layer has no attention, or no FFN: such a checkpoint has a form of its own, unless `stock` keeps
the blocks with output projections of zeros, which changes what the model computes in the same way, but neither its size nor its speed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from optimum_prune.anatomy.shape import BLOCKS, Shape
from optimum_prune.anatomy.workload import Cost, Workload
from optimum_prune.calibration.stream import run_without
from optimum_prune.errors import RecipeError, SurgeryError
from optimum_prune.hooks.marker import hookimpl
from optimum_prune.machine.mapped_weights import held
from optimum_prune.options import option
from optimum_prune.passes.base import Pass
from optimum_prune.passes.prune import PrunePass
from optimum_prune.refit.healing import heal, healing_cost
from optimum_prune.selection.search import Variant, check_finite, measure, perplexities, searching_cost
from optimum_prune.surgery.cuts import Cuts, Decision

if TYPE_CHECKING:
    from torch import Tensor

    from optimum_prune.anatomy.decoder import Decoder
    from optimum_prune.calibration.calibration import Calibration
    from optimum_prune.calibration.stream import Batch

Block = tuple[int, str]
"""A layer's index, and "attention" or "feed_forward"."""


@dataclass(frozen=True, kw_only=True)
class BlockPruner(PrunePass):
    """Leaves out the attention and FFN blocks that cost the least perplexity, one at a time."""

    name: ClassVar[str] = "block-pruner"
    foresees_layers: ClassVar[bool] = False
    blocks: int | None = option("How many blocks to leave out, of two in every layer.", None, at_least=1)
    ratio: float | None = option("The same as a fraction of the blocks, between 0 and 1.", None, above=0, below=1)
    search: Literal["racing", "exact"] = option(
        "Whether candidates that are worse beyond doubt stop early, or all are measured in full.", "racing"
    )
    heal: bool = option("Refit what lies in front of the gaps by least squares.", True)
    damping: float = option(
        "For healing: added to the gram's diagonal, relative to its mean.", 0.1, above=0, below=math.inf
    )
    stock: bool = option("Keep the stock form, by output projections of zeros: no smaller, no faster.", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.blocks is None) == (self.ratio is None):
            raise RecipeError(
                "block-pruner needs exactly one of 'blocks' (how many) and 'ratio' (the same as a fraction)."
            )

    def foresee(self, shape: Shape) -> Shape:
        count, there = self._count(shape), [block for layer in shape.layers for block in layer.blocks]
        if count > len(there) - 2:
            raise RecipeError(
                f"block-pruner is asked to leave out {count} blocks of {len(there)}. Leave at least an attention and an FFN in."
            )
        # Which blocks go is for the search to find out: as if those of the last layers did, half of a layer's parameters each.
        whole = len(shape.layers) - (0 if self.stock else count // 2)
        layers = list(shape.layers[:whole])
        if count % 2 and not self.stock:
            layers[-1] = layers[-1].of_size(layers[-1].parameters // 2)
        return replace(shape, layers=tuple(layers), searched_blocks=shape.searched_blocks or not self.stock)

    def _count(self, shape: Shape) -> int:
        if self.blocks is not None:
            return self.blocks
        assert self.ratio is not None
        return max(round(self.ratio * 2 * len(shape.layers)), 1)

    @property
    def may_end_early(self) -> bool:
        return self.search == "racing"

    def estimate(self, shape: Shape, work: Workload) -> Cost:
        count = self._count(shape)
        blocks = [(index, index + 1, 0.5) for index in range(len(shape.layers)) for _ in BLOCKS]
        race = self.search == "racing"
        rounds = (searching_cost(work, shape, blocks[: len(blocks) - gone], race=race) for gone in range(count))
        healed = [healing_cost(work, shape, count / 2)] if self.heal else []
        return Cost().followed_by(*rounds, *healed)

    def decide(self, decoder: Decoder, calibration: Calibration) -> Iterator[Decision]:
        count = self._count(decoder.shape())
        race = self.search == "racing"
        gone, rounds = search_blocks(decoder, calibration, count, race=race, whole=not self.stock)
        evidence = {"removed": [list(block) for block in gone], "rounds": rounds}
        if self.heal:
            yield from heal(decoder, calibration, _kept(decoder, gone), self.damping)
        if self.stock:
            yield Decision(weights=_zeros(decoder, gone), evidence={**evidence, "stock": True})
            return
        yield Decision(_cuts(decoder, gone), evidence=evidence)


def search_blocks(
    decoder: Decoder, calibration: Calibration, count: int, *, race: bool, whole: bool = True
) -> tuple[list[Block], list[dict[str, Any]]]:
    """The blocks to leave out, in the order in which they go, and what was measured in each round.

    Args:
        race: let candidates that are worse beyond doubt stop early.
        whole: a layer that has lost both blocks hands on what it is given, norms left out as well. Else blocks are left out by zeros, and
            those that put out nothing but zeros are so already.

    Raises:
        SurgeryError: there are not so many.
    """
    layers = decoder.layers
    left = _candidates(decoder, count, zeroed=whole)
    gone: list[Block] = []
    rounds = []

    def run_part(index: int, also: str, batch: Batch, hidden: Tensor) -> Tensor:
        blocks = layers[index].blocks
        missing = [block for block in blocks if (index, block) in gone or block == also]
        if whole and len(missing) == len(blocks):
            return hidden
        return run_without(layers[index], batch, hidden, missing)

    def run_layer(batch: Batch, index: int, hidden: Tensor) -> Tensor:
        return run_part(index, "", batch, hidden)

    for number in range(count):
        # Of each kind one stays: a model without attention, or without an FFN, is another thing.
        open_ = [block for block in left if sum(other[1] == block[1] for other in left) > 1]
        variants = [Variant(index, index + 1, partial(run_part, index, block)) for index, block in open_]
        what = f"Round {number + 1} of {count}"
        losses = check_finite(measure(decoder, calibration, variants, what, race=race, run_layer=run_layer), "block")
        chosen = open_[losses.ranked[0]]
        named = [f"{block} of layer {index}" for index, block in open_]
        rounds.append({"removed": list(chosen), **perplexities(losses, "block", named)})
        gone.append(chosen)
        left.remove(chosen)
    return gone, rounds


def _candidates(decoder: Decoder, count: int, *, zeroed: bool) -> list[Block]:
    """The blocks of which so many can be left out.

    Args:
        zeroed: whether those that put out nothing but zeros are among them.
    """
    left, there = [], 0
    for layer in decoder.layers:
        with held(layer.module):
            left += [(layer.index, block) for block in layer.blocks if zeroed or not layer.adds_nothing(block)]
        there += len(layer.blocks)
    free = sum(max(sum(kind == block for _, block in left) - 1, 0) for kind in BLOCKS)
    if count > free:
        raise SurgeryError(
            f"block-pruner is asked to leave out {count} blocks, and {free} can be: {there - len(left)} of {there} put out nothing as it is, "
            f"and an attention and an FFN stay. Ask for fewer."
        )
    return left


def _kept(decoder: Decoder, gone: Sequence[Block]) -> dict[int, tuple[str, ...]]:
    """Of each layer, the blocks that stay."""
    return {
        layer.index: tuple(block for block in layer.blocks if (layer.index, block) not in gone)
        for layer in decoder.layers
    }


def _cuts(decoder: Decoder, gone: Sequence[Block]) -> Cuts:
    """Layers that lost every block go; the others keep what they have left."""
    kept = _kept(decoder, gone)
    layers = tuple(index for index, blocks in kept.items() if blocks)
    changed = {index: kept[index] for index, _ in sorted(gone) if kept[index]}
    return Cuts(layers=None if len(layers) == len(kept) else layers, blocks=changed)


def _zeros(decoder: Decoder, gone: Sequence[Block]) -> dict[str, Tensor]:
    """Output projections that put out nothing, by the names of their weights."""
    return {
        f"{layer.prefix}{path}": torch.zeros_like(parameter)
        for layer, block in ((decoder.layer(index), block) for index, block in gone)
        for path, parameter in layer.output_parameters(block).items()
    }


@hookimpl
def passes() -> Iterator[type[Pass]]:
    yield BlockPruner

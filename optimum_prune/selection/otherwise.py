"""The same cut chosen otherwise: at random, or by the magnitude of weights, to tell what a choice is worth."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from optimum_prune.anatomy.axis import Axis, Units
from optimum_prune.anatomy.shape import BLOCKS
from optimum_prune.machine.mapped_weights import held
from optimum_prune.selection.sparsity import lowest_of_rows
from optimum_prune.surgery.cuts import Cuts

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    from optimum_prune.anatomy.decoder import Decoder, DecoderLayer

GROUPS = (2, 4, 8, 16, 32)
"""Of so many consecutive inputs, a pattern may keep a fixed number."""


@dataclass(frozen=True)
class Scorer:
    """What tells how much each part of a model matters: high means keep."""

    of: Callable[[Tensor], Tensor]
    """Of values of weights, their scores; those of a unit are added."""
    whole: Callable[[Iterable[float]], float]
    """Of the scores of what makes up a part of the model, that of all of it."""

    def parts(self, layer: nn.Module, modules: Iterable[nn.Module]) -> float:
        """Of all weights in modules of a layer."""
        weights = (weight for module in modules for weight in module.parameters())
        with held(layer):
            return self.whole(self.of(weight.detach()).sum(dtype=torch.float64).item() for weight in weights)

    def units(self, root: nn.Module, axis: Axis) -> Float[Tensor, "groups units"]:
        """Of each unit of an axis."""
        total = torch.zeros(max(axis.groups, 1), axis.units)
        for member in axis.members:
            parent, _, name = member.path.rpartition(".")
            value = getattr(root.get_submodule(parent), name).detach()
            if not value.is_floating_point():
                continue
            kept = [0, member.dim] if axis.groups else [member.dim]
            others = [dim for dim in range(value.ndim) if dim not in kept]
            scores = self.of(value)
            along = (scores.sum(others) if others else scores).cpu().view(len(total), -1)
            index = member.features(torch.arange(axis.units)[:, None], axis.units)
            total += along[:, index].sum(-1)
        return total


def at_random(seed: int) -> Scorer:
    """Scores by chance, others each time they are asked for."""
    generator = torch.Generator().manual_seed(seed)

    def draw(_: Iterable[float]) -> float:
        """The same however large a part is, and of whatever."""
        return torch.rand((), generator=generator).item()

    return Scorer(lambda values: torch.rand(values.shape, generator=generator), draw)


def by_magnitude() -> Scorer:
    """Scores that are the magnitudes of weights."""
    return Scorer(lambda values: values.abs().float(), sum)


def chosen_otherwise(decoder: Decoder, cuts: Cuts, scorer: Scorer) -> Cuts:
    """Cuts of a model that leave as much of each part of it as others do, chosen by scores.

    Of layers next to one another that go, as many next to one another go again; of blocks, as many of each kind.
    """
    if cuts.blocks:
        layers, blocks = _blocks_otherwise(decoder, cuts, scorer)
    else:
        layers = None if cuts.layers is None else _layers_otherwise(decoder, cuts.layers, scorer)
        blocks = dict[int, tuple[str, ...]]()
    units = {}
    for (index, name), kept in _where_they_are(decoder, cuts, Cuts(layers, blocks)):
        axis = decoder.hidden() if index is None else decoder.layer(index).axes[name]
        root: nn.Module = decoder.model if index is None else decoder.modules[index]
        assert axis is not None
        with held(root):
            units[index, name] = _highest(scorer.units(root, axis), axis, kept)
    return Cuts(layers, blocks, units)


def _where_they_are(decoder: Decoder, cuts: Cuts, otherwise: Cuts) -> Iterator[tuple[tuple[int | None, str], Units]]:
    """The units of cuts, those of a part that goes otherwise moved to one that has stayed for it.

    Args:
        otherwise: the layers and blocks that stay instead.
    """
    moved = set[tuple[int | None, str]]()
    for place, kept in cuts.units.items():
        index, name = place
        if index is None or _has(otherwise, index, (axis := decoder.layer(index).axes[name]).block):
            yield place, kept
            continue
        for other in decoder.layers:
            spared = _has(otherwise, other.index, axis.block) and not _has(cuts, other.index, axis.block)
            alike = name in other.axes and (other.axes[name].units, other.axes[name].groups) == (
                axis.units,
                axis.groups,
            )
            if spared and alike and (other.index, name) not in moved:
                moved.add((other.index, name))
                yield (other.index, name), kept
                break


def _has(cuts: Cuts, index: int, block: str) -> bool:
    """Whether a layer keeps a block."""
    return (cuts.layers is None or index in cuts.layers) and block in cuts.blocks.get(index, BLOCKS)


def _highest(scores: Float[Tensor, "groups units"], axis: Axis, kept: Units) -> Units:
    """The units with the highest scores, as many as are kept of each group and of each part."""
    count, size = len(kept[0]) if axis.groups else len(kept), axis.units // axis.parts  # type: ignore[arg-type]
    order = scores.view(len(scores), axis.parts, size).sort(dim=-1, descending=True, stable=True).indices
    best = (order[..., : count // axis.parts] + size * torch.arange(axis.parts)[:, None]).flatten(1).sort(dim=1).values
    chosen = tuple(tuple(row) for row in best.tolist())
    return chosen if axis.groups else chosen[0]


def _layers_otherwise(decoder: Decoder, kept: Sequence[int], scorer: Scorer) -> tuple[int, ...]:
    gone = sorted(set(range(len(decoder))) - set(kept))
    scores = [scorer.parts(layer, [layer]) for layer in decoder.modules]
    if gone and gone[-1] - gone[0] == len(gone) - 1:
        starts = range(len(scores) - len(gone) + 1)
        start = min(starts, key=lambda start: scorer.whole(scores[start : start + len(gone)]))
        going = set(range(start, start + len(gone)))
    else:
        going = set(sorted(range(len(scores)), key=lambda index: scores[index])[: len(gone)])
    return tuple(index for index in range(len(scores)) if index not in going)


def _blocks_otherwise(
    decoder: Decoder, cuts: Cuts, scorer: Scorer
) -> tuple[tuple[int, ...] | None, dict[int, tuple[str, ...]]]:
    layers, left = decoder.layers, set(range(len(decoder)) if cuts.layers is None else cuts.layers)
    going: dict[int, set[str]] = {}
    for block in BLOCKS:
        there = [layer for layer in layers if block in layer.blocks]
        count = sum(layer.index not in left or block not in cuts.blocks.get(layer.index, BLOCKS) for layer in there)
        scores = {layer.index: scorer.parts(layer.module, map(layer.part, layer.modules_of(block))) for layer in there}
        for index in sorted(scores, key=lambda index: scores[index])[:count]:
            going.setdefault(index, set()).add(block)
    blocks = {
        index: tuple(block for block in layers[index].blocks if block not in gone) for index, gone in going.items()
    }
    whole = tuple(layer.index for layer in layers if blocks.get(layer.index, BLOCKS))
    return whole, {index: kept for index, kept in blocks.items() if kept}


def zeros_otherwise(zeros: Bool[Tensor, "out in"], scores: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
    """As many zeros in each row of a matrix as others, or of so many consecutive inputs where a pattern keeps a number, with the lowest scores."""
    rows, inputs = zeros.shape
    for size in GROUPS:
        counts = zeros.view(rows, -1, size).sum(-1) if inputs % size == 0 else None
        if counts is not None and (counts == counts[0, 0]).all():
            return lowest_of_rows(scores.view(rows, -1, size), counts[..., None]).view(rows, inputs)
    return lowest_of_rows(scores, zeros.sum(-1, keepdim=True))


def zeros_made(layer: DecoderLayer, before: DecoderLayer) -> dict[str, Tensor]:
    """Of the parameters of a layer, those that were made sparse, by their paths: where they are zero now."""
    old, found = dict(before.module.named_parameters()), {}
    for path, value in layer.module.named_parameters():
        was = old.get(path)
        if was is None or was.shape != value.shape or value.ndim < 2 or value.data_ptr() == was.data_ptr():
            continue
        zeros = value == 0
        if zeros.any() and not zeros.all() and int(zeros.sum()) > int((was == 0).sum()):
            found[path] = zeros
    return found

"""The check of a family: a model of it is cut in every way that it can be, and is what it should be."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

from torch.testing import assert_close
from transformers import PreTrainedModel

from optimum_prune.anatomy.axis import Axis
from optimum_prune.anatomy.decoder import Decoder
from optimum_prune.anatomy.family import Family
from optimum_prune.anatomy.shape import ATTENTION, BLOCKS
from optimum_prune.errors import OptimumPruneError, reason
from optimum_prune.surgery.cuts import Cuts
from optimum_prune.testing.cutting import (
    at_random,
    cut,
    cuts_to,
    with_blocks_silenced,
    with_layers_skipped,
    with_masked,
)
from optimum_prune.testing.models import generates_as_it_scores, logits, random_windows, reloads_exactly

if TYPE_CHECKING:
    from torch import Tensor

TOLERANCE = 1e-4
"""How far logits in float32 may be apart where sums are taken in another order."""


def check_family(model: PreTrainedModel, family: Family, folder: Path) -> None:
    """Checks that a family describes a model: a small one in float32 whose weights all matter, with layers of every kind that it has.

    Its layers are left out one by one, its blocks and units cut; each time it must compute what the dense model does without
    them, and the same after a reload, with a cache and without.

    Args:
        model: is not changed.
        folder: an empty folder for checkpoints.

    Raises:
        AssertionError: it does not.
        OptimumPruneError: the model does not look as the family says.
    """
    try:
        _check(model, family, folder)
    except (AssertionError, OptimumPruneError):
        raise
    except Exception as error:  # whatever a model makes of sizes that do not go together
        raise AssertionError(
            f"{type(model).__name__} cannot be cut or run as the family '{family.name}' says: {type(error).__name__}: {reason(error)}"
        ) from error


def _check(model: PreTrainedModel, family: Family, folder: Path) -> None:
    dense = Decoder(model.eval(), family)
    windows = random_windows(dense.config.vocab_size, count=3)
    before = logits(model, windows)
    counted, there = dense.shape().parameters, sum(parameter.numel() for parameter in model.parameters())
    assert counted == there, f"By its axes the model has {counted} parameters, and there are {there}."
    for gone in range(len(dense)):
        kept = tuple(index for index in range(len(dense)) if index != gone)
        skipped = with_layers_skipped(dense, [gone], windows)
        _check_cut(dense, Cuts(layers=kept), folder / f"layer-{gone}", skipped)
    for block in BLOCKS:
        index, others = _layer_to_lose(dense, block), tuple(other for other in BLOCKS if other != block)
        silent = with_blocks_silenced(dense, {index: (block,)}, windows)
        _check_cut(dense, Cuts(blocks={index: others}), folder / block, silent)
    names = dict.fromkeys(name for layer in dense.layers for name, axis in layer.axes.items() if not axis.follows)
    for number, name in enumerate(names):
        axes = [layer.axes[name] for layer in dense.layers if name in layer.axes]
        keep = min(map(_half, axes))
        if keep < min(axis.units for axis in axes):
            cuts = cuts_to(dense, at_random(number), {name: keep})
            masked = with_masked(dense, cuts, windows) if all(axis.output for axis in axes) else None
            _check_cut(dense, cuts, folder / name, masked)
    assert_close(logits(model, windows), before, rtol=0, atol=0)


def _half(axis: Axis) -> int:
    """About half of the units of an axis: a number that the config can say."""
    possible = range(1, axis.units + 1) if axis.possible is None else axis.possible
    wanted = [count for count in possible if count % axis.multiple == 0 or axis.multiple > axis.units]
    return min(wanted, key=lambda count: abs(count - axis.units / 2), default=axis.units)


def _layer_to_lose(decoder: Decoder, block: str) -> int:
    """The last layer that can do without a block: of attentions of each type, caches need one."""
    types = getattr(decoder.config, "layer_types", None) or [""] * len(decoder)
    return max(index for index in range(len(decoder)) if block != ATTENTION or types.count(types[index]) > 1)


def _check_cut(dense: Decoder, cuts: Cuts, folder: Path, expected: Tensor | None) -> None:
    """Checks a model that was cut.

    Args:
        expected: its logits; None if nothing is known of them.
    """
    windows = random_windows(dense.config.vocab_size, count=3)
    decoder = Decoder(copy.deepcopy(dense.model), dense.family)
    cut(decoder, cuts)
    if expected is not None:
        assert_close(logits(decoder.model, windows), expected, rtol=TOLERANCE, atol=TOLERANCE)
    if cuts.layers is not None:
        layers_are_numbered(decoder)
    counted, there = decoder.shape().parameters, sum(parameter.numel() for parameter in decoder.model.parameters())
    assert counted == there, f"By its axes the model has {counted} parameters after a cut, and there are {there}."
    generates_as_it_scores(reloads_exactly(decoder.model, folder, windows), windows)


def layers_are_numbered(decoder: Decoder) -> None:
    """Every `layer_idx` is the layer's position."""
    for layer in decoder.layers:
        numbers = {module.layer_idx for module in layer.module.modules() if hasattr(module, "layer_idx")}
        assert numbers <= {layer.index}, f"Modules of layer {layer.index} take themselves for those of {numbers}."

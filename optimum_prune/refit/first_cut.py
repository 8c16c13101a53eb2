"""A model cut at once and mended in closed form, as weights of the model as it is: where a training begins that may still choose otherwise.

Gaps are healed as those of depth pruning, units eliminated one by one and the projections behind them refitted as OSSCAR's. The new
weights of what is kept stand in the places that it has in the model; those of what is not are the old ones.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from optimum_prune.anatomy.shape import BLOCKS
from optimum_prune.refit.healing import heal
from optimum_prune.refit.narrowing import Narrowing
from optimum_prune.surgery.operation import carry_out, copy_of

if TYPE_CHECKING:
    from optimum_prune.anatomy.axis import Axis, Units
    from optimum_prune.anatomy.decoder import Decoder, DecoderLayer
    from optimum_prune.calibration.calibration import Calibration
    from optimum_prune.calibration.visit import LayerVisit
    from optimum_prune.surgery.cuts import Decision

HEALING, NARROWING = 0.1, 0.01
"""Damping of both, as the passes have it by themselves."""


@dataclass
class FirstCut:
    """What a model is cut to at first."""

    units: dict[tuple[int | None, str], Units] = field(default_factory=dict)
    """Layer and axis -> the kept units."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """New weights, in the shapes that they have in the model, by their names there."""


def first_cut(
    decoder: Decoder, calibration: Calibration, layers: Collection[int], sizes: Mapping[tuple[int, str], int]
) -> FirstCut:
    """A model, which stays as it is, cut to some layers and units.

    Args:
        layers: those that stay.
        sizes: layer and axis -> how many units stay; axes that follow others are cut with these.
    """
    scratch, found = copy_of(decoder), FirstCut()
    if len(layers) < len(decoder):
        kept = {layer.index: layer.blocks if layer.index in layers else () for layer in decoder.layers}
        for decision in heal(scratch, calibration, kept, HEALING):
            carry_out(scratch, decision)
            found.weights |= decision.weights
    for visit in calibration.walk(scratch, "First cut, layer by layer"):
        if visit.index not in layers:
            visit.skip()
            continue
        for axis in _in_order(visit.layer, sizes):
            decision = _narrowed(visit, axis, sizes[visit.index, axis.name])
            _note(found, visit.layer, decision)
            carry_out(scratch, decision)
    return found


def _in_order(layer: DecoderLayer, sizes: Mapping[tuple[int, str], int]) -> list[Axis]:
    """The axes of a layer that are cut, attention's first."""
    axes = [axis for axis in layer.axes.values() if (layer.index, axis.name) in sizes and not axis.follows]
    return sorted(axes, key=lambda axis: BLOCKS.index(axis.block))


def _narrowed(visit: LayerVisit, axis: Axis, size: int) -> Decision:
    """An axis of a layer narrowed."""
    (decision,) = Narrowing(NARROWING).decisions(visit, axis.name, (size,))
    if not axis.groups:
        visit.narrow(axis, decision.cuts.kept(visit.index, axis.name))  # type: ignore[arg-type]  # of one group
    return decision


def _note(found: FirstCut, layer: DecoderLayer, decision: Decision) -> None:
    """Takes down what was kept of a layer, and puts its new weights where they lie before the cut."""
    new = dict(decision.weights)
    for (_, name), kept in decision.cuts.units.items():
        axis = layer.axes[name]
        found.units[layer.index, name] = kept
        path = f"{layer.prefix}{axis.output}"
        found.weights[path] = _spread(layer.module.get_parameter(axis.output).detach(), new.pop(path), axis, kept)
    found.weights |= new  # biases


def _spread(old: Tensor, new: Tensor, axis: Axis, kept: Units) -> Tensor:
    """A weight with the values of a narrower one where that has inputs."""
    whole = old.clone()
    dim = axis.outgoing.dim
    if not axis.groups:
        return whole.index_copy_(dim, _inputs(axis, kept, old), new.to(old))  # type: ignore[arg-type]  # of one group
    for group, units in enumerate(kept):
        whole[group].index_copy_(dim - 1, _inputs(axis, units, old), new[group].to(old))  # type: ignore[arg-type]  # of several
    return whole


def _inputs(axis: Axis, kept: Sequence[int], like: Tensor) -> Tensor:
    return axis.inputs(kept).to(like.device)

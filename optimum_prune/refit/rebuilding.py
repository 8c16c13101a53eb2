"""The FFN in front of a gap rebuilt from its own units and those of the layers that go.

Hidden states change slowly in the middle of a model: what the FFNs of layers that go would compute, the one in front of the gap computes
nearly, from the hidden states in front of its own. So its units are chosen anew, by elimination, from its own and theirs, as many as it is to
have, and its output is fitted to the hidden states behind the gap. No parameter is added. The gains of the norms in front of the FFNs
differ: those of what reads behind them are divided by its own and multiplied by theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from optimum_prune.anatomy.norms import gain, is_rms, norms_of
from optimum_prune.anatomy.shape import FEED_FORWARD
from optimum_prune.calibration.visit import LayerVisit
from optimum_prune.refit.projecting import norms_behind, read_behind
from optimum_prune.surgery.cuts import Cuts, Decision
from optimum_prune.surgery.operation import keep, local_members, with_units_of

if TYPE_CHECKING:
    from torch import Tensor

    from optimum_prune.anatomy.axis import Axis
    from optimum_prune.anatomy.decoder import Decoder, DecoderLayer
    from optimum_prune.refit.narrowing import Narrowing


SMALLEST = 1e-8
"""A gain that is divided by; those of features with massive activations are a few hundred-thousandths, in each layer alike."""


@dataclass(frozen=True)
class Pool:
    """A layer whose FFN has the units of the layers behind it besides its own."""

    visit: LayerVisit
    """Of that layer, where the layer as it is was visited."""
    axis: Axis
    own: int
    """How many of the units are its own."""

    def decision(self, size: int, narrowing: Narrowing, goal: LayerVisit) -> Decision:
        """How the FFN is rebuilt from so many of the units.

        Args:
            size: no more than its own are.
            goal: a visit whose stream is what the hidden states behind the layer are to be.
        """
        (made,) = narrowing.decisions(self.visit, self.axis.name, (size,), goal)
        layer, index = self.visit.layer, self.visit.index
        kept = made.cuts.kept(index, self.axis.name)
        keep(layer.module, self.axis, kept)
        values = {member.path: layer.module.get_parameter(member.path).detach() for member in self.axis.members}
        weights = {**layer.named(values), **made.weights}
        cuts = Cuts() if size == self.own else Cuts.along(self.axis.name, {index: tuple(range(size))})
        theirs = sum(unit >= self.own for unit in kept)  # type: ignore[operator]  # of one group
        evidence = {**made.evidence, "rebuilt": index, "from_layers_that_go": theirs}
        return Decision(cuts, weights, evidence)  # type: ignore[arg-type]  # tensors, as they were given


def pool(decoder: Decoder, hidden: Axis | None, visit: LayerVisit, gone: Sequence[int]) -> Pool | None:
    """The units that a layer's FFN can be rebuilt from.

    Args:
        hidden: the features of hidden states, among whose parameters the norms are.
        gone: the layers behind it that go, as they are in the dense model.

    Returns:
        None where they do not lie alike: mixtures of experts, norms that do more than to divide and to multiply, norms behind blocks.
    """
    layer, axis = visit.layer, _inner_axis(visit.layer)
    if axis is None or hidden is None:
        return None
    others = [decoder.layer(index) for index in gone]
    if any((theirs := _inner_axis(other)) is None or theirs.members != axis.members for other in others):
        return None
    own, found = _gain_in_front(visit, layer, hidden, axis), []
    for other in others:
        factor = _gain_in_front(visit, other, hidden, axis)
        if own is None or factor is None:
            return None
        found.append(_seen_from(other, axis, factor / own))
    wide = with_units_of(layer, axis, found)
    return Pool(LayerVisit(wide, list(visit.stream), visit.activations), wide.axes[axis.name], axis.units)


def _inner_axis(layer: DecoderLayer) -> Axis | None:
    """The units of an FFN that is no mixture."""
    if FEED_FORWARD not in layer.blocks or layer.projection(layer.output_of(FEED_FORWARD)).linear is None:
        return None
    output = layer.output_of(FEED_FORWARD)
    return next((axis for axis in layer.axes.values() if axis.output == output and not axis.follows), None)


def _gain_in_front(visit: LayerVisit, layer: DecoderLayer, hidden: Axis, axis: Axis) -> Tensor | None:
    """By what the norm multiplies whose outputs an FFN reads; None if it does more than that, or a norm stands behind the FFN."""
    norms = norms_of(layer.module, local_members(hidden, layer.prefix))
    readers = [member.path.rpartition(".")[0] for member in axis.members if member.path != axis.output]
    if FEED_FORWARD in norms_behind(layer, visit.stream, norms):
        return None
    in_front = read_behind(LayerVisit(layer, visit.stream), norms, readers)
    found = {in_front.get(reader, "") for reader in readers}
    norm = layer.part(found.pop()) if len(found) == 1 and "" not in found else None
    if norm is None or not is_rms(norm):
        return None
    gains = gain(norm)
    return gains if bool((gains.abs() > SMALLEST).all()) else None


def _seen_from(other: DecoderLayer, axis: Axis, factor: Tensor) -> dict[str, Tensor]:
    """The parameters of the units of another layer, such that they read what a norm puts out that multiplies by so much less."""
    found = {}
    for member in axis.members:
        value = other.module.get_parameter(member.path).detach()
        if member.path != axis.output and value.ndim == 2:
            value = (value.float() * (factor if member.dim == 0 else factor[:, None])).to(value.dtype)
        found[member.path] = value
    return found

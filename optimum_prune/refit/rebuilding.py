"""The FFN in front of a gap rebuilt from its own units and those of the layers that go.

Hidden states change slowly in the middle of a model: what the FFNs of layers that go would compute, the one in front of the gap computes
nearly, from the hidden states in front of its own. So its units are chosen anew, by elimination, from its own and theirs, as many as it is to
have, and its output is fitted to the hidden states behind the gap. No parameter is added. The gains of the norms in front of the FFNs
differ: those of what reads behind them are divided by its own and multiplied by theirs. However many layers go, it chooses from
twice as many units as it has, those that add most by themselves, so that memory and time do not grow with the gap.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optimum_prune.anatomy.norms import gain, is_rms, norms_of
from optimum_prune.anatomy.shape import FEED_FORWARD, LayerShape
from optimum_prune.anatomy.workload import Cost, Workload
from optimum_prune.calibration.statistics import SquaredNorms
from optimum_prune.calibration.visit import LayerVisit
from optimum_prune.refit.projecting import norms_behind, read_behind
from optimum_prune.surgery.cuts import Cuts, Decision, ranges
from optimum_prune.surgery.operation import keep, local_members, with_units_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from optimum_prune.anatomy.axis import Axis, Indices
    from optimum_prune.anatomy.decoder import Decoder, DecoderLayer
    from optimum_prune.calibration.stream import Batch
    from optimum_prune.refit.narrowing import Narrowing


SMALLEST = 1e-8
"""A gain that is divided by; those of features with massive activations are a few hundred-thousandths, in each layer alike."""
AMONG = 2
"""Units to choose from, for each that the FFN has."""


@dataclass(frozen=True)
class Pool:
    """A layer whose FFN has the units of the layers behind it besides its own."""

    visit: LayerVisit
    """Of that layer, where the layer as it is was visited."""
    axis: Axis
    own: int
    """How many units the layer has itself."""
    origins: Sequence[tuple[int, int]]
    """Of each unit to choose from, the layer that it is of and its number there."""

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
        of_layers = defaultdict[int, list[int]](list)
        for unit in kept:
            of, number = self.origins[unit]  # type: ignore[index]  # of one group
            of_layers[of].append(number)
        theirs = len(kept) - len(of_layers[index])
        units = {str(of): ranges(numbers) for of, numbers in sorted(of_layers.items())}
        evidence = {**made.evidence, "rebuilt": index, "from_layers_that_go": theirs, "units_of_layers": units}
        return Decision(cuts, weights, evidence)  # type: ignore[arg-type]  # tensors, as they were given


def pool(
    decoder: Decoder, hidden: Axis | None, visit: LayerVisit, gone: Sequence[int], lacking: Sequence[str] = ()
) -> Pool | None:
    """The units that a layer's FFN can be rebuilt from.

    Args:
        hidden: the features of hidden states, among whose parameters the norms are.
        gone: the layers behind it that go, as they are in the dense model.
        lacking: blocks of the layer itself that go.

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
    wide = LayerVisit(with_units_of(layer, axis, found), list(visit.stream), visit.activations)
    wide.leave_out(lacking)
    best = _most_by_themselves(wide, axis.name, AMONG * axis.units)
    keep(wide.layer.module, wide.layer.axes[axis.name], best)
    numbers = [(each, number) for each in (layer.index, *gone) for number in range(axis.units)]
    return Pool(wide, wide.layer.axes[axis.name], axis.units, [numbers[unit] for unit in best])


def _most_by_themselves(visit: LayerVisit, name: str, count: int) -> Indices:
    """Of the units of an axis no more than so many: those that add most to the hidden states, each without the others."""
    axis = visit.layer.axes[name]
    if axis.units <= count:
        return tuple(range(axis.units))
    (weight,) = visit.layer.projection(axis.output).maps
    norms = SquaredNorms(axis.units, weight.device)

    def hear(batch: Batch, _module: nn.Module, args: tuple[Any, ...], _keywords: Mapping[str, Any]) -> None:
        norms.add(batch.unpadded(args[0]))

    visit.listen([(axis.output.rpartition(".")[0], hear)])
    added = norms.value * weight.float().square().sum(0).to(norms.value)
    return tuple(added.topk(count).indices.sort().values.tolist())


def rebuilding_cost(work: Workload, before: LayerShape, after: LayerShape, gone: int, narrowing: Narrowing) -> Cost:
    """What it takes to choose the units of an FFN from those of so many layers behind it as well."""
    found = [axis for axis in before.axes if axis.inner and axis.block == FEED_FORWARD and not axis.groups]
    if not found or not gone:
        return Cost()
    wide = before.narrowed({axis.name: min(AMONG, 1 + gone) * axis.units for axis in found})
    seeing = work.run(wide, work.tokens) if gone >= AMONG else Cost()
    units = (1 + gone) * sum(axis.units * before.per_unit(axis.name) for axis in found) * work.itemsize
    return narrowing.cost(work, wide, after).followed_by(seeing).with_memory(units)


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

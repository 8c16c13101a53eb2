"""A decoder with fewer features of its hidden states: they are projected, and every matrix that reads or writes them is refitted.

With P of shape (d, k), orthonormal columns, hidden states x become x P. What reads them, W, becomes W P, what writes them P' W, and norms
are rescaled, since they divide by the mean over fewer features. What is then left of an error is made up for layer by layer, on the stream
of the layers already projected, by ridge regressions towards these weights: matrices that read, towards what they read in the model as it
was; those that write, towards its hidden states. P either selects features, or it is the first directions of a rotation. A rotation
commutes with norms that divide by the root of the mean square and have no weights, so those are folded into what reads behind them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optimum_prune.anatomy.norms import gain, neutral, norms_of, scaled, shift
from optimum_prune.anatomy.shape import ATTENTION, BLOCKS, FEED_FORWARD
from optimum_prune.calibration.visit import LayerVisit
from optimum_prune.machine import processes
from optimum_prune.refit.hidden_ends import Ends
from optimum_prune.refit.projecting import (
    Basis,
    Reading,
    Seen,
    read_behind,
    readers_of,
    reads,
    regressed,
    seen,
    slope,
)
from optimum_prune.refit.reconstruction import refitted
from optimum_prune.surgery.operation import assign, local_members, with_fewer_features

if TYPE_CHECKING:
    from optimum_prune.anatomy.axis import Axis
    from optimum_prune.anatomy.decoder import Decoder
    from optimum_prune.calibration.calibration import Calibration
    from optimum_prune.calibration.stream import Batch, Stream

WRITING = 0.2
"""The least damping of what writes, as for corrections of narrower layers."""


@dataclass(frozen=True)
class Projecting:
    """How the hidden states of a model are projected."""

    basis: Basis
    damping: float
    """Added to grams' diagonals, relative to their mean; higher stays closer to what is only projected."""
    strength: float
    """How far what writes is moved towards the hidden states of the model as it was: 0 not at all."""
    refits: bool

    @torch.no_grad()
    def weights(self, decoder: Decoder, axis: Axis, calibration: Calibration) -> dict[str, Tensor]:
        """The new values of all weights that read or write hidden states, by name; the model stays as it is."""
        found: dict[str, Tensor] = {}
        reduced: Stream = [(batch, self.basis.along(hidden)) for batch, hidden in calibration.quiet().embed(decoder)]
        for visit in calibration.walk(decoder, "Hidden states, layer by layer"):
            local = _Layer(self, visit, axis, reduced)
            new = calibration.once(f"layer {visit.index}", local.weights)
            local.put(new)
            reduced = [(batch, batch.run(local.layer.module, visit.index, hidden)) for batch, hidden in reduced]
            found |= {f"{visit.layer.prefix}{path}": value for path, value in new.items()}
            dense = visit.stream
        ends = Ends(self.basis, decoder, axis, self.damping if self.refits else None)
        return found | calibration.once("ends", partial(ends.weights, dense, reduced))


class _Layer:
    """A decoder layer of which a copy is projected, and the streams that reach both."""

    def __init__(self, projecting: Projecting, visit: LayerVisit, axis: Axis, reduced: Stream) -> None:
        self._how, self._visit, self._reduced = projecting, visit, reduced
        self._features = axis.units
        members = self._members = local_members(axis, visit.layer.prefix)
        self.layer = with_fewer_features(visit.layer, axis, projecting.basis.size)
        self._norms = norms_of(visit.layer.module, members)

    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Gives the copy new weights."""
        assign(self.layer.module, weights)

    def weights(self) -> dict[str, Tensor]:
        """What the layer is projected to."""
        found = self._projected()
        self.put(found)
        for path in self._norms_as_called():  # each sees what those in front of it are by then
            changed = {f"{path}.weight": scaled(self.layer.part(path), self._scale(path))}
            self.put(changed)
            found |= changed
        if self._how.refits:
            for block in self.layer.blocks:
                for step in (self._read, self._written):
                    changed = step(block)
                    self.put(changed)
                    found |= changed
        return found

    def _projected(self) -> dict[str, Tensor]:
        """Every weight as it is, projected; where the basis rotates, the norms' weights are folded into what reads behind them."""
        gains = self._gains() if self._how.basis.rotates else {}
        found = {}
        for member in self._members:
            value = self._visit.layer.module.get_parameter(member.path).detach()
            path = member.path.rpartition(".")[0]
            if path in self._norms and self._how.basis.rotates:
                found[member.path] = neutral(self._visit.layer.part(path), self._how.basis.size)
                continue
            if path in gains and reads(self._visit.layer.part(path), value, member.dim):
                shape = [-1 if dim == member.dim else 1 for dim in range(value.ndim)]
                value = value * gains[path].to(value.dtype).view(shape)
            found[member.path] = self._how.basis.along(value, member.dim)
        return found

    def _gains(self) -> dict[str, Tensor]:
        """Of what reads behind a norm, the gains of that norm."""
        return {path: gain(self._visit.layer.part(norm)) for path, norm in self._norms_in_front(*BLOCKS).items()}

    def _norms_in_front(self, *blocks: str) -> dict[str, str]:
        """Of what reads behind a norm in some blocks, that norm."""
        return read_behind(self._visit, self._norms, self._readers(*blocks))

    def _readers(self, *blocks: str) -> list[str]:
        """The modules of some blocks that read hidden states."""
        attention = f"{self.layer.family.attention}."
        return [
            path
            for path in readers_of(self._visit.layer, self._members)
            if (ATTENTION if f"{path}.".startswith(attention) else FEED_FORWARD) in blocks
        ]

    def _pairs(self, paths: Sequence[str], *, outputs: bool = False) -> Iterator[tuple[Batch, Seen, Seen]]:
        """What reaches or leaves modules of the layer as it was, and of the copy, batch by batch."""
        for (batch, dense), (_, reduced) in zip(self._visit.stream, self._reduced, strict=True):
            before = seen(self._visit.layer, batch, dense, paths, outputs=outputs)
            yield batch, before, seen(self.layer, batch, reduced, paths, outputs=outputs)

    def _norms_as_called(self) -> list[str]:
        """The layer's norms of hidden states, in the order in which these reach them."""

        def found() -> list[str]:
            batch, hidden = self._visit.stream[0]
            return list(seen(self._visit.layer, batch, hidden, self._norms, outputs=True))

        return processes.broadcast_from_first(found)

    def _scale(self, path: str) -> float:
        """By what the outputs of a norm are to be multiplied."""
        total, added = torch.zeros(2, dtype=torch.float64), shift(self.layer.part(path))
        for batch, before, after in self._pairs([path], outputs=True):
            wanted = batch.unpadded(self._goal(path, before[path]))
            total += regressed(batch.unpadded(after[path]), wanted, added)
        return slope(processes.all_sum(total))

    def _goal(self, path: str, output: Tensor) -> Tensor:
        """What a norm of the copy is to put out."""
        if self._how.basis.rotates:
            output = output / gain(self._visit.layer.part(path)).to(output.dtype)
        return self._how.basis.along(output)

    def _read(self, block: str) -> dict[str, Tensor]:
        """New weights of what reads hidden states in a block."""
        paths, norms = self._readers(block), self._norms_in_front(block)
        inputs = {path: norms.get(path, path) for path in paths}  # what reads behind one norm has sums in common
        size, device = self._how.basis.size, next(self.layer.module.parameters()).device
        sums = {name: Reading(size, self._features, device) for name in inputs.values()}
        first = {name: path for path, name in reversed(inputs.items())}
        for batch, before, after in self._pairs(list(first.values())):
            for name, path in first.items():
                sums[name].add(batch.unpadded(after[path]), batch.unpadded(before[path]))
        found = {}
        for member in self._members:
            path = member.path.rpartition(".")[0]
            if path in inputs and reads(
                self.layer.part(path), self.layer.module.get_parameter(member.path), member.dim
            ):
                old, new = (
                    part.module.get_parameter(member.path).detach() for part in (self._visit.layer, self.layer)
                )
                found[member.path] = sums[inputs[path]].fitted(old, new, member.dim, self._how.damping)
        return found

    def _written(self, block: str) -> dict[str, Tensor]:
        """New weights of what writes hidden states in a block."""
        if not self._how.strength or self.layer.projection(self.layer.output_of(block)).linear is None:
            return {}
        goals = [self._how.basis.along(hidden) for hidden in self._visit.behind(block)]
        own = LayerVisit(self.layer, list(self._reduced))
        found = refitted(own, block, goals, max(self._how.damping, WRITING), self._how.strength)
        return {name.removeprefix(self.layer.prefix): value for name, value in found.items()}

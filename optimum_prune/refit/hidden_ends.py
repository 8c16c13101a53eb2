"""What of a model lies outside of its layers, with fewer features of hidden states: embeddings, the last norm, the output head."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from optimum_prune.anatomy.norms import gain, neutral, norms_of, scaled, shift
from optimum_prune.machine import processes
from optimum_prune.refit.projecting import Basis, Reading, follow_size, regressed, slope

if TYPE_CHECKING:
    from optimum_prune.anatomy.axis import Axis, Member
    from optimum_prune.anatomy.decoder import Decoder
    from optimum_prune.calibration.stream import Stream


@dataclass(frozen=True)
class Ends:
    """The ends of a model that is projected.

    Args:
        damping: of the regression of the output head; None to leave that as it is projected.
    """

    basis: Basis
    decoder: Decoder
    axis: Axis
    damping: float | None

    def weights(self, dense: Stream, reduced: Stream) -> dict[str, Tensor]:
        """New values, from the hidden states behind the last layer, of the model as it was and of the projected one."""
        scale, tied = embedding_scale(self.decoder, self.axis.units, self.basis.size), self._last is self._table
        found = {member.path: self._projected(member, scale) for member in self._members}
        norms = norms_of(self.decoder.model, self._members)
        if not norms:
            return found
        original: Any = self.decoder.model.get_submodule(norms[-1])
        norm = self._copied(original, norms[-1], found)
        name, sums = f"{norms[-1]}.weight", torch.zeros(2, dtype=torch.float64)
        for before, after in _normed(original, norm, dense, reduced):
            goal = before / gain(original).to(before.dtype) if self.basis.rotates else before
            sums += regressed(after, self.basis.along(goal), shift(norm))
        times = slope(processes.all_sum(sums))
        found[name] = scaled(norm, times / scale if tied else times)
        read = [member for member in self._members if self._weight(member) is self._last]
        if tied or self.damping is None or not read:
            return found
        norm.weight.data.copy_(found[name])
        reading = Reading(self.basis.size, self.axis.units, original.weight.device)
        for before, after in _normed(original, norm, dense, reduced):
            reading.add(after, before)
        (member,) = read
        found[member.path] = reading.fitted(self._weight(member), found[member.path], member.dim, self.damping)
        return found

    @property
    def _members(self) -> list[Member]:
        inside = f"{self.decoder.family.layers}."
        return [member for member in self.axis.members if not member.path.startswith(inside)]

    def _weight(self, member: Member) -> Tensor:
        found: Tensor = self.decoder.model.get_parameter(member.path)
        return found

    @property
    def _table(self) -> Tensor:
        found: Tensor = self.decoder.model.get_input_embeddings().weight
        return found

    @property
    def _last(self) -> Tensor | None:
        head = self.decoder.model.get_output_embeddings()
        found: Tensor | None = None if head is None else head.weight
        return found

    def _projected(self, member: Member, scale: float) -> Tensor:
        """A weight as it is, projected."""
        value, norms = self._weight(member).detach(), norms_of(self.decoder.model, self._members)
        path = member.path.rpartition(".")[0]
        if self.basis.rotates and path in norms:
            return neutral(self.decoder.model.get_submodule(path), self.basis.size)
        if self.basis.rotates and self._weight(member) is self._last:
            value = value * gain(self.decoder.model.get_submodule(norms[-1])).to(value.dtype)
        found = self.basis.along(value, member.dim)
        return found * scale if self._weight(member) is self._table else found

    def _copied(self, norm: nn.Module, path: str, weights: dict[str, Tensor]) -> Any:
        """A norm with projected weights."""
        copied = copy.deepcopy(norm)
        for name, _ in norm.named_parameters(recurse=False):
            setattr(copied, name, nn.Parameter(weights[f"{path}.{name}"].clone(), requires_grad=False))
        follow_size(copied, self.axis.units, self.basis.size)
        return copied


def embedding_scale(decoder: Decoder, features: int, left: int) -> float:
    """By what embeddings are to grow where a model multiplies them by the root of the number of features."""
    scales = hasattr(decoder.model.get_input_embeddings(), "embed_scale") or "gemma" in decoder.config.model_type
    return float((features / left) ** 0.5) if scales else 1.0


def _normed(original: nn.Module, norm: nn.Module, dense: Stream, reduced: Stream) -> Iterator[tuple[Tensor, Tensor]]:
    """What a norm and its projected copy put out, batch by batch, as rows without padding."""
    for (batch, before), (_, after) in zip(dense, reduced, strict=True):
        yield batch.unpadded(original(before)), batch.unpadded(norm(after))

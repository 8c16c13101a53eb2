"""Hidden states projected, and what reads them refitted: what layers and the ends of a model have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from optimum_prune.calibration.statistics import Cross, Gram, solving_device
from optimum_prune.machine import processes
from optimum_prune.refit.solving import cholesky, damp, solved

if TYPE_CHECKING:
    from jaxtyping import Float

    from optimum_prune.anatomy.axis import Member
    from optimum_prune.anatomy.decoder import DecoderLayer
    from optimum_prune.calibration.stream import Batch, Stream
    from optimum_prune.calibration.visit import LayerVisit

Seen = Mapping[str, Tensor]
"""What reached modules or left them, by their paths."""


@dataclass(frozen=True)
class Basis:
    """What hidden states are projected on."""

    matrix: Float[Tensor, "d k"]
    """With orthonormal columns, float64."""
    rotates: bool
    """Whether its columns are directions, and not features."""

    @classmethod
    def of_features(cls, kept: Sequence[int], features: int) -> Basis:
        """One that selects some of so many features."""
        matrix = torch.zeros(features, len(kept), dtype=torch.float64)
        matrix[list(kept), torch.arange(len(kept))] = 1
        return cls(matrix, False)

    @property
    def size(self) -> int:
        """How many features are left."""
        return self.matrix.shape[1]

    def along(self, value: Tensor, dim: int = -1) -> Tensor:
        """A tensor projected along a dimension, in its dtype."""
        matrix = self.matrix.to(value.device)
        if not self.rotates:
            return value.index_select(dim, matrix.argmax(0))
        return (value.to(matrix.dtype).movedim(dim, -1) @ matrix).movedim(-1, dim).to(value.dtype).contiguous()


class Reading:
    """What reaches a matrix in the copy and in the model as it was, summed."""

    def __init__(self, size: int, features: int, device: torch.device) -> None:
        self._gram, self._cross = Gram(size, device), Cross(size, features, device)

    def add(self, after: Float[Tensor, "t k"], before: Float[Tensor, "t d"]) -> None:
        """Adds these rows."""
        self._gram.add(after)
        self._cross.add(after, before)

    def fitted(self, old: Tensor, new: Tensor, dim: int, damping: float) -> Tensor:
        """The matrix that computes best from the projected what the old one does: a ridge regression towards the new one."""
        gram = self._gram.exact
        cross = self._cross.value.to(gram.device)
        factor = cholesky(damp(gram.clone(), damping))
        before, start = (value.to(gram.device).double().movedim(dim, -1) for value in (old, new))
        lack = before.flatten(0, -2) @ cross.T - start.flatten(0, -2) @ gram
        move = solved(factor, lack.T.contiguous()).T.view(start.shape)
        return (start + move).movedim(-1, dim).to(new.device, new.dtype).contiguous()


def regressed(found: Tensor, wanted: Tensor, added: Tensor | None) -> Tensor:
    """Sums from which `slope` finds by what to multiply."""
    found, wanted = found.float(), wanted.float()
    if added is not None:
        found, wanted = found - added.float(), wanted - added.float()
    pair = torch.stack([(found * wanted).sum(), found.square().sum()])
    return pair.to(solving_device(pair.device)).double().cpu()


def slope(sums: Tensor) -> float:
    """By what to multiply."""
    return (sums[0] / sums[1]).item() if sums[1] > 0 else 1.0


def follow_size(module: nn.Module, before: int, after: int) -> None:
    """Lets norms know over how many features they are."""
    for each in module.modules():
        if getattr(each, "normalized_shape", None) == (before,):
            each.normalized_shape = (after,)  # type: ignore[assignment]


@torch.no_grad()
def seen(
    layer: DecoderLayer, batch: Batch, hidden: Tensor, paths: Sequence[str], *, outputs: bool = False
) -> dict[str, Tensor]:
    """What reaches some modules of a layer when it runs, or leaves them."""
    found: dict[str, Tensor] = {}

    def before(path: str, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        found[path] = args[0] if args else kwargs["hidden_states"]

    def behind(path: str, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        found[path] = output[0] if isinstance(output, tuple) else output

    with ExitStack() as stack:
        for path in paths:
            hook: Callable[..., None] = partial(behind if outputs else before, path)
            module = layer.part(path)
            handle = (
                module.register_forward_hook(hook)
                if outputs
                else module.register_forward_pre_hook(hook, with_kwargs=True)
            )
            stack.callback(handle.remove)
        batch.run(layer.module, layer.index, hidden)
    return found


def read_behind(visit: LayerVisit, norms: Sequence[str], readers: Sequence[str]) -> dict[str, str]:
    """Of modules that read what a norm puts out, that norm; found on one batch."""

    def found() -> dict[str, str]:
        batch, hidden = visit.stream[0]
        left = seen(visit.layer, batch, hidden, norms, outputs=True)
        reached = seen(visit.layer, batch, hidden, readers)
        pairs = {
            path: [norm for norm in norms if left[norm].flatten().equal(value.flatten())]
            for path, value in reached.items()
        }
        return {path: same[0] for path, same in pairs.items() if same}

    return processes.broadcast_from_first(found)


def norms_behind(layer: DecoderLayer, stream: Stream, norms: Sequence[str]) -> dict[str, str]:
    """Of the blocks of a layer whose outputs go through a norm before they are added, that norm; found on one batch."""

    def found() -> dict[str, str]:
        batch, hidden = stream[0]
        last = {block: layer.modules_of(block)[-1] for block in layer.blocks}
        left = seen(layer, batch, hidden, list(last.values()), outputs=True)
        reached = seen(layer, batch, hidden, norms)
        return {
            block: norm
            for block, path in last.items()
            for norm, value in reached.items()
            if left[path].flatten().equal(value.flatten())
        }

    return processes.broadcast_from_first(found)


def readers_of(layer: DecoderLayer, members: Sequence[Member]) -> list[str]:
    """The modules of a layer that read hidden states."""
    found = [
        path
        for member in members
        for path in [member.path.rpartition(".")[0]]
        if reads(layer.part(path), layer.module.get_parameter(member.path), member.dim)
    ]
    return list(dict.fromkeys(found))


def reads(module: nn.Module, value: Tensor, dim: int) -> bool:
    """Whether a dimension of a weight is that of its inputs."""
    from transformers.pytorch_utils import Conv1D

    return value.ndim > 1 and dim == (0 if isinstance(module, Conv1D) else value.ndim - 1)

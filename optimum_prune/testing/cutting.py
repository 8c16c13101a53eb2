"""A model that was cut computes what the dense model does where that which is gone is skipped, or put to zero."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from optimum_prune.anatomy.axis import Units
from optimum_prune.anatomy.decoder import Decoder
from optimum_prune.calibration.stand_ins import silenced
from optimum_prune.surgery.config import sync_config
from optimum_prune.surgery.cuts import Cuts, Decision
from optimum_prune.surgery.operation import carry_out
from optimum_prune.testing.models import logits
from optimum_prune.text.windows import Windows

if TYPE_CHECKING:
    from jaxtyping import Float

Choose = Callable[[int, int], tuple[int, ...]]
"""Which are kept, of how many, how many of them."""


def first(count: int, keep: int) -> tuple[int, ...]:
    """The first so many."""
    return tuple(range(keep))


def at_random(seed: int) -> Choose:
    """A choice by chance, others each time it is asked for."""
    generator = torch.Generator().manual_seed(seed)
    return lambda count, keep: tuple(torch.randperm(count, generator=generator)[:keep].sort().values.tolist())


def cuts_to(decoder: Decoder, choose: Choose, units: Mapping[str, int]) -> Cuts:
    """Cuts of every layer to so many units of each axis, as far as it has such axes; what is cut with them follows."""
    cuts = Cuts()
    for layer in decoder.layers:
        axes = layer.axes
        for name, keep in units.items():
            if name not in axes:
                continue
            for axis in (axes[name], *layer.followers(axes[name])):
                wanted = keep * axis.times
                kept: Units = choose(axis.units, wanted)
                if axis.groups:
                    kept = (kept, *(choose(axis.units, wanted) for _ in range(axis.groups - 1)))  # type: ignore[assignment]
                cuts = cuts.merge(Cuts.along(axis.name, {layer.index: kept}))
    return cuts


def cut(decoder: Decoder, cuts: Cuts) -> None:
    """Carries out cuts as a pass's are, and lets the config follow."""
    carry_out(decoder, Decision(cuts))
    sync_config(decoder)


def with_layers_skipped(decoder: Decoder, gone: Iterable[int], windows: Windows) -> Float[Tensor, "w t v"]:
    """Logits of the whole model, where some decoder layers hand on what they are given."""

    def hand_on(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    with ExitStack() as stack:
        for index in gone:
            stack.callback(decoder.modules[index].register_forward_hook(hand_on, with_kwargs=True).remove)
        return logits(decoder.model, windows)


def with_blocks_silenced(
    decoder: Decoder, gone: Mapping[int, Iterable[str]], windows: Windows
) -> Float[Tensor, "w t v"]:
    """Logits of the whole model, where some blocks of some layers put out zeros."""
    with ExitStack() as stack:
        for index, blocks in gone.items():
            for block in blocks:
                stack.enter_context(silenced(decoder.layer(index), block))
        return logits(decoder.model, windows)


@torch.no_grad()
def with_masked(decoder: Decoder, cuts: Cuts, windows: Windows) -> Float[Tensor, "w t v"]:
    """Logits of the whole model, where the outgoing weights of all units that are cut are zero."""
    with ExitStack() as stack:
        for weight, kept in _outgoing(decoder, cuts):
            stack.callback(weight.copy_, weight.clone())
            gone = torch.ones(weight.shape[1], dtype=torch.bool)
            gone[list(kept)] = False
            weight[:, gone] = 0
        return logits(decoder.model, windows)


def _outgoing(decoder: Decoder, cuts: Cuts) -> Iterator[tuple[Tensor, Sequence[int]]]:
    """Weights of shape (out, in), each with its inputs that stay."""
    for (index, name), kept in cuts.units.items():
        assert index is not None, "The features of hidden states have no weights through which they leave."
        layer = decoder.layer(index)
        axis = layer.axes[name]
        maps = layer.projection(axis.output).maps
        each_map: Any = kept if axis.groups else [kept]
        for weight, units in zip(maps, each_map, strict=True):
            yield weight, axis.inputs(units).tolist()

"""A model that runs with some of its units masked, and the sizes of units by which masks may begin."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from optimum_prune.anatomy.matrices import Matrix
from optimum_prune.calibration.inputs import summed_inputs
from optimum_prune.calibration.stand_ins import StandIn, layers_replaced
from optimum_prune.calibration.statistics import SquaredNorms
from optimum_prune.evaluation.losses import next_token_losses
from optimum_prune.machine import processes
from optimum_prune.selection.bernoulli import WHOLE, Kind

if TYPE_CHECKING:
    from optimum_prune.anatomy.decoder import Decoder
    from optimum_prune.calibration.calibration import Calibration
    from optimum_prune.text.windows import Windows


def some_windows(windows: Windows, tokens: int, longest: int, generator: torch.Generator) -> Windows:
    """Some of the windows, and of each a part of at most so many tokens, by chance."""
    length = min(longest, windows.length)
    count = max(1, tokens // length)
    rows = torch.randint(len(windows), (count,), generator=generator)
    start = int(torch.randint(windows.length - length + 1, (1,), generator=generator))
    part = slice(start, start + length)
    return replace(windows, tokens=windows.tokens[rows, part], mask=windows.mask[rows, part], counted=None)


class Masked:
    """A model that runs with some of its units masked, in front of the projections behind them."""

    def __init__(self, decoder: Decoder, kinds: Mapping[str, Kind]) -> None:
        self.kinds = kinds
        self._decoder = decoder
        self._features: dict[tuple[int, str], Tensor] = {}

    @contextmanager
    def ready(self) -> Iterator[Masked]:
        """Lets masks act within a `with`."""
        with ExitStack() as stack:
            for name, kind in self.kinds.items():
                for index, axis, count in kind.places if name != WHOLE else ():
                    layer = self._decoder.layer(index)
                    found = layer.axes[axis]
                    times = found.width * (found.units // count)
                    module = layer.part(found.output.rpartition(".")[0])
                    hook = partial(self._mask, (index, axis), times)
                    stack.callback(module.register_forward_pre_hook(hook).remove)
            yield self

    def _mask(self, place: tuple[int, str], times: int, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        mask = self._features[place].repeat_interleave(times)
        return (args[0] * mask.to(args[0]), *args[1:])

    @torch.no_grad()
    def loss(self, masks: Mapping[str, Tensor], windows: Windows) -> float:
        """Nats for each predicted token."""
        model, gone = self._decoder.model, set()
        for name, kind in self.kinds.items():
            for (index, axis, _), mask in zip(kind.places, kind.split(masks[name]), strict=True):
                if name == WHOLE:
                    gone |= set() if mask.all() else {index}
                else:
                    self._features[index, axis] = mask
        layers = list(self._decoder.modules)
        passed = [
            StandIn(layer, lambda hidden, *_: hidden) if index in gone else layer for index, layer in enumerate(layers)
        ]
        share = windows.share()
        losses = [0.0]
        with layers_replaced(self._decoder, passed):
            for part in share.parts(share.tokens.numel() or 1):
                device = model.get_input_embeddings().weight.device
                padding = {} if part.mask.all() else {"attention_mask": part.mask.long().to(device)}
                found = model(input_ids=part.tokens.to(device), use_cache=False, **padding).logits
                losses.append(next_token_losses(found, part.tokens.to(device), part.mask).sum().item())
        (total,) = processes.all_sums([sum(losses)])
        return total / max(int(windows.mask[:, 1:].sum()), 1)


def structured_metric(decoder: Decoder, calibration: Calibration, kinds: Mapping[str, Kind]) -> dict[str, Tensor]:
    """Of each unit, the mean over rows of `|W| ||x||` of its inputs of the projection behind it (Wanda's, by structure)."""
    found: dict[tuple[int, str], Tensor] = {}
    wanted = {(index, axis): count for kind in kinds.values() for index, axis, count in kind.places}
    for visit in calibration.walk(decoder, "Metric, layer by layer"):
        axes = {name: axis for name, axis in visit.layer.axes.items() if (visit.index, name) in wanted}
        outputs = [Matrix(axis.output, axis.output.rpartition(".")[0]) for axis in axes.values()]
        summed = summed_inputs(visit, outputs, SquaredNorms) if outputs else {}
        for name, axis in axes.items():
            (weight,), (norms,) = visit.layer.projection(axis.output).maps, summed[axis.output]
            scores = weight.double().abs().mean(0).cpu() * norms.value.sqrt().cpu()
            found[visit.index, name] = scores.view(wanted[visit.index, name], -1).mean(1)
    return {name: torch.cat([found[index, axis] for index, axis, _ in kind.places]) for name, kind in kinds.items()}

"""Scores of decoder layers from the weights, their gradients, or the hidden states around them: high means keep.

Taylor and magnitude as in Shortened LLaMA (Kim et al., arXiv 2402.02834), cosine as in ShortGPT (arXiv 2403.03853), angular as in "The
Unreasonable Ineffectiveness of the Deeper Layers" (arXiv 2403.17887).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from optimum_prune.calibration.statistics import solving_device
from optimum_prune.calibration.stream import logits
from optimum_prune.evaluation.losses import token_losses
from optimum_prune.machine import processes

if TYPE_CHECKING:
    from jaxtyping import Float

    from optimum_prune.anatomy.decoder import Decoder
    from optimum_prune.calibration.calibration import Calibration
    from optimum_prune.calibration.stream import Batch


@torch.no_grad()
def magnitudes(decoder: Decoder) -> list[float]:
    """Of each layer the sum of `|w|` over its matrices and norms, biases left out."""
    return [sum(_total(weight.float().abs()) for weight in _weights(layer)) for layer in decoder.modules]


def taylor(decoder: Decoder, calibration: Calibration) -> list[float]:
    """Of each layer the sum of `|w dL/dw|` over its matrices and norms, biases left out.

    L is the mean cross-entropy of each window, summed over windows: the gradient is summed before the absolute value is taken.
    Gradients are computed layer by layer from the last to the first, from hidden states kept before each; those of a single
    layer are ever held, in float32.
    """
    layers = decoder.modules
    with torch.no_grad():
        streams = []
        for batch, hidden in calibration.embed(decoder, calibration.windows.length):
            before = [hidden]
            for index, layer in enumerate(layers):
                before.append(calibration.activations.store(batch.run(layer, index, before[-1])))
                calibration.activations.release(before[-2])
            streams.append((batch, before))
    with _frozen(decoder.model):
        gradients = [
            calibration.activations.store(_at_the_end(decoder, batch, before.pop())) for batch, before in streams
        ]
        scores = []
        for index in calibration.track(range(len(layers) - 1, -1, -1), "Gradients, layer by layer"):
            weights = list(_weights(layers[index]))
            sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
            for position, (batch, before) in enumerate(streams):
                hidden = before.pop().detach().requires_grad_()
                with torch.enable_grad():
                    for weight in weights:
                        weight.requires_grad_()
                    output = batch.run(layers[index], index, hidden)
                    found = torch.autograd.grad(output, [hidden, *weights], gradients[position], allow_unused=True)
                gradients[position] = calibration.activations.store(found[0])
                for total, gradient in zip(sums, found[1:], strict=True):
                    if gradient is not None:  # an expert that no token reached
                        total += gradient.float()
            for weight in weights:
                weight.requires_grad_(False)
            products = zip(weights, map(processes.all_sum, sums), strict=True)
            scores.append(sum(_total((weight.detach().float() * total).abs()) for weight, total in products))
    return scores[::-1]


@torch.no_grad()
def distances(decoder: Decoder, calibration: Calibration, span: int, *, angular: bool) -> list[float]:
    """How far hidden states turn over each stretch of `span` layers, from a single pass.

    Returns:
        For the stretch that starts at layer 0, 1, ...: `1 - cos` averaged over tokens, or, if angular, `arccos / pi` averaged
        over the last tokens of the windows.
    """
    layers = decoder.modules
    totals = torch.zeros(len(layers) - span + 1, dtype=torch.float64)
    count = 0
    for batch, hidden in calibration.track(calibration.embed(decoder), f"Distances over {span} layers"):
        recent = [hidden]
        counted = _last(batch.mask) if angular else batch.mask
        count += int(counted.sum())
        for index, layer in enumerate(layers):
            recent.append(batch.run(layer, index, recent[-1]))
            if len(recent) > span:
                rows = (each[counted.to(each.device)] for each in (recent.pop(0), recent[-1]))
                before, behind = (each.to(solving_device(each.device)).double() for each in rows)
                cosine = nn.functional.cosine_similarity(before.to(behind.device), behind, dim=-1)
                away = cosine.clamp(-1, 1).arccos() / torch.pi if angular else 1 - cosine
                totals[index + 1 - span] += away.sum().cpu()
        calibration.activations.release(hidden)
    *totalled, counted_in_all = processes.all_sums([*totals, count])
    return [total / counted_in_all for total in totalled]


def _total(values: Tensor) -> float:
    """The sum, float64."""
    return values.to(solving_device(values.device)).sum(dtype=torch.float64).item()


def _last(mask: Tensor) -> Tensor:
    """True at the last token of each window that is no padding."""
    behind = mask.flip(-1).cumsum(-1).flip(-1)
    return mask & (behind == 1)


def _weights(layer: nn.Module) -> Iterator[nn.Parameter]:
    return (weight for name, weight in layer.named_parameters() if name.rpartition(".")[2] != "bias")


def _at_the_end(decoder: Decoder, batch: Batch, hidden: Float[Tensor, "w t h"]) -> Float[Tensor, "w t h"]:
    """The gradient of the loss with respect to the hidden states behind the last layer."""
    hidden = hidden.detach().requires_grad_()
    with torch.enable_grad():
        losses = [
            token_losses(logits(decoder, one, part)[0], one.tokens[0], one.mask[0]).mean()
            for one, part in batch.split(hidden)
        ]
        (gradient,) = torch.autograd.grad(torch.stack(losses).sum(), hidden)
    return gradient


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Lets no parameter of a model ask for a gradient, for the time of a `with`."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_()

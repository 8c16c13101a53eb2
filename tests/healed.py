"""Models that layers are left out of and that are healed, and how near their hidden states come to the dense model's."""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
from shortened import without
from torch import Tensor

from optimum_prune import Calibration, Decoder, Windows
from optimum_prune import testing as conformance
from optimum_prune.refit.healing import heal
from optimum_prune.surgery.operation import carry_out


def behind(decoder: Decoder, windows: Windows, index: int) -> Tensor:
    """Hidden states behind a layer, padding left out."""
    seen: list[Tensor] = []

    def hear(_, __, output):
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = decoder.modules[index].register_forward_hook(hear)
    conformance.logits(decoder.model, windows)
    handle.remove()
    return seen[0][windows.mask]


def error(wanted: Tensor, found: Tensor) -> float:
    return (wanted - found).double().square().mean().item()


def healed_model(
    dense: Decoder, windows: Windows, gone: Collection[int], damping: float = 0.1
) -> tuple[Decoder, list[tuple[int, str, float]]]:
    """A copy without these layers, healed; and of each decision which layer it was about, which projection, how far."""
    decoder = copy.deepcopy(dense)
    kept = {layer.index: () if layer.index in gone else layer.blocks for layer in decoder.layers}
    told = []
    for decision in heal(decoder, Calibration(windows), kept, damping):
        carry_out(decoder, decision)
        assert all(f".{decision.evidence['projection']}." in name for name in decision.weights)
        told.append((decision.evidence["healed"], decision.evidence["projection"], decision.evidence["strength"]))
    return without(decoder, gone), told


def with_ffn_bridged(dense: Decoder, windows: Windows, gone: range) -> Decoder:
    """A copy without these layers, where the FFN in front of them was refitted by a ridge regression of its own."""
    front = gone.start - 1
    decoder = copy.deepcopy(dense)
    if front >= 0 and "channels" in decoder.layer(front).axes:
        linear = decoder.layer(front).linear_of(decoder.layer(front).output_of("feed_forward"))
        rows = conformance.inputs_of(decoder.model, linear.module, windows)
        lack = behind(decoder, windows, gone[-1]).double() - behind(decoder, windows, front).double()
        means = (rows.mean(0), lack.mean(0)) if linear.bias is not None else (0 * rows[0], 0 * lack[0])
        rows, lack = rows - means[0], lack - means[1]
        gram = rows.T @ rows
        gram += 0.1 * gram.diagonal().mean() * torch.eye(len(gram))
        move = torch.linalg.solve(gram, rows.T @ lack).T
        with torch.no_grad():
            linear.module.weight.copy_(linear.stored(linear.weight + move))
            if linear.bias is not None:
                linear.module.bias.add_(means[1] - move @ means[0])
    return without(decoder, gone)

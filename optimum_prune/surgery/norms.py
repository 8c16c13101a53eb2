"""Norms that belong to a block and to nothing else: where the block was left out, they go with it, and no training looks for their gradients."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from optimum_prune.anatomy.shape import ATTENTION
from optimum_prune.calibration.stand_ins import answering, put_out_by

if TYPE_CHECKING:
    from torch import Tensor

    from optimum_prune.anatomy.decoder import DecoderLayer


def idle_norms(layer: DecoderLayer) -> list[str]:
    """The paths of norms that change nothing of what a decoder layer without some of its blocks puts out, found by their gradients."""
    norms = {name: child for name, child in layer.module.named_children() if _is_norm(child)}
    weights = [weight for norm in norms.values() for weight in norm.parameters()]
    if any(weight.is_meta for weight in weights):
        return []
    asked = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        found = dict(zip(map(id, weights), _gradients(layer, weights), strict=True))
    except Exception:  # a layer that asks for more than hidden states: its norms stay
        return []
    finally:
        for weight, asks in zip(weights, asked, strict=True):
            weight.requires_grad_(asks)
    return [name for name, norm in norms.items() if not any(found[id(weight)] for weight in norm.parameters())]


def _gradients(layer: DecoderLayer, weights: list[nn.Parameter]) -> list[bool]:
    """Whether each weight has anything to do with what a layer puts out; its attention, if there is one, puts out what it is given."""

    def attend(*args: Any, **kwargs: Any) -> Any:
        return put_out_by(ATTENTION, args[0] if args else kwargs["hidden_states"])

    one, size = weights[0], layer.config.hidden_size
    hidden = torch.randn(1, 2, size, generator=torch.Generator().manual_seed(0)).to(one.device, one.dtype)
    with ExitStack() as stack, torch.enable_grad():
        if ATTENTION in layer.blocks:
            stack.enter_context(answering(layer.part(layer.modules_of(ATTENTION)[-1]), attend))
        output = layer.module(hidden)
        behind: Tensor = output[0] if isinstance(output, tuple) else output
        found = torch.autograd.grad((behind * hidden).sum(), weights, allow_unused=True)
    return [gradient is not None and bool(gradient.any()) for gradient in found]


def _is_norm(module: nn.Module) -> bool:
    weights = list(module.parameters())
    return bool(weights) and not list(module.children()) and all(weight.ndim == 1 for weight in weights)

"""Norms of hidden states: which modules they are, and what they multiply by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from jaxtyping import Float

    from optimum_prune.anatomy.axis import Member


def norms_of(root: nn.Module, members: Sequence[Member]) -> list[str]:
    """The modules among those of an axis that are norms: their weights have one dimension, and they are not linear."""
    from transformers.pytorch_utils import Conv1D

    paths = dict.fromkeys(member.path.rpartition(".")[0] for member in members if member.path.endswith(".weight"))
    found = []
    for path in paths:
        module = root.get_submodule(path)
        if not isinstance(module, (nn.Linear, Conv1D, nn.Embedding)) and module.weight.ndim == 1:
            found.append(path)
    return found


@torch.no_grad()
def gain(norm: Any) -> Float[Tensor, " features"]:
    """By what a norm that divides by the root of the mean square multiplies each feature, float32."""
    ones = torch.ones_like(norm.weight)
    found: Tensor = norm(ones[None])[0].float()
    return found


@torch.no_grad()
def is_rms(norm: Any) -> bool:
    """Whether a norm divides by the root of the mean square, takes no mean off and adds nothing."""
    ones = torch.ones_like(norm.weight)[None]
    plus, minus = norm(ones), norm(-ones)
    return bool(plus.any()) and torch.allclose(plus, -minus) and getattr(norm, "bias", None) is None


def offset(norm: Any) -> float:
    """What a norm adds to its weights before it multiplies by them: 1 in Gemma, else 0."""
    if not is_rms(norm):
        return 0.0
    return float(round((gain(norm) - norm.weight.detach().float()).median().item()))


def scaled(norm: Any, scale: float) -> Tensor:
    """The weights with which a norm puts out so many times as much."""
    weight, more = norm.weight.detach(), offset(norm)
    found: Tensor = (scale * (weight.double() + more) - more).to(weight.dtype)
    return found


def shift(norm: Any) -> Tensor | None:
    """What a norm adds to its outputs."""
    bias = getattr(norm, "bias", None)
    return None if bias is None else bias.detach()


def neutral(norm: Any, size: int) -> Tensor:
    """The weights with which a norm of so many features multiplies by 1."""
    return torch.full_like(norm.weight.detach()[:size], 1 - offset(norm))

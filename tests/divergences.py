"""How far what a changed model predicts diverges from what the dense one does, by the definition."""

from __future__ import annotations

import torch

from optimum_prune import Decoder, Windows
from optimum_prune import testing as conformance
from optimum_prune.selection.divergence import STRIDE


def divergence_by_hand(dense: Decoder, changed: Decoder, windows: Windows, stride: int = STRIDE) -> float:
    """The mean over every so many-th token of what the dense model's predictions tell against those of the changed one."""
    before, after = (conformance.logits(each.model, windows).double().log_softmax(-1) for each in (dense, changed))
    divergences = (before.exp() * (before - after)).sum(-1)
    counted = windows.mask & (torch.arange(windows.mask.shape[1]) % stride == 0)
    return divergences[counted].mean().item()

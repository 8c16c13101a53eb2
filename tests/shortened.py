"""Models from which decoder layers are really removed, and what a model loses on windows of text."""

from __future__ import annotations

import copy
from collections.abc import Iterable

from torch import Tensor
from torch.nn.functional import cross_entropy

from optimum_prune import Cuts, Decoder, Windows
from optimum_prune import testing as conformance


def loss_of(logits: Tensor, windows: Windows) -> float:
    """The mean cross-entropy of logits, in nats for each predicted token that is not padding."""
    targets = windows.tokens[:, 1:].masked_fill(~windows.mask[:, 1:], -100)
    return cross_entropy(logits[:, :-1].flatten(0, 1).double(), targets.flatten()).item()


def loss(decoder: Decoder, windows: Windows) -> float:
    """What a model loses."""
    return loss_of(conformance.logits(decoder.model, windows), windows)


def without(dense: Decoder, gone: Iterable[int]) -> Decoder:
    """A copy of a model from which layers are really removed."""
    decoder, missing = copy.deepcopy(dense), set(gone)
    conformance.cut(decoder, Cuts(layers=tuple(index for index in range(len(dense)) if index not in missing)))
    return decoder


def losses_without_windows(dense: Decoder, windows: Windows, size: int) -> list[float]:
    """What each model loses from which so many consecutive layers are really removed, by the first of them."""
    starts = range(len(dense) - size + 1)
    return [loss(without(dense, range(start, start + size)), windows) for start in starts]

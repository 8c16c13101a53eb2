"""Losses of predicted tokens: the negative log-likelihood, the divergence from a reference, and what computing them takes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from optimum_prune.anatomy.workload import Cost

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    from optimum_prune.anatomy.workload import Workload

LARGEST_LOSS = 700.0
"""Nats, beyond which a perplexity is no number."""
LOGITS_PER_CHUNK = 2**22
"""Few enough that the allocator reuses their memory instead of fetching it from the system anew: three times as fast."""
CHUNKS = 3
"""Float32 copies of a chunk of logits that a loss takes."""


def next_token_losses(
    logits: Float[Tensor, "w t v"], tokens: Int[Tensor, "w t"], mask: Bool[Tensor, "w t"]
) -> Float[Tensor, " w"]:
    """Of each window, the summed negative log-likelihood of its tokens after the first, in nats, float64.

    The float32 copies that the softmax needs are made for a few tokens at a time.
    """
    return torch.stack(
        [token_losses(*window).cpu().double().sum() for window in zip(logits, tokens, mask, strict=True)]
    )


def token_losses(
    logits: Float[Tensor, "t v"], tokens: Int[Tensor, " t"], mask: Bool[Tensor, " t"]
) -> Float[Tensor, " counted"]:
    """The negative log-likelihood of each token of a window after the first, in nats, padding left out."""
    counted = mask[1:].to(logits.device)
    positions = max(1, LOGITS_PER_CHUNK // logits.shape[-1])
    starts = range(0, len(tokens) - 1, positions)
    chunks = ((logits[:-1][start : start + positions], tokens[1:][start : start + positions]) for start in starts)
    losses = (cross_entropy(some.float(), target.to(some.device).long(), reduction="none") for some, target in chunks)
    return torch.cat(list(losses))[counted]


class Reference:
    """What a model predicts at some positions, to tell how far other predictions there are from it."""

    def __init__(self, logits: Float[Tensor, "tokens v"]) -> None:
        self._pieces = max(1, logits.numel() // LOGITS_PER_CHUNK)
        self._probabilities = []
        self._negative_entropy = 0.0
        for some in logits.chunk(self._pieces):
            log_probabilities = some.float().log_softmax(-1)
            self._probabilities.append(log_probabilities.exp().flatten())
            self._negative_entropy += torch.vdot(self._probabilities[-1], log_probabilities.flatten()).item()

    def divergence(self, logits: Float[Tensor, "tokens v"]) -> float:
        """The Kullback-Leibler divergence of the reference from these predictions, in nats, summed over tokens."""
        crossed = (
            torch.vdot(probabilities, some.float().log_softmax(-1).flatten()).item()
            for probabilities, some in zip(self._probabilities, logits.chunk(self._pieces), strict=True)
        )
        return self._negative_entropy - sum(crossed)


def perplexity_of(loss: float) -> float:
    """The perplexity of a loss in nats for each token; infinite where that is too large for a number."""
    return math.exp(loss) if loss < LARGEST_LOSS else math.inf


# What it takes


def logits_memory(work: Workload, tokens: int) -> float:
    """Bytes of logits at so many positions, and of what a loss takes of them in float32."""
    chunk = min(LOGITS_PER_CHUNK, tokens * work.vocabulary)
    return tokens * work.vocabulary * work.itemsize + CHUNKS * chunk * 4


def losses_cost(work: Workload, tokens: float, at_once: int, times: float = 1) -> Cost:
    """What the output head and the losses behind it take.

    Args:
        tokens: at which losses are computed.
        at_once: of these, those whose logits are held at a time.
        times: how often all of it is done.
    """
    head = work.head() if work.offloaded or work.itemsize < 4 else 0  # read, or rearranged for 16-bit products
    return Cost(
        memory=logits_memory(work, at_once) + head,
        products=times * 2 * tokens * work.hidden * work.vocabulary,
        elements=times * 3 * tokens * work.vocabulary,
        reading=times * tokens / at_once * work.head() if work.offloaded else 0.0,
    )

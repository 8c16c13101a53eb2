"""What a model is trained by: the divergence of its predictions from a teacher's, and the likelihood of the text.

Logits of a whole vocabulary are large, so their gradient is computed with the loss, a piece at a time, and no float32 copy of all of
them is ever held.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Int


PIECE, LARGE_PIECE = 2**20, 2**24
"""Logits that are looked at at once: on a CPU few enough that what is computed of them stays in its cache, three times as fast."""
SMALLEST = 1e-37
"""Probabilities below count as this."""


@dataclass(frozen=True)
class Mixed:
    """How much of each loss counts, and how soft the predictions are that are compared."""

    alpha: float = 0.0
    """How much the likelihood of the text counts; the divergence counts for the rest."""
    temperature: float = 1.0


@dataclass(frozen=True)
class Kept:
    """What is kept of a teacher's predictions: the likeliest tokens; all others together are one."""

    log_probabilities: Float[Tensor, "n k"]
    """Of the kept tokens, at the temperature at which they are to be compared."""
    tokens: Int[Tensor, "n k"]


def text_loss(logits: Float[Tensor, "n v"], targets: Int[Tensor, " n"]) -> Tensor:
    """The summed negative log-likelihood of tokens, in nats."""

    def piece(some: Tensor, where: slice) -> tuple[Tensor, Tensor]:
        wanted = targets[where, None]
        log_probabilities = some.float().log_softmax(-1)
        loss = -log_probabilities.gather(-1, wanted).sum()
        gradient = log_probabilities.exp_()
        gradient.scatter_add_(-1, wanted, gradient.new_full((), -1.0).expand(wanted.shape))
        return loss, gradient

    return _by_pieces(logits, piece)


def divergence(logits: Float[Tensor, "n v"], teacher: Float[Tensor, "n v"], temperature: float = 1.0) -> Tensor:
    """The Kullback-Leibler divergence of a teacher's predictions from these, in nats, summed over tokens.

    Multiplied by the temperature squared, so that its gradient is as large at any temperature (Hinton et al., arXiv 1503.02531).
    """

    def piece(some: Tensor, where: slice) -> tuple[Tensor, Tensor]:
        mine = (some.float() / temperature).log_softmax(-1)
        its = (teacher[where].float() / temperature).log_softmax(-1)
        probabilities = its.exp()
        loss = torch.vdot(probabilities.flatten(), its.sub_(mine).flatten())
        return loss * temperature**2, mine.exp_().sub_(probabilities).mul_(temperature)

    return _by_pieces(logits, piece)


def divergence_of_kept(logits: Float[Tensor, "n v"], kept: Kept, temperature: float = 1.0) -> Tensor:
    """The same of what is kept of a teacher's predictions, whose other tokens count as one."""

    def piece(some: Tensor, where: slice) -> tuple[Tensor, Tensor]:
        softened = some if temperature == 1 else some.float() / temperature
        gradient = softened.softmax(-1, dtype=torch.float32)
        its, tokens = kept.log_probabilities[where].float(), kept.tokens[where].long()
        own, probabilities = gradient.gather(-1, tokens), its.exp()
        rest, others = _rest(own), _rest(probabilities)
        apart = probabilities * (its - own.clamp_min(SMALLEST).log())
        loss = apart.sum() + (others * (others / rest).log()).sum()
        # The others' likelihood is spread over them as the model itself spreads it.
        gradient.mul_((1 - others / rest)[:, None])
        gradient.scatter_(-1, tokens, own - probabilities)
        return loss * temperature**2, gradient if temperature == 1 else gradient.mul_(temperature)

    return _by_pieces(logits, piece)


def _rest(probabilities: Float[Tensor, "n k"]) -> Float[Tensor, " n"]:
    """What is left of 1."""
    return 1 - probabilities.sum(-1).clamp(max=1 - 1e-6)


def relative_error(found: Float[Tensor, "*n h"], wanted: Float[Tensor, "*n h"]) -> Tensor:
    """The squared error of hidden states relative to those that are wanted, the mean over tokens: those of enormous activations count as any."""
    wanted = wanted.float()
    return ((found.float() - wanted).square().sum(-1) / wanted.square().sum(-1).clamp_min(1e-12)).mean()


def keep_likeliest(logits: Float[Tensor, "n v"], count: int, temperature: float = 1.0) -> Kept:
    """The likeliest tokens of predictions."""
    values, tokens = logits.topk(min(count, logits.shape[-1] - 1), dim=-1)
    total = (logits.float() / temperature).logsumexp(-1, keepdim=True)
    return Kept(values.float() / temperature - total, tokens)


Piece = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""From some of the logits, and which they are, their loss and its gradient."""


def _by_pieces(logits: Tensor, piece: Piece) -> Tensor:
    summed: Tensor = _ByPieces.apply(logits, piece)  # type: ignore[no-untyped-call]  # torch declares no types here
    return summed


class _ByPieces(torch.autograd.Function):
    """A sum over tokens whose gradient is computed with it."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, piece: Piece) -> Tensor:
        gradient, total = torch.empty_like(logits), logits.new_zeros((), dtype=torch.float32)
        rows = max(1, (PIECE if logits.device.type == "cpu" else LARGE_PIECE) // logits.shape[-1])
        for start in range(0, len(logits), rows):
            where = slice(start, start + rows)
            loss, gradient[where] = piece(logits[where], where)
            total += loss
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * above[0].to(gradient.dtype), None

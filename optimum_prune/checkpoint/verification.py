"""Verification of a saved checkpoint: loaded again, it must compute what the model that was saved computes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optimum_prune.checkpoint.caches import cache_of
from optimum_prune.checkpoint.loading import Loading, reload
from optimum_prune.errors import VerificationError, found_no_memory, reason

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jaxtyping import Float, Int
    from transformers import PreTrainedModel

PROBE_WINDOWS, PROBE_TOKENS, PROBE_DECODED = 2, 32, 8
ROUNDING, ROUNDING_FINE = 4, 16
"""A reloaded model may differ by this many units in the last place of its largest logit, and by more in float32, where products round by where
in memory their operands lie; mostly it does by none."""
CACHE_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.15}
"""How far logits computed with a cache may be from those without, relative to their spread."""


@dataclass(frozen=True)
class Probe:
    """What a model computes on a few tokens; what is reloaded must compute the same."""

    tokens: Int[Tensor, "windows length"]
    plain: Float[Tensor, "windows decoded vocabulary"]
    """Logits at the last positions, without a cache."""
    cached: Float[Tensor, "windows decoded vocabulary"]
    """The same, decoded token by token with a cache."""
    attention: str | None = None
    """By what transformers computed attention, which no checkpoint says; another rounds otherwise."""


@dataclass(frozen=True)
class Verification:
    """How far a reloaded model is from the one that was saved."""

    max_logit_difference: float
    max_logit_difference_with_cache: float
    cached_against_uncached: float
    """Distance of logits with a cache from those without, relative to the spread of the latter."""


def probe(model: PreTrainedModel, tokens: Int[Tensor, "windows length"]) -> Probe:
    """What a model computes on the beginning of a few windows, with and without a cache.

    Raises:
        VerificationError: it does not run, or what it computes is not finite.
    """
    try:
        found = _probe(model, tokens)
    except RuntimeError as error:  # as of sizes that do not go together once there is a cache
        if found_no_memory(error):
            raise
        raise VerificationError(
            f"The model cannot generate token by token: {reason(error)} Look for a size in its config.json that cannot be."
        ) from error
    if not (found.plain.isfinite().all() and found.cached.isfinite().all()):
        raise VerificationError(
            "The model computes numbers that are not finite, so nothing can be compared with it. Compute in bfloat16 or float32, or look for "
            "a number in its config.json that cannot be."
        )
    return found


@torch.no_grad()
def _probe(model: PreTrainedModel, tokens: Int[Tensor, "windows length"]) -> Probe:
    device = model.get_input_embeddings().weight.device
    few = tokens[:PROBE_WINDOWS, :PROBE_TOKENS].to(device)
    few = few.repeat(2, 1) if len(few) == 1 else few  # products with one vector round as the weights lie in memory
    decoded = min(PROBE_DECODED, few.shape[1] - 1)
    plain = model(input_ids=few, use_cache=False).logits[:, -decoded:]
    cached = torch.cat(list(_decode(model, few, decoded)), dim=1)
    return Probe(few.cpu(), plain.float().cpu(), cached.float().cpu(), model.config._attn_implementation)


def _decode(model: PreTrainedModel, tokens: Tensor, decoded: int) -> Iterator[Tensor]:
    start = tokens.shape[1] - decoded
    output = model(input_ids=tokens[:, :start], use_cache=True)
    for position in range(start, tokens.shape[1]):
        output = model(input_ids=tokens[:, position : position + 1], use_cache=True, **cache_of(output, model))
        yield output.logits


def verify(folder: Path, expected: Probe, loading: Loading) -> tuple[PreTrainedModel, Verification]:
    """Reloads a saved checkpoint with stock transformers and compares its logits with those of the model that was saved.

    Args:
        expected: what the model that was saved computes.
        loading: how to load it; in the dtype of that model.

    Returns:
        The reloaded model, and how far it is from the saved one.

    Raises:
        VerificationError: keys that are missing, unexpected or of another shape, or logits that differ.
    """
    model = reload(folder, loading)
    if expected.attention is not None and model.config._attn_implementation != expected.attention:
        model.set_attn_implementation(expected.attention)
    found = probe(model, expected.tokens)
    verification = Verification(
        max_logit_difference=_difference(found.plain, expected.plain),
        max_logit_difference_with_cache=_difference(found.cached, expected.cached),
        cached_against_uncached=((found.cached - found.plain).std() / found.plain.std()).item(),
    )
    _judge(verification, expected, loading.dtype)
    return model, verification


def _difference(found: Tensor, expected: Tensor) -> float:
    return (found - expected).abs().max().item()


def _judge(verification: Verification, expected: Probe, dtype: torch.dtype) -> None:
    places = ROUNDING_FINE if dtype in (torch.float32, torch.float64) else ROUNDING
    allowed = places * torch.finfo(dtype).eps * expected.plain.abs().max().item()
    worst = max(verification.max_logit_difference, verification.max_logit_difference_with_cache)
    if not worst <= allowed:
        raise VerificationError(
            f"The reloaded model's logits differ from the saved model's by up to {worst:.3g}; {allowed:.3g} would be rounding. This "
            f"architecture does not survive saving in this form; please report it."
        )
    if not verification.cached_against_uncached <= CACHE_TOLERANCE.get(dtype, CACHE_TOLERANCE[torch.bfloat16]):
        raise VerificationError(
            f"With a cache, the reloaded model's logits differ from those without by {verification.cached_against_uncached:.3g} of their "
            f"spread, so generation would go wrong. Please report it with the recipe and the architecture."
        )

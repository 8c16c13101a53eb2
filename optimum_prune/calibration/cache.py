"""What a model keeps of the tokens that it has read, to read more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from optimum_prune.anatomy.decoder import Decoder

TRIED = 4
"""Tokens on which it is seen what a model keeps of each."""


@torch.no_grad()
def cache_bytes(decoder: Decoder, batch: int, context: int) -> list[float]:
    """What each layer of a model keeps of so many sequences of so many tokens, as the model itself keeps it."""
    device = decoder.model.get_input_embeddings().weight.device
    tokens = torch.zeros(1, TRIED, dtype=torch.long, device=device)
    kept = decoder.model(input_ids=tokens, use_cache=True, logits_to_keep=1).past_key_values
    return [batch * _bytes_of_layer(each, context) for each in kept.layers]


def _bytes_of_layer(kept: Any, context: int) -> float:
    """Of one sequence; a layer that looks back only so far keeps no more."""
    longest = min(context, getattr(kept, "sliding_window", None) or context)
    size: int = sum(each.numel() * each.element_size() for each in (kept.keys, kept.values))
    return size / TRIED * longest

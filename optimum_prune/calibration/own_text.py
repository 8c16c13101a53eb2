"""Text that a model writes itself, to calibrate on beside the text that is given.

What is fitted to little text of one kind loses more on other text of that kind, and most on every other kind. What a model writes when it
is asked for nothing is of all the kinds that it was trained on, and what it writes behind a passage of the given text is of the same kind; so
weights that are fitted to that as well lose less on either (self-generated calibration text; Williams et al., arXiv 2410.17170). Tokens
are drawn from the model's predictions as they are.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from optimum_prune.anatomy.workload import Cost, Workload
from optimum_prune.calibration.cache import cache_bytes
from optimum_prune.machine import processes
from optimum_prune.machine.memory import give_back
from optimum_prune.text.windows import Windows

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from optimum_prune.anatomy.decoder import Decoder
    from optimum_prune.anatomy.shape import Shape

PIECE = 256
"""Tokens that are written in one go; a longer window has several pieces. Every token takes a run of the model, however many pieces there are."""
PROMPT = 64
"""Tokens of a passage that is continued, or a quarter of a shorter piece."""
MEMORY = 2**28
"""Bytes that keys and values of the pieces that are written at a time may take."""
TIDIED = 32
"""Tokens after which memory is given back: keys and values grow, and what they leave behind is too small for those that follow."""
SLOWER = 4
"""How much longer a token takes to be written than to be read, in a few dozens of pieces at a time."""
IN_FLOAT32 = "optimum_prune_sdpa_in_float32"
"""A way to attend, by the name that transformers has for it."""
SOURCE = "text of the model's own"
"""Where such windows are from."""


@torch.no_grad()
def own_text(decoder: Decoder, given: Windows, count: int, *, continuing: bool = False) -> Windows:
    """So many windows of a model's own text, each as long as those given; the same again for the same model and text.

    Args:
        continuing: whether each piece continues a passage of the given text, or else only its first token is given.
    """

    def written() -> Tensor:
        device = decoder.model.get_input_embeddings().weight.device
        length = min(given.length, PIECE)
        pieces = -(-given.length // length)
        generator = torch.Generator().manual_seed(zlib.crc32(given.tokens.cpu().numpy().tobytes()))
        begin = partial(_passages, size=max(min(PROMPT, length // 4), 1)) if continuing else _starts
        starts = begin(given, count * pieces, generator).to(device)
        with _attending_from_few(decoder, device):
            some = torch.split(starts, _at_once(decoder, length, len(starts)))
            parts = [_written(decoder, each, length, generator) for each in some]
        return torch.cat(parts).view(count, -1)[:, : given.length].cpu()

    return Windows.from_tokens(processes.broadcast_from_first(written), SOURCE, given.bos)


def _starts(given: Windows, count: int, generator: torch.Generator) -> Int[Tensor, "pieces 1"]:
    """The tokens that pieces begin with: as the given windows do where they all begin alike, or else by chance with one that is in them."""
    if given.bos:
        return given.tokens[:1, :1].long().cpu().expand(count, 1)
    known: Tensor = torch.unique(given.tokens[given.mask].cpu()).long()
    return known[torch.randint(len(known), (count, 1), generator=generator)]


def _passages(given: Windows, count: int, generator: torch.Generator, size: int) -> Int[Tensor, "pieces size"]:
    """Passages of the given windows, of which no token is padding; behind the token with which they begin, where they all begin alike."""
    tokens, first = given.tokens.long().cpu(), int(given.bos)
    whole = given.mask.cpu().unfold(1, size, 1).all(-1)
    whole[:, :first] = False
    places = whole.nonzero()
    if not len(places):  # windows are shorter than that
        return _starts(given, count, generator)
    rows, columns = places[torch.randint(len(places), (count,), generator=generator)].T
    passages = tokens[rows[:, None], columns[:, None] + torch.arange(size - first)]
    return torch.cat([tokens[:1, :1].expand(count, 1), passages], dim=1) if first else passages


@cache
def _in_float32() -> str:
    """The name by which transformers knows attention that is computed in float32, whatever the dtype of the model."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **others: Any
    ) -> tuple[Tensor, None]:
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.float()
        output, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, **others)
        return output.to(query.dtype), None

    AttentionInterface.register(IN_FLOAT32, attend)
    AttentionMaskInterface.register(IN_FLOAT32, sdpa_mask)
    return IN_FLOAT32


@contextmanager
def _attending_from_few(decoder: Decoder, device: torch.device) -> Iterator[None]:
    """Lets a model attend in float32: from one token of each piece, a CPU does so several times as fast as in bfloat16."""
    model, before = decoder.model, decoder.config._attn_implementation
    slow = device.type == "cpu" and model.dtype == torch.bfloat16 and before == "sdpa"
    if slow:
        model.set_attn_implementation(_in_float32())
    try:
        yield
    finally:
        if slow:
            model.set_attn_implementation(before)


def _at_once(decoder: Decoder, length: int, count: int) -> int:
    """How many of so many pieces are written at a time, much the same number each time."""
    fits = max(int(MEMORY // max(math.fsum(cache_bytes(decoder, 1, length)), 1)), 1)
    return -(-count // -(-count // fits))


def _written(
    decoder: Decoder, tokens: Int[Tensor, "pieces begun"], length: int, generator: torch.Generator
) -> Int[Tensor, "pieces length"]:
    """Pieces of text, a token of all of them at a time."""
    past, unread = None, tokens[:, -1:]
    if tokens.shape[1] > 1:
        # Without the head: from a part of hidden states, PyTorch's CPU kernels multiply with a copy of it for each piece.
        past = decoder.model.base_model(input_ids=tokens[:, :-1], use_cache=True).past_key_values
    while tokens.shape[1] < length:
        output = decoder.model(input_ids=unread, past_key_values=past, use_cache=True, logits_to_keep=1)
        past = output.past_key_values
        unread = _drawn(output.logits[:, -1].float().cpu(), generator).to(tokens.device)
        tokens = torch.cat([tokens, unread], dim=1)
        if tokens.shape[1] % TIDIED == 0:
            give_back()
    return tokens


def _drawn(logits: Float[Tensor, "pieces v"], generator: torch.Generator) -> Int[Tensor, "pieces 1"]:
    """A token of each piece, by chance as it is predicted: `torch.multinomial` takes forty times as long."""
    upto = logits.softmax(-1).cumsum(-1)
    by_chance = torch.rand(len(upto), 1, generator=generator) * upto[:, -1:]
    return torch.searchsorted(upto, by_chance, right=True).clamp_(max=upto.shape[1] - 1)


def own_text_cost(work: Workload, shape: Shape, count: int) -> Cost:
    """What writing so many windows takes."""
    written = work.on(count)
    running = written.run_all(shape.layers, written.tokens)
    head = Cost(products=2 * written.tokens * work.hidden * work.vocabulary)
    return running.followed_by(head).times(SLOWER).with_memory(MEMORY)

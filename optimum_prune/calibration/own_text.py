"""Text that a model writes itself, to calibrate on beside the text that is given.

What is fitted to text of one kind loses most on every other kind. What a model writes when it is asked for nothing is of all the kinds
that it was trained on; so weights that are fitted to that as well lose far less there (self-generated calibration text; Williams et
al., arXiv 2410.17170). Tokens are drawn from the model's predictions as they are, each piece of text from a token of the given text on.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optimum_prune.anatomy.workload import Cost, Workload
from optimum_prune.machine import processes
from optimum_prune.text.windows import Windows

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from optimum_prune.anatomy.decoder import Decoder
    from optimum_prune.anatomy.shape import Shape

PIECE = 256
"""Tokens that are written in one go; a longer window has several pieces. Every token takes a run of the model, however many pieces there are."""
MEMORY = 2**29
"""Bytes that keys and values of the pieces that are written at a time may take."""
SLOWER = 6
"""How much longer a token takes to be written than to be read, in a few dozens of pieces at a time."""
SOURCE = "text of the model's own"
"""Where such windows are from."""


@torch.no_grad()
def own_text(decoder: Decoder, given: Windows, count: int) -> Windows:
    """So many windows of a model's own text, each as long as those given; the same again for the same model and text."""

    def written() -> Tensor:
        device = decoder.model.get_input_embeddings().weight.device
        length = min(given.length, PIECE)
        pieces = -(-given.length // length)
        generator = torch.Generator().manual_seed(zlib.crc32(given.tokens.cpu().numpy().tobytes()))
        starts = _starts(given, count * pieces, generator).to(device)
        parts = [_written(decoder, some, length, generator) for some in torch.split(starts, _at_once(decoder, length))]
        return torch.cat(parts).view(count, -1)[:, : given.length].cpu()

    return Windows.from_tokens(processes.broadcast_from_first(written), SOURCE, given.bos)


def _starts(given: Windows, count: int, generator: torch.Generator) -> Int[Tensor, "pieces 1"]:
    """The tokens that pieces begin with: as the given windows do where they all begin alike, or else by chance with one that is in them."""
    if given.bos:
        return given.tokens[:1, :1].long().cpu().expand(count, 1)
    known: Tensor = torch.unique(given.tokens[given.mask].cpu()).long()
    return known[torch.randint(len(known), (count, 1), generator=generator)]


def _at_once(decoder: Decoder, length: int) -> int:
    """How many pieces are written at a time."""
    config = decoder.config
    of_piece = 2 * length * config.num_hidden_layers * config.hidden_size * decoder.model.dtype.itemsize
    return max(int(MEMORY // of_piece), 1)


def _written(
    decoder: Decoder, tokens: Int[Tensor, "pieces 1"], length: int, generator: torch.Generator
) -> Int[Tensor, "pieces length"]:
    """Pieces of text, a token of all of them at a time."""
    past = None
    for _ in range(length - 1):
        output = decoder.model(input_ids=tokens[:, -1:], past_key_values=past, use_cache=True)
        past = output.past_key_values
        drawn = _drawn(output.logits[:, -1].float().cpu(), generator)
        tokens = torch.cat([tokens, drawn.to(tokens.device)], dim=1)
    return tokens


def _drawn(logits: Float[Tensor, "pieces v"], generator: torch.Generator) -> Int[Tensor, "pieces 1"]:
    """A token of each piece, by chance as it is predicted."""
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)


def own_text_cost(work: Workload, shape: Shape, count: int) -> Cost:
    """What writing so many windows takes."""
    written = work.on(count)
    running = written.run_all(shape.layers, written.tokens)
    head = Cost(products=2 * written.tokens * work.hidden * work.vocabulary)
    return running.followed_by(head).times(SLOWER).with_memory(MEMORY)

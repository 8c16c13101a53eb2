"""Tokens of a text, however long it is: tokenized in pieces that overlap, and joined where both have the same tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Int
    from transformers import PreTrainedTokenizerBase

PIECE = 2**20
"""Characters that are tokenized at a time."""
OVERLAP = 2**12
"""Characters that a piece shares with the next, to find where both are cut into the same tokens."""
ALIKE = 32
"""As many tokens have to be alike there, and as many places are looked at."""


def tokenize(text: str, tokenizer: PreTrainedTokenizerBase) -> Int[Tensor, " tokens"]:
    """The tokens of a text, of a long one piece by piece: a tokenizer takes more than 100 bytes of memory for each character."""
    if len(text) <= PIECE or not _tells_offsets(tokenizer):
        return _encoded(text, tokenizer)[0]
    (tokens, begins), pieces = _encoded(text[:PIECE], tokenizer), []
    for start in range(PIECE - OVERLAP, len(text) - OVERLAP, PIECE - OVERLAP):
        more, later = _encoded(text[start : start + PIECE], tokenizer)
        later += start
        meeting = _meeting(tokens, begins, more, later)
        if meeting is None:
            return _encoded(text, tokenizer)[0]
        pieces.append(tokens[: meeting[0]])
        tokens, begins = more[meeting[1] :], later[meeting[1] :]
    return torch.cat([*pieces, tokens])


def _tells_offsets(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer can tell where tokens begin: those written in Rust can, and some others do not even know the question."""
    return bool(getattr(tokenizer, "is_fast", False))


def _encoded(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[Int[Tensor, " tokens"], Int[Tensor, " tokens"]]:
    """The tokens of a text, and at which of its characters each begins, if the tokenizer can tell."""
    encoded = tokenizer(
        text,
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=_tells_offsets(tokenizer),
        verbose=False,
    )
    begins = [begin for begin, _ in encoded.get("offset_mapping", ())]
    return torch.tensor(encoded["input_ids"], dtype=torch.long), torch.tensor(begins, dtype=torch.long)


def _meeting(
    tokens: Int[Tensor, " a"], begins: Int[Tensor, " a"], more: Int[Tensor, " b"], later: Int[Tensor, " b"]
) -> tuple[int, int] | None:
    """Where, in each of two pieces of a text that overlap, the same `ALIKE` tokens begin at the same characters, if anywhere."""
    middle = int(later[0]) + OVERLAP // 2
    first = int(torch.searchsorted(begins, middle))
    for left in range(first, min(first + ALIKE, len(begins) - ALIKE + 1)):
        right = int(torch.searchsorted(later, begins[left]))
        same, other = slice(left, left + ALIKE), slice(right, right + ALIKE)
        if torch.equal(tokens[same], more[other]) and torch.equal(begins[same], later[other]):
            return left, right
    return None

"""Tokenizers that read nothing: of some kinds, transformers makes one without a word where the files of the vocabulary are missing."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatch
from typing import TYPE_CHECKING

from optimum_prune.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILES = ("tokenizer.json", "tekken.json", "*.model", "*.model.v*", "*.tiktoken", "*vocab*")
"""Names of files that hold a vocabulary."""
SAMPLE = "the one 12 la и в の 的 ال"
"""Of which any tokenizer that was made of texts reads something."""


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, name: str, files: Iterable[str]) -> None:
    """Refuses a tokenizer without a file for its vocabulary that knows no letter and no digit, so that every text would be read as nothing.

    Args:
        name: of the model.
        files: the names of all its files, as far as they are known.

    Raises:
        CheckpointError: it is one.
    """
    if any(fnmatch(file, pattern) for file in files for pattern in FILES):
        return
    try:
        unread = {*tokenizer.all_special_ids, getattr(tokenizer, "unk_token_id", None)}
        tokens = [token for token in tokenizer(SAMPLE, add_special_tokens=False)["input_ids"] if token not in unread]
        texts = [tokenizer.decode([token]) for token in tokens]
    except Exception:  # of a tokenizer of another kind, which reads texts when it is asked to as it will be
        return
    if not any(character.isalnum() for text in texts for character in text):
        raise CheckpointError(
            f"The tokenizer of {name} reads nothing, as one does whose vocabulary is missing. Fetch its files again, such as tokenizer.json "
            f"or tokenizer.model."
        )

"""Conversations: rows that hold messages, written as the tokenizer's chat template does, and where in that the answers are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from optimum_prune.errors import TextError, cut, reason

if TYPE_CHECKING:
    from jaxtyping import Bool, Int
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

ROLE, CONTENT, ANSWERS = "role", "content", "assistant"


@dataclass(frozen=True)
class Conversation:
    """What was said, in order."""

    messages: tuple[Mapping[str, str], ...]
    where: str
    """Which row of which text it is, for errors."""

    def written(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """All of it as a text.

        Raises:
            TextError: the tokenizer has no chat template, or that refuses it.
        """
        return _written(self, self.messages, tokenizer)

    def tokens(self, tokenizer: PreTrainedTokenizerBase) -> tuple[Int[Tensor, " tokens"], Bool[Tensor, " tokens"]]:
        """Its tokens, and whether each is of an answer, the end of the answer included.

        Raises:
            TextError: likewise, or nobody can tell where answers are.
        """
        text, tokens, answered = self.written(tokenizer), [], []
        for start, end, is_answer in self._parts(text, tokenizer):
            part = tokenizer(text[start:end], add_special_tokens=False, verbose=False)["input_ids"]
            tokens += part
            answered += [is_answer] * len(part)
        return torch.tensor(tokens, dtype=torch.int32), torch.tensor(answered, dtype=torch.bool)

    def _parts(self, text: str, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, int, bool]]:
        """The parts of the written text, each with its begin, its end, and whether it is an answer."""
        parts, behind = [], 0
        for number, message in enumerate(self.messages):
            if message[ROLE] != ANSWERS or not message[CONTENT].strip():
                continue
            before = _written(self, self.messages[:number], tokenizer, asked=True) if number else ""
            after = _written(self, self.messages[: number + 1], tokenizer)
            if not text.startswith(before) or not text.startswith(after):
                raise TextError(
                    f"{self.where} is written by the tokenizer's chat template so that what comes later changes what was said before, and nobody "
                    f"can tell where the answers are. Keep one answer in each conversation, or train on another text."
                )
            parts += [(behind, len(before), False), (len(before), len(after), True)]
            behind = len(after)
        return [*parts, (behind, len(text), False)]


def conversation_in(row: Any, where: str) -> Conversation | None:
    """The conversation that a row holds; None if it holds none."""
    if not isinstance(row, Sequence) or isinstance(row, (str, bytes)) or not row:
        return None
    messages = [message for message in row if isinstance(message, Mapping)]
    said = [message for message in messages if all(isinstance(message.get(key), str) for key in (ROLE, CONTENT))]
    if len(said) < len(row):
        return None
    return Conversation(tuple({key: message[key] for key in (ROLE, CONTENT)} for message in said), where)


def _written(
    conversation: Conversation, messages: Sequence[Mapping[str, str]], tokenizer: Any, *, asked: bool = False
) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise TextError(
            f"{conversation.where} is a conversation, and the model's tokenizer has no chat template to write it with. Name a text of documents."
        )
    try:
        written: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=asked)
    except Exception as error:  # whatever a template does not like
        raise TextError(
            f"{conversation.where} cannot be written by the tokenizer's chat template: {cut(reason(error), 200)} Mend the row, or leave it out."
        ) from error
    return written

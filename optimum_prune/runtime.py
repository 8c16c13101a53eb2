"""What a checkpoint or an artefact computes, whatever runs it, and how far that is from what it was made from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from transformers import PreTrainedModel

WINDOWS, TOKENS, PROMPT, GENERATED = 4, 64, 24, 16
WITH_CACHE = {"float32": 0.02, "float16": 0.1, "bfloat16": 0.3}
"""By how much logits without a cache may fall short of the largest, relative to their spread, for tokens chosen with one."""


class Runtime(ABC):
    """A model that was opened by whatever runs it. It takes any number of windows of any length that the model can take."""

    dtype: str
    """What it computes in, such as "float32"."""

    @abstractmethod
    def logits(self, tokens: Int[Tensor, "w t"]) -> Float[Tensor, "w t v"]:
        """Of the token that follows each token; float32, on the CPU. No token is padding."""

    @abstractmethod
    def generate(self, tokens: Int[Tensor, " t"], count: int) -> list[int]:
        """The `count` tokens that follow, each the most likely, token by token with the runtime's cache."""


class TransformersRuntime(Runtime):
    """A checkpoint in transformers."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.dtype = str(model.dtype).removeprefix("torch.")

    @torch.no_grad()
    def logits(self, tokens: Int[Tensor, "w t"]) -> Float[Tensor, "w t v"]:
        """As `Runtime.logits`."""
        found: Tensor = self.model(input_ids=tokens.to(self.model.device), use_cache=False).logits
        return found.float().cpu()

    @torch.no_grad()
    def generate(self, tokens: Int[Tensor, " t"], count: int) -> list[int]:
        """As `Runtime.generate`."""
        found: list[int] = []
        ahead, cache = tokens[None].to(self.model.device), None
        for _ in range(count):
            output = self.model(input_ids=ahead, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            ahead = output.logits[:, -1].argmax(-1, keepdim=True)
            found.append(int(ahead))
        return found


def open_in_transformers(folder: Path, device: str, dtype: str = "auto", **arguments: Any) -> TransformersRuntime:
    """A checkpoint folder as `AutoModelForCausalLM.from_pretrained` reads it.

    Raises:
        CheckpointError: weights that cannot be read, or are missing, so that they would be random.
    """
    from optimum_prune.checkpoint import load_model

    return TransformersRuntime(load_model(folder, dtype=dtype, device_map=device, **arguments))


@dataclass(frozen=True)
class Expected:
    """What a checkpoint computes on some text; what is made from it must compute about the same."""

    tokens: Int[Tensor, "windows length"]
    logits: Float[Tensor, "windows length vocabulary"]
    generated: Int[Tensor, " generated"]
    """What it puts behind the first `prompt` tokens of the first window."""

    @property
    def prompt(self) -> Int[Tensor, " prompt"]:
        """What generation begins with."""
        return self.tokens[0, :PROMPT]

    @classmethod
    def of(cls, runtime: Runtime, tokens: Int[Tensor, "windows length"]) -> Expected:
        """What a runtime computes on the beginning of a few windows."""
        few = tokens[:WINDOWS, :TOKENS].contiguous()
        return cls(few, runtime.logits(few), torch.tensor(runtime.generate(few[0, :PROMPT], GENERATED)))


@dataclass(frozen=True)
class Comparison:
    """How far what was made is from what it was made from."""

    difference: float
    """Of logits on text, relative to their spread: standard deviation of the difference by that of the logits."""
    with_cache: float
    """By how much logits at most fall short of the largest, relative to their spread, for the tokens that generation with a cache
    chose; 0 if each was the most likely."""
    same_tokens: int
    """How many tokens generation begins with that both agree on."""
    generated: int


def compare(runtime: Runtime, expected: Expected) -> Comparison:
    """Runs what was made on the same text."""
    found = runtime.logits(expected.tokens)
    generated = runtime.generate(expected.prompt, len(expected.generated))
    behind = torch.cat([expected.prompt, torch.tensor(generated)])[None]
    judged = runtime.logits(behind)[0, len(expected.prompt) - 1 : -1]
    short = judged.amax(-1) - judged.gather(-1, torch.tensor(generated)[:, None])[:, 0]
    same = [a == b for a, b in zip(generated, expected.generated.tolist(), strict=True)]
    return Comparison(
        difference=relative_difference(found, expected.logits),
        with_cache=(short.max() / judged.std()).item(),
        same_tokens=same.index(False) if False in same else len(same),
        generated=len(same),
    )


def relative_difference(found: Float[Tensor, "..."], expected: Float[Tensor, "..."]) -> float:
    """The standard deviation of the difference relative to that of what was expected."""
    return ((found - expected).double().std() / expected.double().std()).item()

"""Runtimes: one interface for whatever runs a model, and transformers behind it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optimum_prune.checkpoint.caches import cache_of
from optimum_prune.checkpoint.loading import load_model

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from transformers import PreTrainedModel


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
        ahead, cache = tokens[None].to(self.model.device), dict[str, Any]()
        for _ in range(count):
            output = self.model(input_ids=ahead, use_cache=True, **cache)
            cache = cache_of(output, self.model)
            ahead = output.logits[:, -1].argmax(-1, keepdim=True)
            found.append(int(ahead))
        return found


def open_in_transformers(folder: Path, device: str, dtype: str = "auto", **arguments: Any) -> TransformersRuntime:
    """A checkpoint folder as `AutoModelForCausalLM.from_pretrained` reads it.

    Raises:
        CheckpointError: weights that cannot be read, or are missing, so that they would be random.
    """
    return TransformersRuntime(load_model(folder, dtype=dtype, device_map=device, **arguments))

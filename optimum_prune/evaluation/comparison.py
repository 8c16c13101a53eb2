"""The comparison of a checkpoint or an artefact with what it was made from: logits on text, and generated tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optimum_prune.evaluation.runtime import Runtime

if TYPE_CHECKING:
    from jaxtyping import Float, Int

WINDOWS, TOKENS, PROMPT, GENERATED = 4, 64, 24, 16
WITH_CACHE = {"float32": 0.02, "float16": 0.1, "bfloat16": 0.3}
"""By how much logits without a cache may fall short of the largest, relative to their spread, for tokens chosen with one."""


@dataclass(frozen=True)
class ReferenceOutputs:
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
    def of(cls, runtime: Runtime, tokens: Int[Tensor, "windows length"]) -> ReferenceOutputs:
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


def compare(runtime: Runtime, expected: ReferenceOutputs) -> Comparison:
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

"""Perplexity, said exactly: every figure carries its protocol."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optimum_prune.errors import NumericalError
from optimum_prune.evaluation.losses import losses_cost, next_token_losses, perplexity_of
from optimum_prune.machine import processes

if TYPE_CHECKING:
    from jaxtyping import Float
    from transformers import PreTrainedModel

    from optimum_prune.anatomy.shape import Shape
    from optimum_prune.anatomy.workload import Cost, Workload
    from optimum_prune.evaluation.runtime import Runtime
    from optimum_prune.machine.progress import Progress
    from optimum_prune.text.windows import Windows

TOKENS_PER_BATCH = 2048
"""That run through a model at once."""


@dataclass(frozen=True)
class Perplexity:
    """`exp` of the mean negative log-likelihood, in nats, over all predicted tokens of the windows."""

    value: float
    text: str
    """Where the text is from."""
    windows: int
    length: int
    """Tokens of a window, beginning-of-sequence token included."""
    tokens: int
    """Predicted tokens: all but the first of each window."""
    bos: bool
    """Whether each window begins with the beginning-of-sequence token."""
    dtype: str
    tokens_per_second: float
    """Of the fastest batch: a machine with other work to do makes the others slower by chance. Of one process."""

    def protocol(self) -> dict[str, Any]:
        """All but the result: two figures with equal protocols can be compared."""
        return {k: v for k, v in asdict(self).items() if k not in ("value", "tokens_per_second")}

    def describe(self) -> str:
        """The protocol in one line."""
        bos = "with" if self.bos else "without"
        return (
            f"{self.text}: {self.windows} windows of {self.length} tokens, {bos} a beginning-of-sequence token, "
            f"mean over {self.tokens:,} predicted tokens, {self.dtype}"
        )

    def to_plain(self) -> dict[str, Any]:
        """Plain data, by the names of the fields."""
        return asdict(self)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Perplexity:
        """The inverse of `to_plain`, also where JSON made an infinite value null."""
        return cls(**{**plain, "value": math.inf if plain["value"] is None else plain["value"]})


@torch.no_grad()
def perplexity(
    model: PreTrainedModel, windows: Windows, progress: Progress, at_once: int = TOKENS_PER_BATCH
) -> Perplexity:
    """The perplexity of a model on windows.

    Args:
        at_once: tokens that run through the model at a time.

    Raises:
        NumericalError: the model's logits are not finite.
    """
    device = model.get_input_embeddings().weight.device

    def logits(tokens: Tensor, mask: Tensor) -> Tensor:
        padding = {} if mask.all() else {"attention_mask": mask.long().to(device)}
        found: Tensor = model(input_ids=tokens.to(device), use_cache=False, **padding).logits
        return found

    return _perplexity(logits, windows, str(model.dtype).removeprefix("torch."), progress, at_once)


def perplexity_of_runtime(runtime: Runtime, windows: Windows, progress: Progress) -> Perplexity:
    """The perplexity of whatever a runtime opened; windows without padding.

    Raises:
        NumericalError: its logits are not finite.
    """
    return _perplexity(lambda tokens, _: runtime.logits(tokens), windows, runtime.dtype, progress)


def _perplexity(
    logits: Callable[[Tensor, Tensor], Float[Tensor, "w t v"]],
    windows: Windows,
    dtype: str,
    progress: Progress,
    at_once: int = TOKENS_PER_BATCH,
) -> Perplexity:
    """The perplexity of what maps tokens and mask to logits."""
    losses, speeds = [torch.zeros(0, dtype=torch.float64)], []
    for part in progress.track(windows.share().parts(at_once), "Evaluating"):
        started = time.perf_counter()
        found = logits(part.tokens, part.mask)
        losses.append(next_token_losses(found, part.tokens.to(found.device), part.predicted).cpu())
        speeds.append(part.tokens.numel() / (time.perf_counter() - started))
    predicted = int(windows.predicted[:, 1:].sum())
    (total,) = processes.all_sums([torch.cat(losses).sum().item()])
    mean = total / predicted
    if not math.isfinite(mean):
        raise NumericalError(
            f"The perplexity on {windows.source} is {mean}: the model's logits are not finite. Look for NaN or infinity in its "
            f"weights, or compute in bfloat16 or float32 instead of float16."
        )
    return Perplexity(
        value=perplexity_of(mean),
        text=windows.source,
        windows=len(windows.tokens),
        length=windows.tokens.shape[1],
        tokens=predicted,
        bos=windows.bos,
        dtype=dtype,
        tokens_per_second=max(speeds, default=0.0),
    )


# What it takes


def evaluation_cost(work: Workload, shape: Shape) -> Cost:
    """What the perplexity of a model of this shape on all windows takes."""
    at_once = min(max(1, TOKENS_PER_BATCH // work.length), work.windows) * work.length
    few = work.on(at_once // work.length)
    layers = few.run_all(shape.layers, work.tokens)
    return layers.followed_by(losses_cost(work, work.tokens, at_once)).with_memory(few.states(2))

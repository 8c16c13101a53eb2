"""Perplexity, said exactly: every figure carries its protocol."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from optimum_prune import distributed
from optimum_prune.errors import NumericalError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from transformers import PreTrainedModel

    from optimum_prune.calibration import Calibration
    from optimum_prune.progress import Progress
    from optimum_prune.runtime import Runtime

TOKENS_PER_BATCH = 2048
LARGEST_LOSS = 700.0
LOGITS_PER_CHUNK = 2**22
"""Few enough that the allocator reuses their memory instead of fetching it from the system anew: three times as fast."""


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


def next_token_losses(
    logits: Float[Tensor, "w t v"], tokens: Int[Tensor, "w t"], mask: Bool[Tensor, "w t"]
) -> Float[Tensor, " w"]:
    """Of each window, the summed negative log-likelihood of its tokens after the first, in nats, float64.

    The float32 copies that the softmax needs are made for a few tokens at a time.
    """
    return torch.stack(
        [token_losses(*window).cpu().double().sum() for window in zip(logits, tokens, mask, strict=True)]
    )


def token_losses(
    logits: Float[Tensor, "t v"], tokens: Int[Tensor, " t"], mask: Bool[Tensor, " t"]
) -> Float[Tensor, " counted"]:
    """The negative log-likelihood of each token of a window after the first, in nats, padding left out."""
    counted = mask[1:].to(logits.device)
    positions = max(1, LOGITS_PER_CHUNK // logits.shape[-1])
    starts = range(0, len(tokens) - 1, positions)
    chunks = ((logits[:-1][start : start + positions], tokens[1:][start : start + positions]) for start in starts)
    losses = (cross_entropy(some.float(), target.to(some.device), reduction="none") for some, target in chunks)
    return torch.cat(list(losses))[counted]


class Reference:
    """What a model predicts somewhere, to tell how far other predictions there are from it."""

    def __init__(self, logits: Float[Tensor, "tokens v"]) -> None:
        self._pieces = max(1, logits.numel() // LOGITS_PER_CHUNK)
        self._probabilities = []
        self._negative_entropy = 0.0
        for some in logits.chunk(self._pieces):
            log_probabilities = some.float().log_softmax(-1)
            self._probabilities.append(log_probabilities.exp().flatten())
            self._negative_entropy += torch.vdot(self._probabilities[-1], log_probabilities.flatten()).item()

    def divergence(self, logits: Float[Tensor, "tokens v"]) -> float:
        """The Kullback-Leibler divergence of the reference from these predictions, in nats, summed over tokens."""
        crossed = (
            torch.vdot(probabilities, some.float().log_softmax(-1).flatten()).item()
            for probabilities, some in zip(self._probabilities, logits.chunk(self._pieces), strict=True)
        )
        return self._negative_entropy - sum(crossed)


def perplexity_of(loss: float) -> float:
    """The perplexity of a loss in nats for each token; infinite where that is too large for a number."""
    return math.exp(loss) if loss < LARGEST_LOSS else math.inf


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: Calibration, progress: Progress) -> Perplexity:
    """The perplexity of a model on windows.

    Raises:
        NumericalError: the model's logits are not finite.
    """
    device = model.get_input_embeddings().weight.device

    def logits(tokens: Tensor, mask: Tensor) -> Tensor:
        padding = {} if mask.all() else {"attention_mask": mask.long().to(device)}
        found: Tensor = model(input_ids=tokens.to(device), use_cache=False, **padding).logits
        return found

    return _perplexity(logits, windows, str(model.dtype).removeprefix("torch."), progress)


def perplexity_of_runtime(runtime: Runtime, windows: Calibration, progress: Progress) -> Perplexity:
    """The perplexity of whatever a runtime opened; windows without padding.

    Raises:
        NumericalError: its logits are not finite.
    """
    return _perplexity(lambda tokens, _: runtime.logits(tokens), windows, runtime.dtype, progress)


def _perplexity(
    logits: Callable[[Tensor, Tensor], Float[Tensor, "w t v"]], windows: Calibration, dtype: str, progress: Progress
) -> Perplexity:
    """The perplexity of what maps tokens and mask to logits."""
    losses, speeds = [torch.zeros(0, dtype=torch.float64)], []
    for tokens, mask in progress.track(distributed.share(windows).batches(TOKENS_PER_BATCH), "Evaluating"):
        started = time.perf_counter()
        found = logits(tokens, mask)
        losses.append(next_token_losses(found, tokens.to(found.device), mask).cpu())
        speeds.append(tokens.numel() / (time.perf_counter() - started))
    predicted = int(windows.mask[:, 1:].sum())
    (total,) = distributed.all_sums([torch.cat(losses).sum().item()])
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

"""The search over variants of a model that differ from it in some layers.

For each batch of windows the model is walked once, layer by layer. A variant shares the model's hidden states up to the first
layer in which it differs, and has a stream of its own from there on; so prefixes are computed once. As many windows and variants
are taken at a time as their streams fit a budget of memory.

In a race, variants that are worse beyond doubt stop early. Losses are compared token by token with those of the best so far,
which takes most of the noise away, and averaged over blocks of neighbouring tokens, whose losses are not independent: a
variant is out when its mean difference exceeds `DOUBT` standard errors of that mean. The others are measured in full.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from optimum_prune.anatomy.shape import Shape
from optimum_prune.anatomy.workload import TOKENS_PER_BATCH, Cost, Workload
from optimum_prune.calibration.stream import embedding_cost, logits
from optimum_prune.errors import NumericalError
from optimum_prune.evaluation.losses import losses_cost, perplexity_of, token_losses
from optimum_prune.machine import processes
from optimum_prune.machine.mapped_weights import held

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from optimum_prune.anatomy.decoder import Decoder
    from optimum_prune.calibration.calibration import Calibration
    from optimum_prune.calibration.stream import Batch

MEMORY = 2**28
"""Bytes that the streams of a search may take."""
BLOCK = 32
"""Neighbouring tokens whose losses count as one observation."""
FEWEST_BLOCKS = 12
"""Nothing is out before so many were observed."""
DOUBT = 4.0
"""Standard errors by which a variant must be worse to be out."""

RunLayer = Callable[["Batch", int, "Tensor"], "Tensor"]
"""Hidden states behind a layer, by its index, from those before."""


@dataclass(frozen=True)
class Variant:
    """A model that differs from another in some consecutive layers only."""

    start: int
    """The first of them."""
    resume: int
    """The first layer behind them."""
    run: Callable[[Batch, Tensor], Tensor]
    """Hidden states before layer `resume`, from those before layer `start`."""


@dataclass(frozen=True)
class Losses:
    """What the variants of a search lose, in nats for each predicted token."""

    base: float
    """Of the model itself."""
    means: tuple[float, ...]
    """Of each variant, over the tokens it was measured on; infinite where a loss is not finite."""
    tokens: tuple[int, ...]
    """On how many tokens each was measured: all, or fewer if it was out of a race before."""
    behind: tuple[float, ...]
    """By how much the loss of each is above that of the best, over the tokens it was measured on."""

    @property
    def ranked(self) -> list[int]:
        """The variants, the best first; those that were out of a race come after those that were measured in full."""
        full = max(self.tokens)
        return sorted(range(len(self.means)), key=lambda index: (self.tokens[index] < full, self.behind[index]))


@dataclass(frozen=True)
class _Race:
    """The variants of a search, and how they are run."""

    decoder: Decoder
    variants: Sequence[Variant]
    together: int
    """How many of them have streams at a time."""
    run_layer: RunLayer

    def losses_on(self, step: tuple[Batch, Float[Tensor, "w t h"]], racing: Sequence[int]) -> list[list[Tensor]]:
        """Of each window of a batch, the losses of each variant that is in the race, and, last, of the model itself."""
        batch, hidden = step
        lost: list[dict[int, Tensor]] = [{} for _ in hidden]
        base = len(self.variants)
        for first in range(0, len(racing), self.together):
            group = racing[first : first + self.together]
            ends = self._ends(batch, hidden, [self.variants[index] for index in group])
            for index, end in zip([base, *group], ends, strict=True):
                if index < base or first == 0:  # the model itself once
                    for window, losses in zip(lost, self._token_losses(batch, end), strict=True):
                        window[index] = losses
        return [[window[index] for index in (*racing, base)] for window in lost]

    def _ends(
        self, batch: Batch, hidden: Float[Tensor, "w t h"], variants: Sequence[Variant]
    ) -> Iterator[Float[Tensor, "w t h"]]:
        """Hidden states behind the last layer: of the model itself, then of each variant."""
        streams: dict[int, Tensor] = {}
        for index, layer in enumerate(self.decoder.modules):
            with held(layer):
                for number, variant in enumerate(variants):
                    if variant.resume <= index and number in streams:
                        streams[number] = self.run_layer(batch, index, streams[number])
                    elif variant.start == index:
                        streams[number] = variant.run(batch, hidden)
                hidden = self.run_layer(batch, index, hidden)
        yield hidden
        yield from (streams.pop(number) for number in range(len(variants)))

    def _token_losses(self, batch: Batch, hidden: Float[Tensor, "w t h"]) -> list[Float[Tensor, " tokens"]]:
        """The losses for hidden states behind the last layer; one window at a time, since logits are large."""
        return [
            token_losses(logits(self.decoder, one, part)[0], one.tokens[0], one.mask[0]).cpu()
            for one, part in batch.split(hidden)
        ]


@torch.no_grad()
def measure(
    decoder: Decoder,
    calibration: Calibration,
    variants: Sequence[Variant],
    description: str,
    *,
    race: bool = False,
    run_layer: RunLayer | None = None,
) -> Losses:
    """What each variant of a model loses on the windows.

    Args:
        race: let variants that are worse beyond doubt stop early.
        run_layer: how the model itself runs a layer, if not as it stands: that of an earlier round of a greedy search.
    """
    layers, length = decoder.modules, calibration.windows.length

    def as_it_stands(batch: Batch, index: int, hidden: Tensor) -> Tensor:
        return batch.run(layers[index], index, hidden)

    of_window = length * decoder.config.hidden_size * decoder.model.dtype.itemsize
    windows, together = at_once(length, of_window, len(variants), race=race, budget=calibration.activations.budget)
    searched = _Race(decoder, variants, together, run_layer or as_it_stands)
    racing = list(range(len(variants)))
    found: list[list[Tensor]] = [[] for _ in range(len(variants) + 1)]
    mine: list[dict[int, Tensor]] = []
    steps = processes.steps(calibration.embed(decoder, windows * length))
    for number, step in enumerate(calibration.track(steps, description), start=1):
        if step is not None:
            kept = calibration.once(description, partial(searched.losses_on, step, racing))
            calibration.activations.release(step[1])
            mine += [dict(zip((*racing, len(variants)), window, strict=True)) for window in kept]
        if not race and number < len(steps):
            continue
        for window in processes.gathered(mine):  # one by one, as if a single process had measured them
            for index in (*racing, len(variants)):
                found[index].append(window[index])
            if race:
                racing = _still_racing(racing, [torch.cat(found[index]) for index in racing])
        mine.clear()
    return _losses([torch.cat(pieces) for pieces in found])


def _losses(found: Sequence[Float[Tensor, " tokens"]]) -> Losses:
    """From the losses at each token: of each variant on as many as it was measured on, and, last, of the model itself."""
    *alternatives, base = found
    means, tokens = tuple(map(_finite_mean, alternatives)), tuple(map(len, alternatives))
    best = alternatives[min((mean, index) for index, mean in enumerate(means) if tokens[index] == max(tokens))[1]]
    behind = tuple(mean - _finite_mean(best[:count]) for mean, count in zip(means, tokens, strict=True))
    return Losses(base.double().mean().item(), means, tokens, behind)


def at_once(length: int, of_window: int, variants: int, *, race: bool, budget: float | None) -> tuple[int, int]:
    """How many windows, and how many variants on them, have streams that fit in memory together; of a race, one window.

    Args:
        length: tokens of a window.
        of_window: bytes of its hidden states.
        budget: bytes of activations that may be in memory; if not given, nobody said.
    """
    together = max(1, min(variants, MEMORY // of_window - 1))
    windows = min(TOKENS_PER_BATCH // length, MEMORY // (of_window * (together + 1)))
    if budget is not None:  # the same windows at once, so that the losses are the same to the bit
        together = max(together, min(variants, int(budget // of_window) - 1))
    return 1 if race else max(1, windows), together


def _still_racing(racing: Sequence[int], losses: Sequence[Float[Tensor, " tokens"]]) -> list[int]:
    """Those that are not worse than the best beyond doubt."""
    means = [_finite_mean(each) for each in losses]
    best = losses[means.index(min(means))]
    blocks = len(best) // BLOCK
    if blocks < FEWEST_BLOCKS:
        return list(racing)
    left = []
    for index, mean, each in zip(racing, means, losses, strict=True):
        differences = (each - best)[: blocks * BLOCK].view(blocks, BLOCK).double().mean(1)
        doubt = DOUBT * differences.std().item() / blocks**0.5
        if mean < torch.inf and differences.mean().item() <= doubt:
            left.append(index)
    return left or list(racing)


def _finite_mean(losses: Float[Tensor, " tokens"]) -> float:
    return losses.double().mean().nan_to_num(nan=torch.inf, posinf=torch.inf).item()


def check_finite(losses: Losses, what: str) -> Losses:
    """The same losses.

    Raises:
        NumericalError: every variant's loss is infinite.
    """
    if all(mean == torch.inf for mean in losses.means):
        raise NumericalError(
            f"There is no {what} without which the model has a finite perplexity. Look for NaN or infinity in the weights, or compute "
            f"in bfloat16 or float32 instead of float16."
        )
    return losses


def perplexities(losses: Losses, what: str, names: Sequence[Any]) -> dict[str, Any]:
    """What a picture of a search needs: the perplexity without each candidate, and on how many tokens it was measured."""
    return {
        "perplexity_dense": perplexity_of(losses.base),
        f"perplexity_without_{what}": dict(zip(names, map(perplexity_of, losses.means), strict=True)),
        "measured_on_tokens": dict(zip(names, losses.tokens, strict=True)),
    }


def searching_cost(work: Workload, shape: Shape, variants: Iterable[tuple[int, int, float]], *, race: bool) -> Cost:
    """Measures variants of a model on all windows; of a race, as if none were out before its end.

    Args:
        variants: of each, its first changed layer, the first behind them, and how many runs of a layer the change takes.
    """
    changes = list(variants)
    of_window, budget = int(work.on(1).states()), None if work.stored == math.inf else work.stored
    windows, together = at_once(work.length, of_window, len(changes), race=race, budget=budget)
    few, groups = replace(work, windows=min(windows, work.windows)), -(-len(changes) // together)
    runs = [float(groups)] * len(shape.layers)
    for start, resume, changed in changes:
        runs[start] += changed
        for index in range(resume, len(runs)):
            runs[index] += 1
    layers = [few.run(layer, work.tokens, count) for layer, count in zip(shape.layers, runs, strict=True)]
    losses = 4 * work.tokens * (len(changes) + 1) * 2
    searched = Cost().followed_by(*layers, losses_cost(few, work.tokens, work.length, len(changes) + 1))
    held_beside = work.stored_states() + few.states(together + 1) + losses
    return embedding_cost(work).followed_by(searched.with_memory(held_beside))

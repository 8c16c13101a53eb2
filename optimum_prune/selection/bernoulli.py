"""Units that are kept by chance, and how the probabilities of keeping them are learned from losses alone.

Optimization-based structural pruning (Gao et al., arXiv 2406.10576): keep-probabilities s, masks m drawn from them, the loss of the masked
model, and policy gradients `(L - d) (m - s) / sqrt(s (1 - s))` with a baseline d; the square root preconditions. The paper's baseline is a
moving average of losses. Here it is the mean over the masks of the same step: they have their text in common, whose difficulty moves a
loss ten times as much as masks do. And advantages are divided by their moving deviation, so that a learning rate depends on no model.

A few hundred losses tell how much each of thirty layers can lose, but not which of their hundreds of units it should be, of which a metric
knows more. So each unit moves with all others of its layer besides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

MEMORY = 5
"""Over about so many steps deviations are averaged."""
SMALL = 1e-7
EDGE = 0.02
"""How far from 0 and 1 units are still drawn: else one that got there would never be tried again."""
SHARED = 0.2
"""The part of the gradients of all units of a place that moves each of them; of very many, the one over their root."""
WHOLE = "layers"
"""The kind of unit that a layer is."""


@dataclass(frozen=True)
class Kind:
    """Units of one kind all over a model, of which a number in all stays."""

    places: tuple[tuple[int, str, int], ...]
    """A layer, an axis of it (empty for the layer itself), and how many units there are."""
    keep: int
    possible: Mapping[int, tuple[int, ...]]
    """Of a layer, how many may stay, where not every number can be said."""

    @property
    def units(self) -> int:
        """In all."""
        return sum(count for _, _, count in self.places)

    def split(self, values: Tensor) -> list[Tensor]:
        """Values of all units, by place."""
        return list(torch.split(values, [count for _, _, count in self.places]))

    def shared(self, gradient: Float[Tensor, " units"]) -> Float[Tensor, " units"]:
        """The gradient of each unit, and with it a part of those of all units of its place."""
        return torch.cat([part + min(SHARED, len(part) ** -0.5) * part.sum() for part in self.split(gradient)])

    def standardized(self, scores: Float[Tensor, " units"]) -> Float[Tensor, " units"]:
        """Scores in deviations from the mean of their place: those of one layer are larger than those of another for many reasons."""
        parts = self.split(scores)
        return torch.cat([(part - part.mean()) / part.std(unbiased=False).clamp(min=1e-12) for part in parts])

    def best(self, probabilities: Float[Tensor, " units"]) -> list[Bool[Tensor, " units"]]:
        """By place, the units that stay: the most probable, at least one of each place but of layers."""
        whole = [not axis for _, axis, _ in self.places]
        parts = self.split(probabilities.double())
        order = sorted(
            ((value, -place, -unit) for place, part in enumerate(parts) for unit, value in enumerate(part.tolist())),
            reverse=True,
        )
        first = {place: int(part.argmax()) for place, part in enumerate(parts) if not whole[place]}
        kept = [torch.zeros(len(part), dtype=torch.bool) for part in parts]
        for place, unit in first.items():
            kept[place][unit] = True
        left = self.keep - len(first)
        for _, place, unit in order:
            if left > 0 and not kept[-place][-unit]:
                kept[-place][-unit] = True
                left -= 1
        return [
            self._possible(place, part, mask) for place, part, mask in zip(range(len(parts)), parts, kept, strict=True)
        ]

    def _possible(self, place: int, part: Tensor, mask: Tensor) -> Tensor:
        """As many as can be said."""
        allowed = self.possible.get(self.places[place][0])
        count = int(mask.sum())
        if allowed is None or count in allowed:
            return mask
        count = min(allowed, key=lambda each: (abs(each - count), each))
        return torch.zeros_like(mask).index_fill_(0, part.sort(descending=True, stable=True).indices[:count], True)


def projected(probabilities: Float[Tensor, " units"], keep: int) -> Float[Tensor, " units"]:
    """The nearest probabilities of which no more than so many stay on average: each is lowered by the same, within 0 and 1."""
    found = probabilities.clamp(0, 1)
    if found.sum() <= keep:
        return found
    low, high = 0.0, float(probabilities.max())
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (probabilities - middle).clamp(0, 1).sum() > keep else (low, middle)
    return (probabilities - high).clamp(0, 1)


@dataclass(frozen=True)
class Baseline:
    """How far the losses of a step's masks are from each other, as it was in the last steps."""

    square: float = math.nan

    def after(self, losses: Sequence[float]) -> Baseline:
        """The same once the losses of another step are known."""
        mean = sum(losses) / len(losses)
        square = sum((loss - mean) ** 2 for loss in losses) / len(losses)
        return Baseline(square if math.isnan(self.square) else self.square + (square - self.square) / MEMORY)

    def advantages(self, losses: Sequence[float]) -> list[float]:
        """How much better or worse each mask of a step is than all of them on average, in deviations."""
        mean = sum(losses) / len(losses)
        return [(loss - mean) / max(math.sqrt(self.square), SMALL) for loss in losses]


def gradient(
    probabilities: Float[Tensor, " units"], masks: Sequence[Tensor], advantages: Sequence[float]
) -> Float[Tensor, " units"]:
    """The policy gradient, preconditioned."""
    total, probabilities = torch.zeros_like(probabilities), probabilities.clamp(EDGE, 1 - EDGE)
    spread = ((probabilities + SMALL) * (1 - probabilities + SMALL)).sqrt()
    for mask, advantage in zip(masks, advantages, strict=True):
        total += advantage * (mask.to(probabilities) - probabilities) / spread
    return total / max(len(masks) - 1, 1)


def drawn(
    probabilities: Float[Tensor, " units"], count: int, generator: torch.Generator
) -> list[Bool[Tensor, " units"]]:
    """So many masks, drawn in pairs from the same numbers by chance and their complements."""
    masks, probabilities = [], probabilities.clamp(EDGE, 1 - EDGE)
    for number in range(count):
        if number % 2 == 0:
            chance = torch.rand(len(probabilities), generator=generator, dtype=probabilities.dtype)
        masks.append((chance if number % 2 == 0 else 1 - chance) < probabilities)
    return masks


def told(found: Mapping[str, float], best: str, steps: int) -> str:
    """What a person is to know of the perplexities of cuts, and of the one that was chosen."""
    figures = f"with the cut as learned in {steps} steps perplexity {found['learned']:,.2f}, as it began {found['start']:,.2f}"
    if best == "learned":
        return figures
    if best == "start":
        return f"{figures}; so it is cut as it began"
    return f"{figures}, after {best} of the steps {found[best]:,.2f}; so it is cut as it was then"

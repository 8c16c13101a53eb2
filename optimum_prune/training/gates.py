"""Gates: numbers between 0 and 1 that parts of a model are multiplied by, learned with its weights until a wanted number of them is 0.

Hard-concrete gates (Louizos et al., arXiv 1712.01312) are drawn anew in each step and are exactly 0 or 1 much of the time. What is learned
of each is how likely it is open, while the expected number of open ones of each row is held at a target (Xia et al., Sheared LLaMA, arXiv
2310.06694), which starts at all of them. There by multipliers that are learned too, over thousands of steps; in fewer these overshoot
and swing, so here the constraint holds exactly in every step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

LOW, HIGH, TEMPERATURE = -0.1, 1.1, 2 / 3
SPREAD, GAP = 12.0, 2.0
"""By how much the logits of a row differ at first, so that about a third of its gates are open sometimes and closed sometimes, and by how
much two that follow each other do at most, so that few units are tried too."""
SHARPEST, DECIDED = 8.0, 0.8
"""By what logits are multiplied in the end, and in which part of what follows when the targets are reached they come to that."""
APART = 0.85
"""By how much further the logits of those that stay and of those that go differ at first, where a choice was made before: its units begin
fully open, and seldom closed."""
FARTHEST, HALVINGS = 16.0, 40
"""How far the logits of a row are shifted at most, beyond what they are, and how often what may be left of that is halved."""


@dataclass(frozen=True)
class Row:
    """Gates of which a number stays open: those of an axis of a layer, of the layers, or of the features of hidden states."""

    layer: int | None
    """None for the whole model."""
    axis: str
    """Empty for the layers themselves."""
    groups: int
    """Each keeps as many of its own."""
    units: int
    keep: int

    @property
    def key(self) -> str:
        """What its parameter is called."""
        return f"{'all' if self.layer is None else self.layer}_{self.axis or 'layers'}"


class Gates(nn.Module):
    """The gates of a model.

    What is learned of the gates of a row is shifted, all by the same, so that as many are open on average as the target of the row asks
    for: what a multiplier of the target would come to in the end is solved for in each step.

    Args:
        scores: of each row, by its key, how much each unit seems to matter; alike where they are not given.
        ramp: the part of the training in which the targets are reached.
        apart: by how much further the logits of those that stay at first and of the others differ.
        sharpness: by what logits are multiplied at first.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        scores: Mapping[str, Float[Tensor, "groups units"]],
        ramp: float,
        *,
        apart: float = 0.0,
        sharpness: float = 1.0,
    ) -> None:
        super().__init__()
        self.rows = tuple(rows)
        started = {row.key: _started(row, scores.get(row.key), apart) for row in rows}
        self.learned = nn.ParameterDict({key: nn.Parameter(logits) for key, logits in started.items()})
        alike: dict[tuple[int, int, int], list[Row]] = {}
        for row in self.rows:
            alike.setdefault((row.groups, row.units, row.keep), []).append(row)
        self._alike = list(alike.values())
        self._ramp, self._first = ramp, sharpness
        self._step, self._part = 0, 0.0

    def begin(self, step: int, part: float) -> None:
        """Lets a step begin, when a part of the training is behind."""
        self._step, self._part = step, part

    @property
    def sharpness(self) -> float:
        """By what logits are multiplied in this step: alike until the targets are reached, and then more and more, so that gates decide."""
        late = max(0.0, self._part - self._ramp) / max(1 - self._ramp, 1e-9)
        return float(self._first * (SHARPEST / self._first) ** min(1.0, late / DECIDED))

    def values(self) -> dict[str, Float[Tensor, "groups units"]]:
        """All gates, by the keys of their rows: while the model is trained, as drawn in this step, and else as they are cut."""
        if not self.training:
            return {row.key: stretched(self.logits(row)) * self.open(row) for row in self.rows}
        generator, found = torch.Generator().manual_seed(self._step), dict[str, Tensor]()
        share = min(1.0, self._part / self._ramp) if self._ramp else 1.0
        chance = {row.key: torch.rand(row.groups, row.units, generator=generator) for row in self.rows}
        for rows in self._alike:  # at once, since there is little to compute for each
            learned = torch.stack([self.learned[row.key] for row in rows]) * self.sharpness
            values = drawn(_shifted(learned, rows[0], share), torch.stack([chance[row.key] for row in rows]))
            found |= {row.key: value for row, value in zip(rows, values.unbind(), strict=True)}
        return found

    def open(self, row: Row) -> Bool[Tensor, "groups units"]:
        """The likeliest, as many as are to stay."""
        order = self.learned[row.key].detach().sort(dim=1, descending=True, stable=True).indices
        return torch.zeros_like(order, dtype=torch.bool).scatter_(1, order[:, : row.keep], True)

    def logits(self, row: Row, share: float = 1.0, sharpness: float = SHARPEST) -> Float[Tensor, "groups units"]:
        """What is learned of the gates of a row, sharpened and shifted to a share of the way to the target, with gradients."""
        return _shifted(self.learned[row.key] * sharpness, row, share)

    @torch.no_grad()
    def expected(self, row: Row) -> Float[Tensor, " groups"]:
        """How many gates of a row are open on average."""
        return likely(self.logits(row)).sum(1)

    @torch.no_grad()
    def undecided(self) -> float:
        """The part of all gates that are neither open nor closed nine times of ten."""
        found = torch.cat([likely(self.logits(row)).flatten() for row in self.rows])
        return ((found > 0.1) & (found < 0.9)).float().mean().item()


def _shifted(learned: Float[Tensor, "*rows units"], row: Row, share: float) -> Float[Tensor, "*rows units"]:
    """What is learned of rows of one size, shifted to a share of the way to their target, with gradients."""
    wanted = row.units - share * (row.units - row.keep)
    shift = _shift(learned.detach(), wanted)
    open_now = likely(learned + shift)
    slope = (open_now * (1 - open_now)).sum(-1, keepdim=True).detach().clamp(min=1e-6)
    lack = (wanted - open_now.sum(-1, keepdim=True)) / slope  # about 0; its gradient is that of the shift
    found: Tensor = learned + shift + lack - lack.detach()
    return found


def _shift(learned: Float[Tensor, "*rows units"], wanted: float) -> Float[Tensor, "*rows 1"]:
    """By what to shift so that so many gates are open on average, or as nearly as that can be."""
    bound = learned.abs().amax(-1, keepdim=True) + FARTHEST
    low, high = -bound, bound
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        more = likely(learned + middle).sum(-1, keepdim=True) < wanted
        low, high = torch.where(more, middle, low), torch.where(more, high, middle)
    return (low + high) / 2


def drawn(learned: Tensor, chance: Tensor) -> Tensor:
    """Gates by numbers between 0 and 1, with gradients."""
    uniform = chance.clamp(1e-6, 1 - 1e-6).to(learned)
    return stretched((uniform.logit() + learned) / TEMPERATURE)


def stretched(values: Tensor) -> Tensor:
    """From the logits of numbers between 0 and 1: these, stretched beyond both and cut off there."""
    return (values.sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)


def likely(learned: Tensor) -> Tensor:
    """How likely gates are not 0."""
    return (learned - TEMPERATURE * math.log(-LOW / HIGH)).sigmoid()


def _started(row: Row, scores: Tensor | None, apart: float) -> Tensor:
    """What the gates of a row begin with: by the order of their scores, those that would stay by more."""
    if scores is None:
        return torch.zeros(row.groups, row.units)
    last, order = max(row.units - 1, 1), ranks(scores)
    return min(SPREAD, GAP * last) * (order / last - 0.5) + apart * ((order >= row.units - row.keep).float() - 0.5)


def ranks(scores: Float[Tensor, "groups units"]) -> Int[Tensor, "groups units"]:
    """Of each unit, how many of its group have a lower score, or the same and come first."""
    return scores.argsort(dim=1, stable=True).argsort(dim=1, stable=True)

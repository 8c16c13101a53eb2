"""How long a model is trained and how fast: by steps or by minutes, with a learning rate that grows, and then falls."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Literal

from optimum_prune.machine import processes

ENDLESS = 10**9
"""Steps that no training by minutes comes to."""

Decay = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True)
class Schedule:
    """How a model is trained."""

    windows: int
    """Of a step, over all processes."""
    at_once: int
    """Of these, how many run through the model at a time."""
    steps: int | None = None
    minutes: float | None = None
    """Instead of steps."""
    learning_rate: float = 1e-4
    warmup: float = 0.05
    """The part of the training in which the learning rate grows."""
    decay: Decay = "cosine"
    weight_decay: float = 0.0
    clip: float = 1.0
    """The largest norm that a gradient keeps."""
    looks: int = 10
    """How often the perplexity on the held-out windows is measured."""
    patience: int = 4
    """After so many of these that are no better than the best, training ends."""
    checkpoint_minutes: float = 10.0
    """Between two states that are kept for a run that is killed."""
    gradient_checkpointing: bool = False
    report_to: tuple[str, ...] = ()
    """Trackers, by the names that transformers has for them."""

    @property
    def most_steps(self) -> int:
        """More are not taken."""
        return ENDLESS if self.steps is None else self.steps

    def rounds(self, windows: int) -> float:
        """How often each of so many windows is trained on; infinitely often where nobody knows."""
        return math.inf if self.steps is None else self.steps * self.windows / windows


class Course:
    """How far a training is: what it has spent of its steps or minutes, those of earlier runs included.

    By minutes, it goes by the clock of the first process, as it was when all looked at it together.
    """

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._spent = self._seen = 0.0
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """That were spent."""
        return self._spent + time.monotonic() - self._began

    def goes_on_after(self, seconds: float) -> None:
        """Lets an earlier run have spent so many seconds."""
        self._spent = self._seen = seconds
        self._began = time.monotonic()

    def look_at_the_clock(self) -> None:
        """Sees what was spent of the minutes by now, the same in all processes; steps need no clock."""
        if self._schedule.minutes is not None:
            self._seen = processes.broadcast_from_first(lambda: self.seconds)

    def part(self, step: int) -> float:
        """How much of the training is behind, between 0 and 1, after so many steps."""
        if self._schedule.minutes is not None:
            return min(1.0, self._seen / (60 * self._schedule.minutes))
        return min(1.0, step / self._schedule.most_steps)

    def share(self, step: int) -> float:
        """Of the learning rate, for the step after so many."""
        part, warmup = self.part(step), self._schedule.warmup
        first = 1 / self._schedule.most_steps if self._schedule.steps else 0.02 * warmup
        return rate_share(part, warmup, first, self._schedule.decay)


def rate_share(part: float, warmup: float, first: float, decay: Decay = "cosine") -> float:
    """Of the largest learning rate, how much is taken when so much of a training is behind.

    Args:
        warmup: the part in which it grows.
        first: the part that a step is, so that the first step learns too.
    """
    if part < warmup:
        return min(1.0, (part + first) / warmup)
    rest = (part - warmup) / max(1 - warmup, 1e-9)
    if decay == "constant":
        return 1.0
    return 1 - rest if decay == "linear" else 0.5 * (1 + math.cos(math.pi * rest))

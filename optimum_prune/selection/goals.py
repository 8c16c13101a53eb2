"""How small, or how fast, a model is to become, and how the choices are found that come to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from optimum_prune.errors import RecipeError
from optimum_prune.selection.allowed import LAYERS
from optimum_prune.selection.measures import Measure, Weights, whole
from optimum_prune.selection.shapes import Choice, Priced, rest_of

if TYPE_CHECKING:
    from optimum_prune.anatomy.shape import Shape
    from optimum_prune.selection.allowed import Allowed
    from optimum_prune.selection.timing import Step

SIZES: Mapping[str, str] = {
    "params": "keep {} of the parameters",
    "bytes": "leave {} of weights",
    "serving_memory": "leave {} of weights and cache",
}
SPEEDS: Mapping[str, Step] = {"prefill_speed": "prefill", "decode_speed": "decode"}
ROUNDS = 5
"""How often a speed is measured, and asked for anew so much faster or slower as it was missed."""
NEAR = 0.015
"""By this fraction a measured time may miss what is asked for: a machine does not tell more exactly."""


@dataclass(frozen=True)
class Goal:
    """What a model is to come to."""

    option: str
    """In which it was asked for."""
    measure: Measure
    size: float
    """That is wanted, in what it is measured in."""
    before: float
    """That the model has as it is."""
    timed: Callable[[Choice], float] | None = None
    """Tells the size of a choice exactly, where `measure` tells it about."""
    times: Mapping[str, Any] = field(default_factory=dict)
    """By which sizes were measured, as evidence."""
    known: dict[Choice, float] = field(default_factory=dict)
    """The sizes of choices that were timed."""

    @classmethod
    def of_parameters(cls, share: float, shape: Shape) -> Goal:
        """A share of the parameters is to be kept."""
        return cls("params", Weights(), share * shape.parameters, shape.parameters)

    def check(self, allowed: Allowed, shape: Shape) -> None:
        """Refuses what is out of reach.

        Raises:
            RecipeError: with what can be reached.
        """
        if self.size >= self.before:
            raise RecipeError(
                f"{allowed.step} is to {self._told(self.size)}, and so it is already: {self._told(self.before)}. Ask for less."
            )
        least = allowed.smallest(shape, self.measure)
        if self.size < least:
            how = "more" if self.option in SIZES else "less speed"
            layers = " (of layers beside each other, one at least stays)" if allowed.allows(LAYERS) else ""
            remedy = f"Ask for {how}{', or allow more to go' if allowed.names else ''}."
            raise RecipeError(
                f"{allowed.step} is to {self._told(self.size)}, and by what may go here{layers} it can {self._told(least)} at best. {remedy}"
            )

    def _told(self, size: float) -> str:
        if self.option == "params":
            return SIZES[self.option].format(f"{size / self.before:.4g}")
        if self.option in SIZES:
            return SIZES[self.option].format(f"{size / 1e6:,.4g} MB")
        return f"{SPEEDS[self.option]} {self.before / max(size, 1e-12):.3g} times as fast"

    def found(self, find: Callable[[float], list[Priced]]) -> list[Priced]:
        """The choices that come to the goal.

        Args:
            find: the best choices of a size, the best first.
        """
        if self.timed is None:
            return find(self.size)
        asked, tried = self.size, list[tuple[float, list[Priced]]]()
        for _ in range(ROUNDS):
            choices = find(asked)
            if not choices:
                break
            missed = self._timed(choices[0][0], self.timed) - self.size
            tried.append((abs(missed), choices))
            if abs(missed) <= NEAR * self.size:
                break
            asked -= missed
        return min(tried, key=_by_miss)[1] if tried else []

    def _timed(self, choice: Choice, timed: Callable[[Choice], float]) -> float:
        if choice not in self.known:
            self.known[choice] = timed(choice)
        return self.known[choice]

    def reached(self, choice: Choice, shape: Shape) -> str:
        """What a choice comes to, in words; nothing of parameters, which every report has."""
        if self.option == "params":
            return ""
        (value,) = self.told(choice, shape).values()
        what = self.option.replace("_", " ")
        if self.option in SIZES:
            return f"{what} {self.before / 1e6:,.4g} MB before, {value / 1e6:,.4g} MB after"
        return f"{what} {value:.3g} times that before"

    def told(self, choice: Choice, shape: Shape) -> dict[str, float]:
        """What a choice comes to beside its parameters, as evidence."""
        if self.option == "params":
            return {}
        size = self.known.get(choice) or whole(self.measure, choice, rest_of(choice, shape))
        return {self.option: size if self.option in SIZES else self.before / size}


def _by_miss(tried: tuple[float, list[Priced]]) -> float:
    return tried[0]

"""The numbers that an option may be."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The numbers that an option may be."""

    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None
    one_of: tuple[float, ...] = ()
    """The only ones, if any are named."""
    or_else: float | None = None
    """One that the others do not hold for, such as -1 for none."""

    def allow(self, value: float) -> bool:
        """Whether a number is within them."""
        return value == self.or_else or (
            (self.at_least is None or value >= self.at_least)
            and (self.at_most is None or value <= self.at_most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
            and (not self.one_of or value in self.one_of)
        )

    def __str__(self) -> str:
        """Such as "at least 0 and below 1", or "2, 3, 4 or 8"; empty if there are none."""
        named = ("at_least", "above", "at_most", "below")
        given = ((name, getattr(self, name)) for name in named)
        text = " and ".join(f"{name.replace('_', ' ')} {value}" for name, value in given if value is not None)
        if self.one_of:
            *others, last = map(str, self.one_of)
            text = f"{', '.join(others)} or {last}" if others else last
        return text if self.or_else is None else f"{text}, or {self.or_else}"

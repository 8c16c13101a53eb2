"""Leaves out every n-th decoder layer: a method of one's own, whole.

A pass is a frozen dataclass. Its fields are its YAML keys and its command-line flags; what it decides is carried out, saved,
verified and reported by optimum-prune.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from optimum_prune import Cuts, Decision, PrunePass, Shape, hookimpl, option

if TYPE_CHECKING:
    from optimum_prune import Calibration, Decoder


@dataclass(frozen=True, kw_only=True)
class EveryOther(PrunePass):
    """Leaves out every n-th decoder layer, whatever it does."""

    name: ClassVar[str] = "every-other"
    nth: int = option("Leave out the layers n-1, 2n-1, and so on.", 2, at_least=2)

    def kept(self, layers: int) -> tuple[int, ...]:
        """The layers that stay."""
        return tuple(index for index in range(layers) if (index + 1) % self.nth)

    def foresee(self, shape: Shape) -> Shape:
        """The shape afterwards, for `compress plan` and for checks."""
        return shape.keep(self.kept(len(shape.layers)))

    def decide(self, decoder: Decoder, calibration: Calibration) -> Iterator[Decision]:
        """One decision; optimum-prune cuts."""
        yield Decision(Cuts(layers=self.kept(len(decoder))), evidence={"nth": self.nth})


@hookimpl
def passes() -> Iterator[type[PrunePass]]:
    """What this plugin adds."""
    yield EveryOther

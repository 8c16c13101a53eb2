"""Text of several kinds to calibrate on: windows to fit to, and others to measure on, of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from optimum_prune.anatomy.workload import Workload
from optimum_prune.calibration.own_text import own_text
from optimum_prune.selection.divergence import split
from optimum_prune.text.windows import Windows, joined

if TYPE_CHECKING:
    from optimum_prune.anatomy.decoder import Decoder
    from optimum_prune.calibration.calibration import Calibration

HELD_OUT, HELD_OUT_LENGTH = 5, 256
"""Windows of each kind that are measured on, at most, and tokens of these that are used."""


def held_out_work(work: Workload, own: int) -> Workload:
    """That of the windows to measure on.

    Args:
        own: windows of the model's own text.
    """
    counts = (min(HELD_OUT, max(each // 4, 1)) for each in (work.windows, own, work.windows) if each)
    return work.on(sum(counts), min(HELD_OUT_LENGTH, work.length))


@dataclass(frozen=True)
class TextKinds:
    """Windows of one length, by what kind of text they are."""

    kinds: Mapping[str, Windows]

    @classmethod
    def with_own(cls, decoder: Decoder, calibration: Calibration, count: int) -> TextKinds:
        """The text that is given, and so many windows of the model's own."""
        given = calibration.windows
        kinds = {"the text given": given}
        if count:
            tokens = calibration.once("own text", lambda: own_text(decoder, given, count).tokens.tolist())
            kinds["the model's own"] = Windows.from_tokens(given.tokens.new_tensor(tokens), given.source, given.bos)
        return cls(kinds)

    @property
    def all(self) -> Windows:
        """Every window."""
        return joined(list(self.kinds.values()))

    def fitted(self, most: int | None = None) -> Windows:
        """Those to fit to, of each kind no more than so many."""
        return joined(
            [split(windows, HELD_OUT, HELD_OUT_LENGTH)[0].part(slice(most)) for windows in self.kinds.values()]
        )

    def held_out(self) -> dict[str, Windows]:
        """Those to measure on, shorter, by their kind; a single window serves for both.

        One kind more is a passage of the text given, twice: few heads tell what was there before, and on most text nobody misses them.
        """
        found = {name: split(windows, HELD_OUT, HELD_OUT_LENGTH)[1] for name, windows in self.kinds.items()}
        given = next(iter(found.values()))
        return {**found, "a passage twice": _half_twice(given)}


def _half_twice(windows: Windows) -> Windows:
    """As many tokens: those of the first half, and the same again."""
    half = -(-windows.length // 2)
    tokens, mask = (
        torch.cat([each[:, :half]] * 2, dim=1)[:, : windows.length] for each in (windows.tokens, windows.mask)
    )
    return Windows(tokens, mask, windows.source, windows.bos)

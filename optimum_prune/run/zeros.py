"""What becomes of zeros that a pass made: a later one that computes weights anew may leave few of them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from optimum_prune.passes.outcome import Outcome
from optimum_prune.surgery.cuts import NOTE

if TYPE_CHECKING:
    from optimum_prune.anatomy.decoder import Decoder
    from optimum_prune.run.models import Models

FEWER = 0.95
"""Zeros count as lost when their share falls below this part of what it was."""


class Zeros:
    """The share of zeros among the weights of a model's layers, once a pass has made some."""

    def __init__(self, decoder: Decoder, models: Models) -> None:
        self._decoder = decoder
        self._models = models
        self._made_by, self._share = "", 0.0

    def seen(self, outcome: Outcome, *, makes: bool) -> Outcome:
        """The outcome of the pass that was just done, with a sentence where it lost zeros of one before it.

        Args:
            makes: whether it is one that makes zeros.
        """
        if not (makes or self._made_by):
            return outcome
        before, self._share = self._share, self._now()
        if makes:
            self._made_by = outcome.name
        elif self._share < FEWER * before:
            note = (
                f"of the weights in layers {self._share:.0%} are zero now, and {before:.0%} were behind {self._made_by}: what is refitted is "
                f"no longer sparse. Let {self._made_by} come last"
            )
            return replace(outcome, evidence=(*outcome.evidence, {NOTE: note}))
        return outcome

    def _now(self) -> float:
        """The share of zeros."""
        zeros = of = 0
        for layer in self._decoder.modules:
            for value in layer.parameters():
                if value.ndim > 1:
                    zeros += value.numel() - int(torch.count_nonzero(value.detach()))
                    of += value.numel()
            self._models.release(layer)
        return zeros / max(of, 1)

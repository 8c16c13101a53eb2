"""A model while it is trained: its weights in float32 beside those that it was given, and the best that it had so far, on disk."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open

from optimum_prune.machine import processes, tensor_files
from optimum_prune.machine.products import bfloat16_is_fast
from optimum_prune.machine.whole_files import whole

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from transformers import PreTrainedModel

MANY_ZEROS = 0.25
"""A matrix with such a part of zeros was pruned by a mask."""
GIVEN, BEST = "given.safetensors", "best.safetensors"


class Student:
    """A model that is trained, and gets back the weights that it was given, or the best that it had, in their dtype.

    Args:
        folder: where weights are kept.
        float32: whether the model's are float32 meanwhile.
        zeros_stay: whether the zeros of a matrix of which many are zero stay zero.
        trained: the parameters that are trained, by name; all of them if not given.
    """

    left_alone = "the model is as it was"
    """What is said of it where training made nothing better."""

    def __init__(
        self,
        model: PreTrainedModel,
        folder: Path,
        *,
        float32: bool,
        zeros_stay: bool = True,
        trained: Mapping[str, nn.Parameter] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.model = model
        self.folder = folder
        self._dtype = model.dtype
        self._trained = dict(model.named_parameters()) if trained is None else dict(trained)
        self._own = {name: value.data for name, value in self._trained.items()}
        self._masked = masked(self._own) if zeros_stay else {}
        self._apart = float32 and any(value.dtype is not torch.float32 for value in self._own.values())
        """Whether the weights that it was given stay as they are while it is trained."""
        if not self._apart:
            self._write(GIVEN, {})
        for value in self._trained.values():
            if value.is_floating_point():
                value.requires_grad_(True)
                value.data = value.data.float() if self._apart else value.data

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """The weights that are trained, those that are tied once."""
        return ((name, value.data) for name, value in self._trained.items())

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Products are computed in bfloat16 within a `with`, if the model's own dtype is that, unless this is slower and no weight asks for it."""
        asked = any(value.dtype is torch.bfloat16 for value in self.model.parameters())
        half = self._dtype is torch.bfloat16 and (asked or bfloat16_is_fast(self.model.device))
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=half):
            yield

    # While it is trained

    def begin(self, step: int, part: float) -> None:
        """A step begins, when a part of the training is behind."""

    def regroup(self, optimizer: Optimizer) -> None:
        """Lets an optimizer treat some of what is trained otherwise."""

    @torch.no_grad()
    def end_step(self) -> None:
        """Makes the weights zero that are to stay so."""
        for name, there in self._masked.items():
            self._trained[name].data.mul_(there)

    # The best

    def keep(self, perplexity: float, step: int) -> None:
        """Keeps the weights as the best, in their own dtype."""
        self._write(BEST, {"perplexity": repr(perplexity), "step": str(step)})

    def best(self) -> tuple[float, int]:
        """The perplexity of the best that are kept, and after how many steps they came; infinite, if none are."""
        try:
            with safe_open(self.folder / BEST, "pt") as opened:
                about = opened.metadata()
                return float(about["perplexity"]), int(about["step"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return math.inf, 0

    def _write(self, name: str, about: Mapping[str, str]) -> None:
        write_once(
            self.folder / name, ((each, value.to(self._own[each].dtype)) for each, value in self.named()), about
        )

    # What becomes of it

    @torch.no_grad()
    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Gives the model other values, as it is while it is trained."""
        for name, value in self.named():
            value.copy_(weights[name])

    def give_back(self, *, best: bool) -> None:
        """Lets the model have its own weights again, with the values of the best if asked, and else those that it was given."""
        for name, value in self._trained.items():
            value.grad = None
            value.data = self._own[name]
        if best or not self._apart:
            with safe_open(self.folder / (BEST if best else GIVEN), "pt") as opened:
                self.put({name: opened.get_tensor(name) for name in self._own})


def masked(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of each matrix of which many values are zero, where they are not."""
    pairs = ((name, value != 0) for name, value in weights.items() if value.ndim > 1)
    return {name: there for name, there in pairs if 1 - there.float().mean().item() >= MANY_ZEROS}


def write_once(file: Path, weights: Iterable[tuple[str, Tensor]], about: Mapping[str, str]) -> None:
    """Writes weights, which all processes hold, in the first of them; behind it, the file is there for all."""
    if processes.first():
        with whole(file) as partial:
            tensor_files.write(dict(weights), partial, about)
    processes.wait()

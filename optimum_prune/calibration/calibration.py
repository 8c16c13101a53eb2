"""Calibration is what a pass chooses by: token windows, where a model's activations on them are kept, and how far the run is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch

from optimum_prune.calibration.stream import Stream, check_finite, embed
from optimum_prune.calibration.visit import LayerVisit
from optimum_prune.machine.activation_store import ActivationStore, InMemory
from optimum_prune.machine.progress import Progress
from optimum_prune.text.windows import Windows

if TYPE_CHECKING:
    from jaxtyping import Bool, Int
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from optimum_prune.anatomy.decoder import Decoder

T = TypeVar("T")


class Once(Protocol):
    """Where what takes long is kept once it is computed, so that a run that was killed does not compute it again."""

    def once(self, what: str, compute: Callable[[], T], /) -> T:
        """What `compute` returns, or what was kept under this name."""


class NoJournal:
    """Keeps nothing."""

    def once(self, _: str, compute: Callable[[], T], /) -> T:
        """What `compute` returns."""
        return compute()


@dataclass(frozen=True)
class Calibration:
    """Token windows to choose by, and all that a pass needs to run a model on them."""

    windows: Windows
    activations: ActivationStore = field(default_factory=InMemory)
    """Where hidden states, and what is summed over them, are kept."""
    progress: Progress = Progress()
    journal: Once = field(default_factory=NoJournal)
    tokenizer: PreTrainedTokenizerBase | None = None
    """Of the model, for a pass that reads more text; None where only windows are given."""

    @classmethod
    def from_tokens(
        cls, tokens: Int[Tensor, "windows length"], source: str = "given tokens", bos: bool = False
    ) -> Calibration:
        """Windows without padding, with activations in memory."""
        return cls(Windows.from_tokens(tokens, source, bos))

    @property
    def tokens(self) -> Int[Tensor, "windows length"]:
        """Of the windows."""
        return self.windows.tokens

    @property
    def mask(self) -> Bool[Tensor, "windows length"]:
        """False where a token of a window is padding."""
        return self.windows.mask

    def on(self, windows: Windows) -> Calibration:
        """The same with other windows."""
        return replace(self, windows=windows)

    def quiet(self) -> Calibration:
        """The same without bars."""
        return replace(self, progress=Progress())

    def once(self, what: str, compute: Callable[[], T]) -> T:
        """What `compute` returns; computed once, even if the run is killed later and goes on.

        Args:
            what: its name within the pass; the second of a name is another piece than the first.
            compute: must depend on nothing but the model, the text, the options and what was decided before. It returns a decision, or
                plain data with tensors in it, which comes back with lists for tuples and text for the keys of mappings.
        """
        return self.journal.once(what, compute)

    def track(self, items: Iterable[T], description: str) -> Iterator[T]:
        """The items, with a bar that counts them."""
        return self.progress.track(items, description)

    def embed(self, decoder: Decoder, tokens_at_once: int | None = None) -> Stream:
        """The windows in batches of about so many tokens, with their hidden states before the first layer."""
        return embed(decoder, self.windows, self.activations, tokens_at_once)

    @torch.no_grad()
    def walk(self, decoder: Decoder, description: str, tokens_at_once: int | None = None) -> Iterator[LayerVisit]:
        """Visits the decoder layers in order.

        When the next visit is asked for, the stream passes through the layer just visited **as it is by then**: whoever cuts it
        in between hands the pruned stream to the layers behind.

        Args:
            description: of the bar.
            tokens_at_once: of a batch, about; as `embed` has them if not given.

        Raises:
            NumericalError: a layer puts out a value that is not finite.
        """
        stream = self.embed(decoder, tokens_at_once)
        check_finite((hidden for _, hidden in stream), "The embeddings", self.activations)
        for layer in self.track(decoder.layers, description):
            visit = LayerVisit(layer, stream, self.activations)
            yield visit
            visit.leave()
            check_finite((hidden for _, hidden in stream), f"Decoder layer {layer.index}", self.activations)

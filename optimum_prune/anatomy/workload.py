"""What work costs in memory and time, from sizes alone: bytes at the peak, and how much is to be computed.

What each piece of the code holds and computes is said beside that code. What is counted are tensors of many elements; a process has
its imports besides, whose size is that of the process that asks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from optimum_prune.anatomy.shape import ATTENTION, BLOCKS, FEED_FORWARD, LayerShape

TOKENS_PER_BATCH = 2048
"""About so many tokens run through a layer at once."""
RUNNING_WIDTHS = 3
"""Tensors of as many features as the FFN is wide that a layer holds at once: gate, up and their product."""
RUNNING_HIDDEN = 6
"""Tensors of as many features as hidden states that it holds besides, such as what its norms compute in float32."""


@dataclass(frozen=True)
class Cost:
    """What a piece of work takes."""

    memory: float = 0.0
    """Bytes at its peak, besides the process and the model as it is when it begins."""
    left: float = 0.0
    """Bytes of new weights that are held afterwards besides the old ones, which stay mapped from their files."""
    products: float = 0.0
    """Operations (a multiplication and an addition are two) of matrix products in the model's dtype."""
    elements: float = 0.0
    """Activations that anything else than a matrix product computes."""
    statistics: float = 0.0
    """Operations of products that are summed in float32."""
    solving: float = 0.0
    """Operations in float64."""
    reading: float = 0.0
    """Bytes of weights that are read from files."""

    def followed_by(self, *later: Cost) -> Cost:
        """Of this and other work, one after the other."""
        every = (self, *later)
        added = {
            name: sum(getattr(cost, name) for cost in every)
            for name in ("left", "products", "elements", "statistics", "solving", "reading")
        }
        return Cost(memory=max(cost.memory for cost in every), **added)

    def times(self, count: float) -> Cost:
        """Of the same again and again, each time with the same memory and the same weights left."""
        return replace(
            self,
            products=self.products * count,
            elements=self.elements * count,
            statistics=self.statistics * count,
            solving=self.solving * count,
            reading=self.reading * count,
        )

    def with_memory(self, memory: float) -> Cost:
        """While so many other bytes are held."""
        return replace(self, memory=self.memory + memory)


@dataclass(frozen=True)
class Workload:
    """On how much text a model of which sizes is run; what of its sizes pruning changes, a `Shape` says."""

    hidden: int
    """Features of hidden states."""
    vocabulary: int
    itemsize: int
    """Bytes of a weight and of an activation."""
    windows: int
    """Calibration windows."""
    length: int
    """Tokens of a window."""
    offloaded: bool = False
    """Whether weights stay on disk, so that one layer is in memory at a time."""
    stored: float = math.inf
    """Bytes of activations and grams that are kept in memory; what is beyond lies in files."""

    @property
    def tokens(self) -> int:
        """Of all windows."""
        return self.windows * self.length

    @property
    def batch(self) -> int:
        """Tokens that run through a layer at once."""
        return min(max(1, TOKENS_PER_BATCH // self.length), self.windows) * self.length

    def on(self, windows: int, length: int | None = None) -> Workload:
        """The same model on fewer or shorter windows."""
        return replace(self, windows=max(windows, 1), length=length or self.length)

    # Bytes that are held

    def states(self, count: float = 1) -> float:
        """Hidden states of all windows, so many times."""
        return count * self.tokens * self.hidden * self.itemsize

    def in_memory(self, size: float) -> float:
        """What is in memory of so many bytes of activations and grams that are kept for later."""
        return min(size, self.stored)

    def stored_states(self, count: float = 1) -> float:
        """Hidden states of all windows that are kept for later, so many times."""
        return self.in_memory(self.states(count))

    def observed(self, layer: LayerShape, *blocks: str) -> float:
        """What a visit keeps of the activations of all windows: in front of the outputs of blocks, and hidden states otherwise."""
        widths = (layer.width(block) if block in (*blocks, FEED_FORWARD) else self.hidden for block in BLOCKS)
        return self.in_memory(self.tokens * sum(widths) * self.itemsize)

    def layer(self, layer: LayerShape) -> float:
        """The weights of a layer."""
        return layer.parameters * self.itemsize

    def head(self) -> float:
        """The output head, or the embeddings."""
        return self.hidden * self.vocabulary * self.itemsize

    # Running layers

    def run(self, layer: LayerShape, tokens: float, times: float = 1) -> Cost:
        """Runs a layer on so many tokens, so many times."""
        attended, width = layer.width(ATTENTION), layer.width(FEED_FORWARD)
        parameters = layer.parameters - layer.routed * (1 - layer.active)
        inner = layer.active * (layer.routed // (3 * self.hidden)) if layer.routed else width
        features = inner + 6 * self.hidden + 3 * attended
        held = min(int(tokens), self.batch) * (RUNNING_WIDTHS * width + RUNNING_HIDDEN * self.hidden) * self.itemsize
        return Cost(
            memory=held + (self.layer(layer) if self.offloaded else 0),
            products=times * tokens * (2 * parameters + 2 * self.length * attended),
            elements=times * tokens * (features + self.length * attended / max(layer.unit(ATTENTION), 1) / 8),
            reading=times * self.layer(layer) * max(tokens / self.batch, 1) if self.offloaded else 0.0,
        )

    def run_all(self, layers: Iterable[LayerShape], tokens: float, times: float = 1) -> Cost:
        """Runs layers one after the other."""
        return Cost().followed_by(*(self.run(layer, tokens, times) for layer in layers))

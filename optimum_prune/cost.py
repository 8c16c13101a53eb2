"""What a recipe will cost in memory and time, from sizes alone: bytes at the peak, and how much is to be computed.

Each function says what one piece of the code holds or computes. What is counted are tensors of many elements; a process has its
imports besides, whose size is that of the process that asks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from optimum_prune import elimination, evaluation, layerwise, search

if TYPE_CHECKING:
    from optimum_prune.shape import LayerShape, Shape

RUNNING_WIDTHS = 3
"""Tensors of as many features as the FFN is wide that a layer holds at once: gate, up and their product."""
RUNNING_HIDDEN = 6
"""Tensors of as many features as hidden states that it holds besides, such as what its norms compute in float32."""
CHUNKS = 3
"""Float32 copies of a chunk of logits that a loss takes."""
MATRIX_BY_VECTOR = 8
"""How much longer an operation takes in a product of a matrix and a vector than in one of matrices."""


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

    def then(self, *later: Cost) -> Cost:
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

    def beside(self, memory: float) -> Cost:
        """While so many other bytes are held."""
        return replace(self, memory=self.memory + memory)


@dataclass(frozen=True)
class Workload:
    """On how much text a model of which sizes is run; what of its sizes pruning changes, a `Shape` says."""

    hidden: int
    """Features of hidden states."""
    vocabulary: int
    head_width: int
    """Features that a key-value head's query heads put out together."""
    heads: int
    """Key-value heads, where the shape does not say how many."""
    itemsize: int
    """Bytes of a weight and of an activation."""
    windows: int
    """Calibration windows."""
    length: int
    """Tokens of a window."""
    offloaded: bool = False
    """Whether weights stay on disk, so that one layer is in memory at a time."""
    shelf: float = math.inf
    """Bytes of activations and grams that are kept in memory; what is beyond lies in files."""
    active: float = 1.0
    """Of the parameters of experts, the fraction that a token goes through."""

    @property
    def tokens(self) -> int:
        """Of all windows."""
        return self.windows * self.length

    @property
    def batch(self) -> int:
        """Tokens that run through a layer at once."""
        return min(max(1, layerwise.TOKENS_PER_BATCH // self.length), self.windows) * self.length

    def queries(self, layer: LayerShape) -> int:
        """Features that a layer's heads put out."""
        return (layer.heads or self.heads) * self.head_width

    def on(self, windows: int, length: int | None = None) -> Workload:
        """The same model on fewer or shorter windows."""
        return replace(self, windows=max(windows, 1), length=length or self.length)

    # Memory: bytes that are held

    def states(self, count: float = 1) -> float:
        """Hidden states of all windows, so many times."""
        return count * self.tokens * self.hidden * self.itemsize

    def kept(self, size: float) -> float:
        """What is in memory of so many bytes of activations and grams that are kept for later."""
        return min(size, self.shelf)

    def kept_states(self, count: float = 1) -> float:
        """Hidden states of all windows that are kept for later, so many times."""
        return self.kept(self.states(count))

    def layer(self, layer: LayerShape) -> float:
        """The weights of a layer."""
        return layer.parameters * self.itemsize

    def running(self, layer: LayerShape, tokens: int) -> float:
        """What a layer holds while it runs on so many tokens."""
        features = RUNNING_WIDTHS * max(layer.width, layer.expert_width) + RUNNING_HIDDEN * self.hidden
        return tokens * features * self.itemsize

    def logits(self, tokens: int) -> float:
        """Logits at so many positions, and what a loss takes of them in float32."""
        chunk = min(evaluation.LOGITS_PER_CHUNK, tokens * self.vocabulary)
        return tokens * self.vocabulary * self.itemsize + CHUNKS * chunk * 4

    def head(self) -> float:
        """The output head, or the embeddings."""
        return self.hidden * self.vocabulary * self.itemsize

    def observed(self, layer: LayerShape, *, heads: bool = False) -> float:
        """What a visit of a layer keeps of the activations of all windows: FFN channels, and the heads or what attention put out."""
        attended = self.queries(layer) if heads else self.hidden
        return self.kept(self.tokens * (layer.width + attended) * self.itemsize)

    def gram(self, features: int, tokens: int | None = None) -> float:
        """A gram while it is summed: the sum, and a batch of activations in float32."""
        rows = 0 if self.itemsize == 4 else (self.batch if tokens is None else tokens) * features * 4
        return 4 * features**2 + rows

    def solver(self, features: int, weights: float) -> float:
        """A gram, the same in float64, and so many numbers in float64 besides; at first, all of the gram is read."""
        return 8 * features**2 + max(self.kept(4 * features**2) + 8 * weights, 4 * features**2)

    # Computation

    def run(self, layer: LayerShape, tokens: float, times: float = 1) -> Cost:
        """Runs a layer on so many tokens, so many times."""
        experts = layer.expert_width * layer.per_expert_channel
        parameters = layer.parameters - experts * (1 - self.active)
        queries = self.queries(layer)
        features = layer.width + self.active * (experts // (3 * self.hidden)) + 6 * self.hidden + 3 * queries
        return Cost(
            memory=self.running(layer, min(int(tokens), self.batch)) + (self.layer(layer) if self.offloaded else 0),
            products=times * tokens * (2 * parameters + 2 * self.length * queries),
            elements=times * tokens * (features + self.length * queries / max(self.head_width, 1) / 8),
            reading=times * self.layer(layer) * max(tokens / self.batch, 1) if self.offloaded else 0.0,
        )

    def run_all(self, layers: Iterable[LayerShape], tokens: float, times: float = 1) -> Cost:
        """Runs layers one after the other."""
        return Cost().then(*(self.run(layer, tokens, times) for layer in layers))

    def losses(self, tokens: float, at_once: int, times: float = 1) -> Cost:
        """The output head and the losses behind it."""
        head = self.head() if self.offloaded or self.itemsize < 4 else 0  # read, or rearranged for 16-bit products
        return Cost(
            memory=self.logits(at_once) + head,
            products=times * 2 * tokens * self.hidden * self.vocabulary,
            elements=times * 3 * tokens * self.vocabulary,
            reading=times * tokens / at_once * self.head() if self.offloaded else 0.0,
        )

    def summing(self, features: int, tokens: float | None = None) -> Cost:
        """Sums a gram over all tokens; half of it is computed."""
        return Cost(
            statistics=(self.tokens if tokens is None else tokens) * features * (features + elimination.PENDING)
        )

    def eliminating(
        self, features: int, keep: int, one_shot: bool = False, outputs: int | None = None, swaps: int = 0
    ) -> Cost:
        """Eliminates inputs of a linear layer down to so many, and refits the others."""
        gone, outputs = features - keep, outputs or self.hidden
        steps, alive = 0 if one_shot else gone, (features + keep) / 2
        pending, ahead, rows = elimination.PENDING, 2 * elimination.AHEAD, elimination.ROWS
        greedy = features * (outputs + 2 * pending + ahead) + pending * outputs if steps else 0
        if gone < elimination.FEW * keep:  # columns of the inverse, and those of them that go and that stay
            refitting = outputs * (keep + 2 * gone) + 3 * features * gone
        else:
            refitting = outputs * (keep + gone) + 3 * rows * keep
        table = 3 * features**2 + 3 * features * outputs if swaps else 0
        return Cost(
            memory=self.solver(features, max(2 * features * rows, greedy, refitting, table)),
            solving=4 / 3 * features**3  # the factor and the inverse
            + 2 * features**2 * outputs  # the loss of everything
            + 2 * steps * alive * (alive + 2 * outputs)  # both matrices brought up to date, and inner products
            + MATRIX_BY_VECTOR * 3 * steps * pending * alive
            + MATRIX_BY_VECTOR * 2 * swaps * features * (features + outputs)
            + min(gone, keep) ** 3 / 3
            + 2 * features * gone * outputs,
        )

    def fitting(self, features: int) -> Cost:
        """Refits a projection by least squares towards other hidden states."""
        return Cost(
            memory=self.solver(features, 3.5 * features * self.hidden),
            statistics=2 * self.tokens * features * self.hidden,
            solving=features**3 / 3 + 4 * features**2 * self.hidden,
        )

    # Pieces of which passes are made

    def embedding(self) -> Cost:
        """The hidden states before the first layer, which are then held."""
        table = self.head() if self.offloaded else 0
        return Cost(memory=self.kept_states() + table, elements=self.tokens * self.hidden)

    def walk(self, shape: Shape, streams: int = 1) -> Cost:
        """Moves so many streams of hidden states through all layers."""
        running = self.run_all(shape.layers, self.tokens, streams).beside(self.kept_states(streams))
        return self.embedding().times(streams).beside(self.kept_states(streams - 1)).then(running)

    def refit(self, layer: LayerShape, *, attention: bool = True) -> Cost:
        """Observes the inputs of a layer's output projections and refits these, as healing does."""
        queries = self.queries(layer)
        of_channels = (
            self.summing(layer.width).beside(self.gram(layer.width)).then(self.fitting(layer.width))
            if layer.width
            else Cost()
        )
        of_heads = (
            self.summing(queries).beside(self.gram(queries)).then(self.fitting(queries)) if attention else Cost()
        )
        run = self.run(layer, self.tokens)
        changed = self.itemsize * self.hidden * (layer.width + (queries if attention else 0))
        both = of_channels.then(of_heads, run).beside(self.observed(layer, heads=attention))
        return replace(both, left=changed)

    def evaluating(self, shape: Shape) -> Cost:
        """Runs the whole model on windows for a perplexity."""
        at_once = min(max(1, evaluation.TOKENS_PER_BATCH // self.length), self.windows) * self.length
        few = replace(self, windows=at_once // self.length)
        layers = few.run_all(shape.layers, self.tokens)
        return layers.then(self.losses(self.tokens, at_once)).beside(few.states(2))


def searching(work: Workload, shape: Shape, variants: Iterable[tuple[int, int, float]], *, race: bool) -> Cost:
    """Measures variants of a model on all windows; of a race, as if none were out before its end.

    Args:
        variants: of each, its first changed layer, the first behind them, and how many runs of a layer the change takes.
    """
    changes = list(variants)
    of_window, budget = int(work.on(1).states()), None if work.shelf == math.inf else work.shelf
    windows, together = search.at_once(work.length, of_window, len(changes), race=race, budget=budget)
    few, groups = replace(work, windows=min(windows, work.windows)), -(-len(changes) // together)
    runs = [float(groups)] * len(shape.layers)
    for start, resume, changed in changes:
        runs[start] += changed
        for index in range(resume, len(runs)):
            runs[index] += 1
    layers = [few.run(layer, work.tokens, count) for layer, count in zip(shape.layers, runs, strict=True)]
    losses = 4 * work.tokens * (len(changes) + 1) * 2
    searched = Cost().then(*layers, few.losses(work.tokens, work.length, len(changes) + 1))
    return work.embedding().then(searched.beside(work.kept_states() + few.states(together + 1) + losses))


def healing(work: Workload, shape: Shape, gone: float) -> Cost:
    """Refits layers in front of gaps and behind them, as if half of those that stay lay there.

    Args:
        gone: how many layers are left out.
    """
    share = (len(shape.layers) - gone) / len(shape.layers) / 2
    refits = [work.refit(layer) for layer in shape.layers]
    one = Cost().then(*refits).times(3 * share)
    held = max(cost.memory for cost in refits) + work.kept_states(5)
    left = share * sum(cost.left for cost in refits)
    return work.walk(shape, streams=2).then(replace(one, memory=held, left=left))

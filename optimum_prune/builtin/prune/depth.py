"""Depth pruning: leave out whole decoder layers, and heal the gap without training.

Which layers go is decided by perplexity on the calibration windows, or by a score of each layer. `shape` says how they lie:

- `window`: consecutive layers; of all windows of n, the one whose removal costs least (as AMD Quark's depth-wise pruner).
- `greedy`: one layer at a time, everything that is left measured anew each time.
- `ranked`: the n layers that cost least one by one (Shortened LLaMA, Kim et al., arXiv 2402.02834).

Healing is least squares: what lies in front of the gap learns to put out the hidden states behind it (`refit/healing.py`). No
parameter is added. Of the windows that perplexity likes best, the one that is best with its FFN in front healed goes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from optimum_prune.anatomy.shape import Shape
from optimum_prune.anatomy.workload import Cost, Workload
from optimum_prune.errors import RecipeError
from optimum_prune.evaluation.losses import logits_memory, losses_cost
from optimum_prune.hooks.marker import hookimpl
from optimum_prune.options import option
from optimum_prune.passes.base import Pass
from optimum_prune.passes.prune import PrunePass
from optimum_prune.refit.bridging import best_of, finalists_cost, hand_on, measured_without
from optimum_prune.refit.healing import heal, healing_cost
from optimum_prune.selection import importance
from optimum_prune.selection.divergence import split, trial_workloads
from optimum_prune.selection.search import Variant, check_finite, measure, perplexities, searching_cost
from optimum_prune.surgery.cuts import Cuts, Decision

if TYPE_CHECKING:
    from torch import Tensor

    from optimum_prune.anatomy.decoder import Decoder
    from optimum_prune.calibration.calibration import Calibration
    from optimum_prune.calibration.stream import Batch

PROTECTED = {"taylor": (4, 2), "magnitude": (4, 2)}
"""Layers at the beginning and at the end that Shortened LLaMA never removes by these criteria; its "+"."""


@dataclass(frozen=True, kw_only=True)
class Depth(PrunePass):
    """Leaves out the decoder layers that cost the least perplexity, or the layers you name, and heals the gap."""

    name: ClassVar[str] = "depth"
    layers: int | None = option("How many decoder layers to leave out; which, is searched for.", None, at_least=1)
    ratio: float | None = option("The same as a fraction of the layers, between 0 and 1.", None, above=0, below=1)
    params: float | None = option(
        "The same, so that this fraction of all the model's parameters is left.", None, above=0, below=1
    )
    drop: tuple[int, ...] | None = option("Indices of the decoder layers to leave out, instead of a search.", None)
    shape: Literal["window", "greedy", "ranked"] = option(
        "Consecutive layers, one at a time measured anew, or the lowest ranked ones.", "window"
    )
    criterion: Literal["perplexity", "taylor", "magnitude", "cosine", "angular"] = option(
        "What tells how much a layer matters.", "perplexity"
    )
    search: Literal["racing", "exact"] = option(
        "Whether candidates that are worse beyond doubt stop early, or all are measured in full.", "racing"
    )
    heal: bool = option("Refit what lies in front of the gap by least squares.", True)
    damping: float = option(
        "For healing: added to the gram's diagonal, relative to its mean.", 0.1, above=0, below=math.inf
    )
    protect_first: int | None = option(
        "Never remove this many layers at the beginning. If not given: 4 for taylor and magnitude, else 0.",
        None,
        at_least=0,
    )
    protect_last: int | None = option(
        "Likewise at the end. If not given: 2 for taylor and magnitude, else 0.", None, at_least=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        targets = {name: getattr(self, name) for name in ("layers", "ratio", "params", "drop")}
        if sum(value is not None for value in targets.values()) != 1:
            raise RecipeError(
                "depth needs exactly one of 'layers' (how many, searched for), 'ratio' or 'params' (the same as a fraction), and "
                "'drop' (which ones)."
            )
        if self.drop is not None and (not self.drop or len(set(self.drop)) < len(self.drop)):
            raise RecipeError(
                f"depth is asked to drop the layers {list(self.drop)}. Name each layer once, and at least one."
            )
        if self.shape == "greedy" and self.criterion != "perplexity":
            raise RecipeError(
                f"depth has shape 'greedy', which measures anew after each layer, and criterion '{self.criterion}', which does not "
                f"change. Use 'ranked', or the criterion 'perplexity'."
            )

    def foresee(self, shape: Shape) -> Shape:
        count = len(shape.layers)
        if self.drop is not None and not all(0 <= index < count for index in self.drop):
            raise RecipeError(
                f"depth is asked to drop the layers {list(self.drop)}, but there are only 0 to {count - 1}."
            )
        gone = self._count(shape)
        if gone >= count:
            raise RecipeError(f"depth is asked to leave out {gone} layers of {count}. Leave at least one in.")
        if self.drop is not None:
            return shape.keep(_without(count, self.drop))
        first, last = self._protected
        if gone > count - first - last:
            raise RecipeError(
                f"depth is asked to leave out {gone} layers of {count}, of which the first {first} and the last {last} are protected. Ask "
                f"for fewer, or set protect_first and protect_last."
            )
        return shape.keep(range(count - gone))

    def _count(self, shape: Shape) -> int:
        """How many layers go."""
        count = len(shape.layers)
        if self.drop is not None:
            return len(self.drop)
        if self.layers is not None:
            return self.layers
        if self.ratio is not None:
            return max(round(self.ratio * count), 1)
        assert self.params is not None
        mean = sum(layer.parameters for layer in shape.layers) / count
        return max(round((1 - self.params) * shape.parameters / mean), 1)

    @property
    def _protected(self) -> tuple[int, int]:
        first, last = PROTECTED.get(self.criterion, (0, 0))
        return (
            first if self.protect_first is None else self.protect_first,
            last if self.protect_last is None else self.protect_last,
        )

    @property
    def _pattern(self) -> str:
        """How the layers that go lie."""
        return self.shape

    @property
    def _chooses_healed(self) -> bool:
        """Whether the best windows are healed and measured again, to choose among them."""
        return self.heal and self._pattern == "window" and self.criterion == "perplexity" and self.drop is None

    @property
    def _races(self) -> bool:
        """Whether candidates may stop early; a ranking needs every figure."""
        return self.search == "racing" and self._pattern != "ranked"

    @property
    def needs_text(self) -> bool:
        return self.drop is None or self.heal

    @property
    def may_end_early(self) -> bool:
        return self.search == "racing"

    def estimate(self, shape: Shape, work: Workload) -> Cost:
        count = self._count(shape)
        _, few = trial_workloads(work)
        influence = few.run_all(shape.layers, few.tokens).with_memory(few.states(3))
        cost = influence.followed_by(self._searching(shape, work, count))
        if self._chooses_healed:
            cost = cost.followed_by(finalists_cost(work, few, shape, count))
        return cost.followed_by(healing_cost(work, shape, count)) if self.heal else cost

    def _searching(self, shape: Shape, work: Workload, count: int) -> Cost:
        """What it takes to find out which layers go."""
        layers = len(shape.layers)
        first, last = self._protected
        if self.drop is not None or self.criterion == "magnitude":
            return Cost()
        if self.criterion == "taylor":
            head = losses_cost(work, work.tokens, work.length, 3)
            backwards = work.run_all(shape.layers, work.tokens, 3).followed_by(head)
            weights = 2 * 4 * max(layer.parameters for layer in shape.layers)
            return backwards.with_memory(work.stored_states(layers + 2) + logits_memory(work, work.tokens) + weights)
        span = count if self._pattern == "window" else 1
        if self.criterion != "perplexity":
            recent = work.stored_states() + work.on(1).states(span + 4)
            return work.run_all(shape.layers, work.tokens).with_memory(recent)
        spans = [(start, start + span, 0.0) for start in range(first, layers - last - span + 1)]
        if self._pattern != "greedy":
            return searching_cost(work, shape, spans, race=self._races)
        rounds = (searching_cost(work, shape, spans[: len(spans) - gone], race=self._races) for gone in range(count))
        return Cost().followed_by(*rounds)

    # Deciding

    def decide(self, decoder: Decoder, calibration: Calibration) -> Iterator[Decision]:
        layers = decoder.layers
        gone, evidence = self._search(decoder, calibration, self._count(decoder.shape()))
        influence = {} if self.drop else calibration.once("influence", lambda: _influence(decoder, calibration))
        if self.heal:
            kept = {layer.index: () if layer.index in gone else layer.blocks for layer in layers}
            yield from heal(decoder, calibration, kept, self.damping)
        cuts = Cuts(layers=_without(len(layers), gone))
        yield Decision(cuts, evidence={"dropped": sorted(gone), **influence, **evidence})

    def _search(self, decoder: Decoder, calibration: Calibration, count: int) -> tuple[Sequence[int], dict[str, Any]]:
        """The layers to leave out, and why."""
        if self.drop is not None:
            return self.drop, {}
        first, last = self._protected
        eligible = range(first, len(decoder) - last)
        if self._pattern == "greedy":
            return self._greedy(decoder, calibration, count, eligible)
        span = count if self._pattern == "window" else 1
        starts = eligible[: len(eligible) - span + 1]
        ranked, evidence = self._ranked(decoder, calibration, starts, span)
        if self._pattern == "ranked":
            return ranked[:count], evidence
        start = ranked[0]
        if self._chooses_healed:
            start, healed = best_of(decoder, calibration, ranked, span, self.damping)
            evidence["perplexity_healed_without_window_from"] = healed
        return range(start, start + span), evidence

    def _ranked(
        self, decoder: Decoder, calibration: Calibration, starts: Sequence[int], span: int
    ) -> tuple[list[int], dict[str, Any]]:
        """The starts of the windows of `span` layers, those first that matter least, and why."""
        if self.criterion == "perplexity":
            losses = measured_without(decoder, calibration, starts, span, race=self._races)
            return [starts[index] for index in losses.ranked], perplexities(losses, "window_from", starts)
        scores = calibration.once("scores", lambda: self._scores(decoder, calibration, span))
        ranked = sorted(starts, key=lambda start: scores[start])
        return ranked, {f"{self.criterion}_from": {start: scores[start] for start in starts}}

    def _greedy(
        self, decoder: Decoder, calibration: Calibration, count: int, eligible: Sequence[int]
    ) -> tuple[Sequence[int], dict[str, Any]]:
        """One layer at a time, each measured on top of those that are gone."""
        layers = decoder.modules
        gone: list[int] = []
        rounds = []

        def run_layer(batch: Batch, index: int, hidden: Tensor) -> Tensor:
            return hidden if index in gone else batch.run(layers[index], index, hidden)

        for number in range(count):
            left = [index for index in eligible if index not in gone]
            variants = [Variant(index, index + 1, hand_on) for index in left]
            what = f"Round {number + 1} of {count}"
            losses = measure(decoder, calibration, variants, what, race=self._races, run_layer=run_layer)
            chosen = left[check_finite(losses, "layer").ranked[0]]
            rounds.append({"removed": chosen, **perplexities(losses, "window_from", left)})
            gone.append(chosen)
        return gone, {"rounds": rounds}

    def _scores(self, decoder: Decoder, calibration: Calibration, span: int) -> list[float]:
        """Of each stretch of `span` layers, by its start, how much it matters."""
        if self.criterion in ("cosine", "angular"):
            scores = importance.distances(decoder, calibration, span, angular=self.criterion == "angular")
        else:
            taylor = self.criterion == "taylor"
            of_layer = importance.taylor(decoder, calibration) if taylor else importance.magnitudes(decoder)
            scores = [sum(of_layer[start : start + span]) for start in range(len(of_layer) - span + 1)]
        return [score if score == score else math.inf for score in scores]


def _influence(decoder: Decoder, calibration: Calibration) -> dict[str, Any]:
    """How far each layer turns hidden states, on a few windows: for the picture of the search."""
    few = calibration.quiet().on(split(calibration.windows)[1])
    return {"influence_of_layer": dict(enumerate(importance.distances(decoder, few, span=1, angular=False)))}


def _without(count: int, gone: Iterable[int]) -> tuple[int, ...]:
    missing = set(gone)
    return tuple(index for index in range(count) if index not in missing)


@hookimpl
def passes() -> Iterator[type[Pass]]:
    yield Depth

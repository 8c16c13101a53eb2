"""Depth pruning: leave out whole decoder layers, and heal the gap without training.

Which layers go is decided by perplexity on the calibration windows, or by a score of each layer. `shape` says how they lie:

- `window`: consecutive layers; of all windows of n, the one whose removal costs least (as AMD Quark's depth-wise pruner).
- `greedy`: one layer at a time, everything that is left measured anew each time.
- `ranked`: the n layers that cost least one by one (Shortened LLaMA, Kim et al., arXiv 2402.02834).

Healing is least squares: what lies in front of the gap learns to put out the hidden states behind it (`healing.py`). No
parameter is added. Of the windows that perplexity likes best, the one that is best with its FFN in front healed goes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from optimum_prune import importance, layerwise, surgery
from optimum_prune.allocation import HELD_OUT, LENGTH, split
from optimum_prune.cost import Cost, healing, searching
from optimum_prune.cuts import Cuts, Decision
from optimum_prune.errors import NumericalError, RecipeError
from optimum_prune.evaluation import perplexity_of
from optimum_prune.healing import heal, projection, through
from optimum_prune.hookspecs import hookimpl
from optimum_prune.options import option
from optimum_prune.passes import Pass, PrunePass
from optimum_prune.progress import Progress
from optimum_prune.reconstruction import refitted
from optimum_prune.search import Losses, Variant, check_finite, measure, perplexities
from optimum_prune.shape import Shape

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from optimum_prune.anatomy import Family
    from optimum_prune.calibration import Calibration
    from optimum_prune.cost import Workload
    from optimum_prune.layerwise import Batch, Visit

FINALISTS = 4
"""Windows of layers that are healed and measured again, to choose among them."""
PROTECTED = {"taylor": (4, 2), "magnitude": (4, 2)}
"""Layers at the beginning and at the end that Shortened LLaMA never removes by these criteria; its "+"."""


@dataclass(frozen=True, kw_only=True)
class Depth(PrunePass):
    """Leaves out the decoder layers that cost the least perplexity, or the layers you name, and heals the gap."""

    name: ClassVar[str] = "depth"
    layers: int | None = option("How many decoder layers to leave out; which, is searched for.", None)
    ratio: float | None = option("The same as a fraction of the layers, between 0 and 1.", None)
    params: float | None = option("The same, so that this fraction of all the model's parameters is left.", None)
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
    damping: float = option("For healing: added to the gram's diagonal, relative to its mean.", 0.1)
    protect_first: int | None = option(
        "Never remove this many layers at the beginning. If not given: 4 for taylor and magnitude, else 0.", None
    )
    protect_last: int | None = option("Likewise at the end. If not given: 2 for taylor and magnitude, else 0.", None)

    def __post_init__(self) -> None:
        targets = {name: getattr(self, name) for name in ("layers", "ratio", "params", "drop")}
        if sum(value is not None for value in targets.values()) != 1:
            raise RecipeError(
                "depth needs exactly one of 'layers' (how many, searched for), 'ratio' or 'params' (the same as a fraction), and "
                "'drop' (which ones)."
            )
        if self.layers is not None and self.layers < 1:
            raise RecipeError(f"depth is asked to leave out {self.layers} layers. Ask for at least 1.")
        for name in ("ratio", "params"):
            if targets[name] is not None and not 0 < targets[name] < 1:
                raise RecipeError(f"depth has {name} {targets[name]}. Give a fraction above 0 and below 1.")
        if self.drop is not None and (not self.drop or len(set(self.drop)) < len(self.drop)):
            raise RecipeError(
                f"depth is asked to drop the layers {list(self.drop)}. Name each layer once, and at least one."
            )
        if self.shape == "greedy" and self.criterion != "perplexity":
            raise RecipeError(
                f"depth has shape 'greedy', which measures anew after each layer, and criterion '{self.criterion}', which does not "
                f"change. Use 'ranked', or the criterion 'perplexity'."
            )
        if not 0 < self.damping < torch.inf:
            raise RecipeError(f"depth has damping {self.damping}. Give a number above 0; 0.1 is usual.")
        for name in ("protect_first", "protect_last"):
            if (getattr(self, name) or 0) < 0:
                raise RecipeError(f"depth has {name} {getattr(self, name)}. Give 0 or more.")

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

    def estimate(self, shape: Shape, work: Workload) -> Cost:
        count, layers = self._count(shape), len(shape.layers)
        few = work.on(min(HELD_OUT, work.windows), min(LENGTH, work.length))
        cost = few.run_all(shape.layers, few.tokens).beside(few.states(3)).then(self._searching(shape, work, count))
        if not self.heal:
            return cost
        if self.shape == "window" and self.criterion == "perplexity" and self.drop is None:
            bridges = [replace(work.refit(layer, attention=False), left=0.0) for layer in shape.layers]
            finalists = min(FINALISTS, layers - count + 1)
            copies = finalists * work.itemsize * work.hidden * max(layer.width for layer in shape.layers)
            bridging = Cost().then(*bridges).times(2 * finalists / layers).beside(work.kept_states(2) + copies)
            spans = [(layers // 2, layers // 2 + count, 1.0)] * finalists if layers // 2 + count <= layers else []
            cost = cost.then(work.walk(shape), bridging, searching(few, shape, spans, race=False).beside(copies))
        return cost.then(healing(work, shape, count))

    def _searching(self, shape: Shape, work: Workload, count: int) -> Cost:
        """What it takes to find out which layers go."""
        layers = len(shape.layers)
        first, last = self._protected
        race = self.search == "racing" and self.shape != "ranked"
        if self.drop is not None or self.criterion == "magnitude":
            return Cost()
        if self.criterion == "taylor":
            backwards = work.run_all(shape.layers, work.tokens, 3).then(work.losses(work.tokens, work.length, 3))
            weights = 2 * 4 * max(layer.parameters for layer in shape.layers)
            return backwards.beside(work.kept_states(layers + 2) + work.logits(work.tokens) + weights)
        span = count if self.shape == "window" else 1
        if self.criterion != "perplexity":
            return work.run_all(shape.layers, work.tokens).beside(work.kept_states() + work.on(1).states(span + 4))
        spans = [(start, start + span, 0.0) for start in range(first, layers - last - span + 1)]
        if self.shape != "greedy":
            return searching(work, shape, spans, race=race)
        return Cost().then(*(searching(work, shape, spans[: len(spans) - gone], race=race) for gone in range(count)))

    # Deciding

    def decide(
        self, model: PreTrainedModel, family: Family, calibration: Calibration, progress: Progress
    ) -> Iterator[Decision]:
        shape = family.shape(model)
        gone, evidence = self._search(model, family, calibration, self._count(shape), progress)
        influence = {} if self.drop else progress.once("influence", lambda: _influence(model, family, calibration))
        if self.heal:
            layers = family.layers_of(model)
            kept = {index: () if index in gone else family.blocks_of(layer) for index, layer in enumerate(layers)}
            yield from heal(model, family, calibration, kept, self.damping, progress)
        cuts = Cuts(layers=_without(len(shape.layers), gone))
        yield Decision(cuts, evidence={"dropped": sorted(gone), **influence, **evidence})

    def _search(
        self, model: PreTrainedModel, family: Family, calibration: Calibration, count: int, progress: Progress
    ) -> tuple[Sequence[int], dict[str, Any]]:
        """The layers to leave out, and why."""
        if self.drop is not None:
            return self.drop, {}
        layers = len(family.layers_of(model))
        first, last = self._protected
        eligible = range(first, layers - last)
        if self.shape == "greedy":
            return self._greedy(model, family, calibration, count, eligible, progress)
        span = count if self.shape == "window" else 1
        starts = eligible[: len(eligible) - span + 1]
        if self.criterion == "perplexity":
            losses = self._measured(model, family, calibration, starts, span, progress)
            ranked, evidence = [starts[index] for index in losses.ranked], perplexities(losses, "window_from", starts)
        else:
            scores = progress.once("scores", lambda: self._scores(model, family, calibration, span, progress))
            ranked = sorted(starts, key=lambda start: scores[start])
            evidence = {f"{self.criterion}_from": {start: scores[start] for start in starts}}
        if self.shape == "ranked":
            return ranked[:count], evidence
        start = ranked[0]
        if self.heal and self.criterion == "perplexity":
            finalists = ranked[:FINALISTS]
            start, healed = progress.once(
                "best healed window",
                lambda: self._best_healed(model, family, calibration, finalists, span, progress),
            )
            evidence["perplexity_healed_without_window_from"] = healed
        return range(start, start + span), evidence

    def _measured(
        self,
        model: PreTrainedModel,
        family: Family,
        calibration: Calibration,
        starts: Sequence[int],
        span: int,
        progress: Progress,
    ) -> Losses:
        """What the model loses without each window of `span` layers."""
        variants = [Variant(start, start + span, _hand_on) for start in starts]
        what = f"Searching windows of {span} layers" if self.shape == "window" else "Searching layers"
        race = self.search == "racing" and self.shape != "ranked"  # a ranking needs every figure
        return check_finite(
            measure(model, family, calibration, variants, progress, what, race=race), "window of layers"
        )

    def _greedy(
        self,
        model: PreTrainedModel,
        family: Family,
        calibration: Calibration,
        count: int,
        eligible: Sequence[int],
        progress: Progress,
    ) -> tuple[Sequence[int], dict[str, Any]]:
        """One layer at a time, each measured on top of those that are gone."""
        layers = family.layers_of(model)
        gone: list[int] = []
        rounds = []

        def run_layer(batch: Batch, index: int, hidden: Tensor) -> Tensor:
            return hidden if index in gone else batch.run(layers[index], index, hidden)

        for number in range(count):
            left = [index for index in eligible if index not in gone]
            losses = measure(
                model,
                family,
                calibration,
                [Variant(index, index + 1, _hand_on) for index in left],
                progress,
                f"Round {number + 1} of {count}",
                race=self.search == "racing",
                run_layer=run_layer,
            )
            chosen = left[check_finite(losses, "layer").ranked[0]]
            rounds.append({"removed": chosen, **perplexities(losses, "window_from", left)})
            gone.append(chosen)
        return gone, {"rounds": rounds}

    def _scores(
        self, model: PreTrainedModel, family: Family, calibration: Calibration, span: int, progress: Progress
    ) -> list[float]:
        """Of each stretch of `span` layers, by its start, how much it matters."""
        if self.criterion in ("cosine", "angular"):
            angular = self.criterion == "angular"
            scores = importance.distances(model, family, calibration, span, angular, progress)
        else:
            of_layer = (
                importance.taylor(model, family, calibration, progress)
                if self.criterion == "taylor"
                else importance.magnitudes(model, family)
            )
            scores = [sum(of_layer[start : start + span]) for start in range(len(of_layer) - span + 1)]
        return [score if score == score else torch.inf for score in scores]

    def _best_healed(
        self,
        model: PreTrainedModel,
        family: Family,
        calibration: Calibration,
        starts: Sequence[int],
        span: int,
        progress: Progress,
    ) -> tuple[int, dict[int, float]]:
        """The start of the window that is best when healed; each is healed on some windows of text and measured on others."""
        fitted, held_out = split(calibration)
        variants = {start: Variant(start, start + span, _hand_on) for start in starts}
        with suppress(NumericalError):  # behind a broken layer nothing can be healed, but it can be left out
            for visit in layerwise.walk(model, family, fitted, progress, "Healing the best windows"):
                start = visit.index + 1
                if start not in variants:
                    continue
                gap = range(start, start + span)
                bridge = partial(_bridged, visit, family, model, gap, self.damping)
                weights = progress.once(f"what bridges layers {start} to {gap[-1]}", bridge)
                layer = surgery.changed_layer(model, family, Decision(weights=weights), visit.index)
                variants[start] = Variant(visit.index, start + span, _as_layer(layer, visit.index))
        order = sorted(variants)
        what = "Measuring the healed windows"
        losses = measure(model, family, held_out, [variants[start] for start in order], progress, what)
        check_finite(losses, "window of layers")
        return order[losses.ranked[0]], dict(zip(order, map(perplexity_of, losses.means), strict=True))


def _influence(model: PreTrainedModel, family: Family, calibration: Calibration) -> dict[str, Any]:
    """How far each layer turns hidden states, on a few windows: for the picture of the search."""
    few = split(calibration)[1]
    turned = importance.distances(model, family, few, span=1, angular=False, progress=Progress())
    return {"influence_of_layer": dict(enumerate(turned))}


def _bridged(visit: Visit, family: Family, model: PreTrainedModel, gap: range, damping: float) -> Mapping[str, Tensor]:
    """New weights of the visited dense layer, that bridge the gap behind it; none where it cannot be refitted."""
    path = projection(visit, family, family.blocks_of(visit.layer))
    if path is None:
        return {}
    before = range(visit.index, gap.stop)
    goal = through(model, family, visit, before)
    return refitted(visit, family, goal, damping, path)


def _hand_on(_: Batch, hidden: Tensor) -> Tensor:
    """What is left out hands on what it is given."""
    return hidden


def _as_layer(layer: torch.nn.Module, index: int) -> Any:
    """Runs another layer in the place of the one at an index."""
    return lambda batch, hidden: batch.run(layer, index, hidden)


def _without(count: int, gone: Iterable[int]) -> tuple[int, ...]:
    missing = set(gone)
    return tuple(index for index in range(count) if index not in missing)


@hookimpl
def passes() -> Iterator[type[Pass]]:
    yield Depth

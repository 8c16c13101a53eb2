"""One budget: the model of a given size that predicts best, whatever has to go for it.

What it costs to narrow each axis of each layer, to leave out its attention, or the layer, is measured as the divergence of the
model's predictions, on text that is given and on text that the model writes itself (`refit/pricing.py`). From these prices follow the
best choices of the size asked for (`selection/options.py`), as in Tyr-the-Pruner (arXiv 2503.09657) and MultiPruner (arXiv 2501.09949) over every
kind of unit at once. The best few are made on some windows and measured on others, and the one that loses least is made anew on all, layer
by layer, each refitted on the stream of those before it (`refit/sequential.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from optimum_prune.anatomy.shape import FEED_FORWARD, STATES, LayerShape, Shape
from optimum_prune.anatomy.workload import Cost, Workload
from optimum_prune.calibration.library import check_library, kept_in
from optimum_prune.calibration.own_text import own_text_cost
from optimum_prune.errors import RecipeError
from optimum_prune.hooks.marker import hookimpl
from optimum_prune.machine.mapped_weights import lies_on_disk
from optimum_prune.options import option
from optimum_prune.passes.base import Pass
from optimum_prune.passes.prune import PrunePass
from optimum_prune.refit.finalists import measured, measuring_cost
from optimum_prune.refit.narrowing import Narrowing
from optimum_prune.refit.pricing import priced, prices_told, pricing_cost
from optimum_prune.refit.rebuilding import rebuilding_cost
from optimum_prune.refit.sequential import STATES_NARROWING, Repairs, Wanted, bringing_cost, brought_to
from optimum_prune.refit.solving import OfMedian
from optimum_prune.selection.allowed import BLOCKS, LAYERS, Allowed
from optimum_prune.selection.goals import SPEEDS, Goal
from optimum_prune.selection.kinds import TextKinds, held_out_work, read_tasks
from optimum_prune.selection.limits import Limit
from optimum_prune.selection.measures import whole
from optimum_prune.selection.shapes import Choice, Priced, PriceList, cost_of, parameters_of, sizes_told
from optimum_prune.selection.targets import Target, check_named_once, check_protected
from optimum_prune.surgery.cuts import NOTE, Decision
from optimum_prune.surgery.operation import copy_of
from optimum_prune.text.tasks import check_task_files
from optimum_prune.text.windows import joined

if TYPE_CHECKING:
    from optimum_prune.anatomy.decoder import Decoder
    from optimum_prune.calibration.calibration import Calibration

FITTED = 10
"""Windows of each kind to which is fitted, at most, to see what cutting costs."""
FITTED_FINALISTS = 6
"""The same, to see which of some models loses least."""
OWN_TEXT = 1.2
"""Text that the model writes itself, as a fraction of the text given."""
PRICING = Narrowing(OfMedian(0.05), step=16)
"""How layers are narrowed to see what that costs."""
STATES_TRIED = 3
"""Numbers of features of hidden states that are tried, at most."""
MORE = 4
"""How many models are made and measured at most."""


@dataclass(frozen=True, kw_only=True)
class Budget(Limit, PrunePass):
    """Finds the model of a given size that predicts best: fewer layers, blocks, heads, channels or experts' channels, whichever hurt least."""

    name: ClassVar[str] = "budget"
    foresees_layers: ClassVar[bool] = False
    form: Literal["heterogeneous", "stock"] = option(
        "Each layer its own sizes, or all layers alike, which every runtime reads.", "heterogeneous"
    )
    allow: tuple[str, ...] = option(
        "What may become less: layers, blocks, and the names of axes. If not given: all that there is.", ()
    )
    protect: tuple[int, ...] = option("Layers to leave as they are.", ())
    multiple_of: int | None = option(
        "Keep a multiple of this many channels. If not given: 64, or less for layers narrower than 1024.",
        None,
        at_least=1,
    )
    own_text: float | None = option(
        f"Text that the model writes itself and is calibrated on besides, as a fraction of the text given. If not given: {OWN_TEXT}, or 0 if offloaded.",
        None,
        at_least=0,
        at_most=4,
    )
    damping: float = option("Added to the gram's diagonal, relative to its median.", 0.2, above=0, below=math.inf)
    correction: float = option(
        "How far to move what blocks put out towards the dense model's hidden states, 0 to 1.",
        0.25,
        at_least=0,
        at_most=1,
    )
    reading: float = option(
        "How far to refit what blocks read of hidden states once these are not what they were, 0 to 1.",
        0.5,
        at_least=0,
        at_most=1,
    )
    rebuild: bool = option("Choose the channels of an FFN in front of layers that go from theirs as well.", True)
    finalists: int | None = option(
        "How many models are made and measured before the best is made; 1 is the best by prices. If not given: 2, or 3 of the stock form.",
        None,
        at_least=1,
        at_most=MORE,
    )
    tasks: tuple[str, ...] = option(
        "Files of questions on which it is measured as well what a model loses: JSON lines with 'query', 'choices' and 'gold', the number of the right one.",
        (),
    )
    library: str | None = option(
        "A folder to keep in what layers cost, and to take it from: a search for another size begins there.", None
    )
    step: int = option("Channels removed before the rest are ranked anew; 1 is the exact greedy.", 4, at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_limit(self.name)
        check_named_once(self.name, self.protect)
        check_task_files(self.tasks)
        if self.library is not None:
            check_library(self.name, self.library)
        if self.form == "stock" and self.protect:
            raise RecipeError(
                "budget has form 'stock', in which all layers are alike, and layers to protect. Leave one of the two out."
            )
        if self.form == "stock" and BLOCKS in self.allow:
            raise RecipeError(
                "budget has form 'stock', in which no layer lacks a block, and allows blocks to go. Leave one of the two out."
            )

    @property
    def _allowed(self) -> Allowed:
        return Allowed(self.name, self.allow, self.protect, self.multiple_of, even=self.form == "stock")

    @property
    def _finalists(self) -> int:
        """Models that are made first; by prices alone, those with fewer and wider layers are hardly told apart."""
        return self.finalists or (3 if self.form == "stock" else 2)

    @property
    def _repairs(self) -> Repairs:
        narrowing = Narrowing(OfMedian(self.damping), self.correction, self.step)
        return Repairs(narrowing, self.reading, rebuild=self.rebuild)

    @property
    def keeps_in(self) -> tuple[str, ...]:
        """The library."""
        return () if self.library is None else (self.library,)

    # What there will be

    def foresee(self, shape: Shape) -> Shape:
        check_protected(self.name, self.protect, shape)
        self._allowed.check(shape)
        if goal := self.known_goal(self.name, shape):
            goal.check(self._allowed, shape)
        if self._allowed.states(shape) and self.limit in SPEEDS:
            raise RecipeError(
                f"{self.name} is to allow narrower hidden states, and has {self.limit}: no table tells the times of those. Leave one of the two out."
            )
        return self._allowed.of_size(shape, self.guess * shape.parameters)

    def estimate(self, shape: Shape, work: Workload) -> Cost:
        given, own = work.windows, self._own_windows(work.windows, offloaded=work.offloaded)
        both, few = work.on(given + own), held_out_work(work, own, tasks=bool(self.tasks))
        wanted, quick = Wanted(evenly := self._evenly(shape)), self._repairs.quicker(PRICING.step)
        fitted, fitted_less = (work.on(min(most, given) + min(most, own)) for most in (FITTED, FITTED_FINALISTS))
        costs = [self.timing_cost(work, shape)]
        if own:
            costs.append(own_text_cost(work, shape, own))
        costs.append(pricing_cost(fitted, few, shape, self._allowed, PRICING))
        if self._allowed.states(shape):
            costs.append(STATES_NARROWING.cost(fitted, shape).times(STATES_TRIED))
        if self._finalists > 1:
            costs.append(measuring_cost(fitted_less, few, shape, wanted, quick).times(self._finalists))
        if self.rebuild and self._allowed.allows(LAYERS):  # the same of every gap, whichever it is
            costs.append(rebuilding_cost(both, shape.layers[0], evenly[0], 1, self._repairs.for_rebuilding()))
        return Cost().followed_by(*costs, bringing_cost(both, shape, wanted, self._repairs))

    def _evenly(self, shape: Shape) -> list[LayerShape]:
        """Of each layer about as much as of all."""
        inner = Target(self.name, FEED_FORWARD, self.protect, self.multiple_of)
        return list(inner.narrowed(shape, min(1 - self.guess, 0.8)).layers)

    # Deciding

    def decide(self, decoder: Decoder, calibration: Calibration) -> Iterator[Decision]:
        dense = copy_of(decoder)
        goal = self.goal(self.name, dense, calibration, self._allowed)
        goal.check(self._allowed, dense.shape())
        own = self._own_windows(len(calibration.windows), offloaded=lies_on_disk(dense.modules[0]))
        tasks = read_tasks(self.name, self.tasks, calibration)
        asked = [] if tasks is None else tasks.tokens.tolist()
        kept = kept_in(self.library, calibration, dense.model, self._allowed, own, *asked)
        texts = TextKinds.with_own(dense, kept, own, tasks)
        few, held_out = kept.on(texts.fitted(FITTED)), kept.on(joined(list(texts.held_out().values())))
        layers = priced(dense, few, held_out, self._allowed, PRICING)
        prices = PriceList(layers, dense.shape().rest, goal.measure)
        states = self._states(dense, calibration.on(few.windows), calibration.on(held_out.windows), goal)
        best, evidence = self._best(dense, calibration, texts, goal, self._choices(prices, goal, states))
        least = self._allowed.smallest(dense.shape(), goal.measure)
        front = [[size / goal.before, cost] for size, cost in prices.frontier(least)]
        times = {"times": goal.times} if goal.times else {}
        yield Decision(evidence={**evidence, **prices_told(layers, dense.shape()), "frontier": front, **times})
        yield from brought_to(decoder, dense, calibration.on(texts.all), Wanted(best), self._repairs)

    def _states(self, dense: Decoder, fitted: Calibration, held_out: Calibration, goal: Goal) -> dict[int, float]:
        """Numbers of features that hidden states may have, and what that costs by itself."""
        shape = dense.shape()
        left = {size: shape.narrowed({STATES: size}) for size in self._allowed.states(shape)}
        sizes = {size: whole(goal.measure, each.layers, each.rest) for size, each in left.items()}
        alone = [size for size in sizes if sizes[size] <= goal.size][-1:]  # nothing else has to go then
        more = [size for size in sizes if sizes[size] > goal.size]
        tried = sorted({*alone, *(more[len(more) * part // STATES_TRIED] for part in range(1, STATES_TRIED) if more)})
        wanted = [Wanted(left[size].layers) for size in tried]
        costs = measured(dense, fitted, {"": held_out.quiet()}, wanted, self._repairs.quicker(PRICING.step))
        found = {size: lost[""] for size, lost in zip(tried, costs, strict=True)}
        return {shape.rest.units(STATES): 0.0, **found}

    def _choices(self, prices: PriceList, goal: Goal, states: Mapping[int, float]) -> list[Priced]:
        """Those of which the best is to be found, by their prices.

        Args:
            states: what numbers of features of hidden states cost by themselves.

        Raises:
            RecipeError: there is none.
        """
        if self.form == "stock":
            found = goal.found(partial(self._even, prices, states))
        else:
            found = [choice for some in prices.kinds() for choice in goal.found(some.within)]
            found = sorted(dict(found).items(), key=cost_of)[: self._finalists]
        if not found:
            alike = " whose layers are all alike" if self.form == "stock" else ""
            raise RecipeError(
                f"{self.name} finds no model{alike} of the size asked for. Ask for another, or allow more."
            )
        return found

    def _even(self, prices: PriceList, states: Mapping[int, float], size: float) -> list[Priced]:
        """The best choices of a size whose layers are all alike: the nearest to a fraction of the parameters, and else no more than it."""
        most = size + (prices.even_step / 2 if self.params is not None else 0.0)
        found = [
            (choice, cost + of_states)
            for features, of_states in states.items()
            for choice, cost in prices.with_states(features).even(most, self._finalists)
        ]
        return sorted(found, key=cost_of)[: self._finalists]

    def _best(
        self, dense: Decoder, calibration: Calibration, texts: TextKinds, goal: Goal, choices: Sequence[Priced]
    ) -> tuple[Choice, dict[str, Any]]:
        """The choice that loses least once it is made, and what was considered."""
        shape = dense.shape()
        considered = [
            {
                "parameters": parameters_of(choice, shape) / shape.parameters,
                **goal.told(choice, shape),
                "sizes": list(sizes_told(choice, shape)),
                "nats_per_token_by_prices": cost,
            }
            for choice, cost in choices
        ]
        best, made = 0, ""
        if len(choices) > 1:
            wanted = [Wanted(choice) for choice, _ in choices]
            held_out = {name: calibration.quiet().on(windows) for name, windows in texts.held_out().items()}
            fitted = calibration.on(texts.fitted(FITTED_FINALISTS))
            found = measured(dense, fitted, held_out, wanted, self._repairs.quicker(PRICING.step))
            for each, lost in zip(considered, found, strict=True):
                each["nats_per_token"] = lost
            means = [sum(lost.values()) / len(lost) for lost in found]
            best = means.index(min(means))
            losses = ", ".join(f"{value:.3f} on {name}" for name, value in found[best].items())
            made = f"the best of {len(choices)} models that were made loses {losses}, in nats a token"
        considered[best]["best"] = True
        note = "; ".join(filter(None, [goal.reached(choices[best][0], shape), made]))
        evidence = {"considered": considered, "chosen": considered[best]["sizes"]}
        return choices[best][0], {**evidence, NOTE: note} if note else evidence

    def keeps(self, shape: Shape, work: Workload) -> float:
        """Where weights stay on disk, so do those of each finalist."""
        made = self._finalists if self._finalists > 1 and work.offloaded else 0
        return made * sum(layer.parameters for layer in shape.layers) * work.itemsize

    def _own_windows(self, given: int, *, offloaded: bool) -> int:
        share = (0.0 if offloaded else OWN_TEXT) if self.own_text is None else self.own_text
        return round(share * given)


@hookimpl
def passes() -> Iterator[type[Pass]]:
    yield Budget

"""Masks without back-propagation: which units stay is learned from the losses of masked models (Gao et al., arXiv 2406.10576).

Each group of FFN channels, each key-value head and, if asked for, each layer has a probability of staying. In a step masks are drawn from
these, the model runs forward with each on the same few windows, and a policy gradient moves the probabilities
(`selection/bernoulli.py`); they are then lowered until no more stays on average than is wanted, in all layers together. So every layer
finds its own widths. At the end the most probable stay, and what is left is refitted by least squares. What was learned, also on the way,
is compared with what it began with, on other windows, and the best is cut.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from optimum_prune.anatomy.shape import ATTENTION, BLOCKS, FEED_FORWARD, AxisShape, Shape
from optimum_prune.anatomy.workload import Cost, Workload
from optimum_prune.calibration.stream import walk_cost
from optimum_prune.errors import RecipeError
from optimum_prune.evaluation.losses import losses_cost
from optimum_prune.hooks.marker import hookimpl
from optimum_prune.machine import processes
from optimum_prune.options import option
from optimum_prune.passes.base import Pass
from optimum_prune.passes.prune import PrunePass
from optimum_prune.refit.controls import Comparison, controls_cost
from optimum_prune.refit.narrowing import Narrowing
from optimum_prune.selection.bernoulli import WHOLE, Baseline, Kind, drawn, gradient, projected, told
from optimum_prune.selection.masked import Masked, some_windows, structured_metric
from optimum_prune.selection.targets import Target, check_named_once, check_protected
from optimum_prune.surgery.cuts import NOTE, Cuts, Decision

if TYPE_CHECKING:
    from optimum_prune.anatomy.decoder import Decoder
    from optimum_prune.calibration.calibration import Calibration

LENGTH = 128
"""Tokens of a window of a step."""
STEPS = 500
ON_THE_WAY = {"a third": 1 / 3, "two thirds": 2 / 3}
"""Parts of the learning after which the probabilities are looked at beside those in the end."""

State = Mapping[str, Tensor]
"""Of each kind, the probabilities of its units."""


@dataclass(frozen=True, kw_only=True)
class Bernoulli(PrunePass):
    """Learns from losses alone which channels, heads and layers stay, each layer with its own number, and refits what is left."""

    name: ClassVar[str] = "bernoulli"
    ratio: float | None = option("Fraction of all FFN channels to remove, between 0 and 1.", None, above=0, below=1)
    head_ratio: float | None = option("Fraction of all key-value heads to remove.", None, above=0, below=1)
    layers: int | None = option("How many decoder layers to remove.", None, at_least=1)
    multiple_of: int | None = option(
        "Channels go in groups of so many. If not given: 64, or less for layers narrower than 1024.", None, at_least=1
    )
    start: Literal["metric", "flat"] = option(
        "Begin with probabilities by the sizes of weights and of their inputs, or with all alike.", "metric"
    )
    steps: int | None = option("Steps of learning; 500 if neither tokens nor minutes are given.", None, at_least=1)
    tokens: int | None = option("The same, as tokens that run through the model.", None, at_least=1)
    minutes: float | None = option("The same, as a time.", None, above=0, below=math.inf)
    masks: int = option("Masks of a step.", 2, at_least=2)
    batch: int = option("Tokens of a step, for each mask; at least one window is taken.", 256, at_least=1)
    learning_rate: float = option("How far probabilities move in a step, at first.", 0.003, above=0, below=1)
    damping: float = option(
        "For refitting: added to the gram's diagonal, relative to its mean.", 0.01, above=0, below=math.inf
    )
    protect: tuple[int, ...] = option("Layers to leave as they are.", ())

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio is None and self.head_ratio is None and self.layers is None:
            raise RecipeError(
                "bernoulli needs a target: 'ratio' for FFN channels, 'head_ratio' for heads, 'layers' for layers."
            )
        given = [name for name in ("steps", "tokens", "minutes") if getattr(self, name) is not None]
        if len(given) > 1:
            raise RecipeError(f"bernoulli is given {' and '.join(given)}. Give one of them.")
        check_named_once(self.name, self.protect)

    def _targets(self) -> dict[str, tuple[float, Target]]:
        """Of each block that is narrowed, by how much."""
        asked = {FEED_FORWARD: self.ratio, ATTENTION: self.head_ratio}
        return {
            block: (ratio, Target(self.name, block, self.protect, self.multiple_of if block == FEED_FORWARD else 1))
            for block, ratio in asked.items()
            if ratio is not None
        }

    # What there will be

    def foresee(self, shape: Shape) -> Shape:
        check_protected(self.name, self.protect, shape)
        found, searched = shape, dict[str, int]()
        for kind, units in self._kinds(shape).items():
            if kind == WHOLE:
                continue
            share = units.keep / units.units
            axes = {axis for _, axis, _ in units.places}
            group = {axis: self._group(kind, shape.layers[index].axis_named(axis)) for index, axis, _ in units.places}
            narrowed = (
                layer.narrowed({axis: max(round(layer.units(axis) * share), 1) for axis in axes if layer.units(axis)})
                if index not in self.protect
                else layer
                for index, layer in enumerate(found.layers)
            )
            found, searched = replace(found, layers=tuple(narrowed)), {**searched, **group}
        found = replace(found, searched=searched)
        return found.keep(range(len(shape.layers) - (self.layers or 0)))

    def _group(self, block: str, axis: AxisShape) -> int:
        """How many units go together."""
        return self._targets()[block][1].multiple(axis) if block == FEED_FORWARD else 1

    def _kinds(self, shape: Shape) -> dict[str, Kind]:
        """The units that may go, by what they are."""
        found: dict[str, Kind] = {}
        for block, (ratio, _) in self._targets().items():
            what = "head_ratio" if block == ATTENTION else "ratio"
            places, possible = [], dict[int, tuple[int, ...]]()
            for index, layer in enumerate(shape.layers):
                for axis in layer.within(block) if index not in self.protect else ():
                    if axis.groups or not axis.fewer:
                        continue
                    group = self._group(block, axis)
                    if axis.units % group:
                        raise RecipeError(
                            f"bernoulli has groups of {group}, and a layer has {axis.units} {axis.units_are}. Give a multiple_of that divides these."
                        )
                    places.append((index, axis.name, axis.units // group))
                    if group == 1 and axis.possible is not None:
                        possible[index] = axis.possible
            if not places:
                raise RecipeError(
                    f"bernoulli has a {what}, and no layer of this model has units that could go for it, those of experts not being among them. "
                    f"Leave {what} out."
                )
            units = sum(count for _, _, count in places)
            keep = max(units - round(units * ratio), len(places))
            if keep == units:
                raise RecipeError(
                    f"bernoulli has {what} {ratio:g}, by which none of {units} units or groups of them would go, one of each layer being kept. Ask "
                    f"for more, or for smaller groups by multiple_of."
                )
            found[block] = Kind(tuple(places), keep, possible)
        if self.layers is not None:
            free = tuple((index, "", 1) for index in range(len(shape.layers)) if index not in self.protect)
            if self.layers >= len(free):
                raise RecipeError(
                    f"bernoulli is to remove {self.layers} layers of {len(free)} that may go. Leave at least one in."
                )
            found[WHOLE] = Kind(free, len(free) - self.layers, {})
        return found

    def remark(self, _: Shape) -> str:
        return (
            ""
            if self.minutes is None
            else f"{self.name} learns for {self.minutes:g} minutes, which are not in the time above."
        )

    def estimate(self, shape: Shape, work: Workload) -> Cost:
        step = work.on(max(1, self.batch // min(LENGTH, work.length)), min(LENGTH, work.length))
        steps = STEPS if self.minutes else self._most(work.length)
        runs = step.run_all(shape.layers, step.tokens, self.masks * steps)
        learned = runs.followed_by(losses_cost(step, step.tokens, step.tokens, self.masks * steps))
        narrowing = Narrowing(self.damping)
        pairs = zip(shape.layers, self.foresee(shape).layers, strict=False)
        cuts = [narrowing.cost(work, before, after).with_memory(work.stored_states()) for before, after in pairs]
        return walk_cost(work, shape).followed_by(learned, controls_cost(shape, work), walk_cost(work, shape), *cuts)

    # Deciding

    def decide(self, decoder: Decoder, calibration: Calibration) -> Iterator[Decision]:
        shape = decoder.shape()
        kinds = self._kinds(shape)
        start = calibration.once("start", partial(self._started, decoder, calibration, kinds))
        states, losses = self._learned(decoder, calibration, kinds, start)
        chosen = {name: self._cuts(shape, kinds, state) for name, state in {"start": start, **states}.items()}
        refits = {
            f"{layer.prefix}{axis.output}" for layer in decoder.layers for axis in layer.axes.values() if axis.output
        }
        found = calibration.once("compared", partial(Comparison(decoder, refits).perplexities, chosen, calibration))
        best = min(found, key=lambda name: found[name])
        yield Decision(evidence={"perplexity_with_cut": found, "losses": losses, NOTE: told(found, best, len(losses))})
        yield from self._cut(decoder, calibration, chosen[best])

    def _cut(self, decoder: Decoder, calibration: Calibration, cuts: Cuts) -> Iterator[Decision]:
        """The cuts, layer by layer, and new weights for what is left."""
        narrowing = Narrowing(self.damping)
        gone = set() if cuts.layers is None else set(range(len(decoder))) - set(cuts.layers)
        for visit in calibration.walk(decoder, "Refitting, layer by layer"):
            if visit.index in gone:
                visit.skip()
                continue
            own = dict(cuts.of(visit.index))
            for block in BLOCKS:
                for axis in [axis for axis in visit.layer.axes.values() if axis.block == block and axis.name in own]:
                    kept: Any = own[axis.name]
                    decision = calibration.once(
                        f"{axis.size} of layer {visit.index}", partial(narrowing.keeping, visit, axis.name, kept)
                    )
                    visit.narrow(axis, kept)
                    yield decision
        if cuts.layers is not None:
            yield Decision(Cuts(layers=cuts.layers))

    def _cuts(self, shape: Shape, kinds: Mapping[str, Kind], state: State) -> Cuts:
        """What the most probable units come to."""
        units: dict[tuple[int | None, str], tuple[int, ...]] = {}
        left = set(range(len(shape.layers)))
        for name, kind in kinds.items():
            for (index, axis, count), kept in zip(kind.places, kind.best(state[name]), strict=True):
                if not axis:
                    left -= set() if kept.all() else {index}
                elif not kept.all():
                    group = shape.layers[index].units(axis) // count
                    units[index, axis] = tuple(kept.repeat_interleave(group).nonzero().flatten().tolist())
        units = {place: kept for place, kept in units.items() if place[0] in left}
        layers = tuple(sorted(left)) if len(left) < len(shape.layers) else None
        return Cuts(layers, {}, units)

    # Learning

    def _started(self, decoder: Decoder, calibration: Calibration, kinds: Mapping[str, Kind]) -> dict[str, Tensor]:
        """The probabilities to begin with."""
        share = {name: kind.keep / kind.units for name, kind in kinds.items()}
        flat = {name: torch.full((kind.units,), share[name], dtype=torch.float64) for name, kind in kinds.items()}
        if self.start == "flat":
            return flat
        scores = structured_metric(decoder, calibration, {name: kind for name, kind in kinds.items() if name != WHOLE})
        for name, score in scores.items():
            likely = kinds[name].standardized(score).sigmoid()
            flat[name] = projected(likely + share[name] - likely.mean(), kinds[name].keep)
        return flat

    def _learned(
        self, decoder: Decoder, calibration: Calibration, kinds: Mapping[str, Kind], start: State
    ) -> tuple[dict[str, State], list[float]]:
        """The probabilities on the way and in the end, and the mean loss of the masks of each step."""
        state, baseline, losses, spent = dict(start), Baseline(), list[float](), 0.0
        on_the_way: dict[str, State] = {}
        with Masked(decoder, kinds).ready() as masked:
            most = self._most(calibration.windows.length)
            for number in calibration.track(range(most), "Learning masks"):
                done = spent / (60 * self.minutes) if self.minutes else number / most
                passed = [name for name, part in ON_THE_WAY.items() if done >= part]
                on_the_way |= {name: state for name in passed if name not in on_the_way}
                if done >= 1:
                    break
                step = partial(self._step, masked, calibration, (state, baseline), number, done)
                made = calibration.once("step", step)
                state, baseline = dict(made["state"]), Baseline(*made["baseline"])
                losses, spent = [*losses, made["loss"]], spent + made["seconds"]
        return {**on_the_way, "learned": state}, losses

    def _most(self, length: int) -> int:
        """How many steps there are at most, on windows of so many tokens."""
        if self.minutes:
            return 10**9
        length = min(LENGTH, length)
        each = max(1, self.batch // length) * length * self.masks
        return self.steps or (max(1, self.tokens // each) if self.tokens else STEPS)

    def _step(
        self, masked: Masked, calibration: Calibration, now: tuple[State, Baseline], number: int, done: float
    ) -> dict[str, Any]:
        """One step of learning."""
        started, (state, baseline) = time.perf_counter(), now
        generator = torch.Generator().manual_seed(number)
        windows = some_windows(calibration.windows, self.batch, LENGTH, generator)
        masks = {name: drawn(values, self.masks, generator) for name, values in state.items()}
        losses = [masked.loss({name: each[k] for name, each in masks.items()}, windows) for k in range(self.masks)]
        sound = [k for k, loss in enumerate(losses) if math.isfinite(loss)]
        new, after = dict(state), baseline
        if len(sound) > 1:
            after = baseline.after([losses[k] for k in sound])
            advantages = after.advantages([losses[k] for k in sound])
            rate = self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
            for name, values in state.items():
                kind = masked.kinds[name]
                towards = kind.shared(gradient(values, [masks[name][k] for k in sound], advantages))
                new[name] = projected(values - rate * towards, kind.keep)
        seconds = processes.broadcast_from_first(lambda: time.perf_counter() - started)
        mean = sum(losses) / len(losses)
        return {"state": new, "baseline": [after.square], "loss": mean, "seconds": seconds}


@hookimpl
def passes() -> Iterator[type[Pass]]:
    yield Bernoulli

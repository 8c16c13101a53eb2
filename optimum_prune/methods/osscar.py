"""OSSCAR: one-shot structured pruning by combinatorial optimization (Meng et al., ICML 2024, arXiv 2403.12983).

Layer by layer, attention heads and FFN channels are removed so that the output of attention and of the FFN changes least over
the calibration tokens: greedily, one at a time, each the cheapest given those that went before, with the weights on what is
left refitted exactly (`elimination.py` has the mathematics). Of heads, whole key-value heads go, with the query heads that
share them. Of a mixture, every expert keeps as many channels, chosen and refitted over the tokens that are routed to it. Later
layers see the stream of the pruned layers before them. Where the projection has a bias, its inputs are taken less their mean,
and the bias takes over the mean of what is lost.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise, repeat
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch

from optimum_prune import layerwise
from optimum_prune.allocation import HELD_OUT, LENGTH, STRIDE, Divergence, Measured, allocate, split
from optimum_prune.anatomy import Family, features_of
from optimum_prune.cost import Cost
from optimum_prune.cuts import Cuts, Decision
from optimum_prune.elimination import Elimination, eliminate, eliminate_groups
from optimum_prune.errors import RecipeError
from optimum_prune.hookspecs import hookimpl
from optimum_prune.layerwise import Visit
from optimum_prune.options import option
from optimum_prune.passes import Pass, PrunePass
from optimum_prune.progress import Progress
from optimum_prune.reconstruction import Aim, gram_for, moved, named, observed_channels, observed_heads
from optimum_prune.shape import LayerShape, Shape
from optimum_prune.statistics import Gram, solving_device

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from optimum_prune.calibration import Calibration
    from optimum_prune.cost import Workload

LARGEST_MULTIPLE = 64
EXPERT_MULTIPLE = 8
"""Experts are multiplied in groups by kernels that take rows of whole 16 bytes only."""


@dataclass(frozen=True, kw_only=True)
class Osscar(PrunePass):
    """Removes FFN channels and attention heads by exact greedy elimination and refits what is left by least squares."""

    name: ClassVar[str] = "osscar"
    ratio: float | None = option("Fraction of the FFN channels to remove, between 0 and 1.", None)
    params: float | None = option(
        "Fraction of all the model's parameters to keep, instead of 'ratio'; the FFN width is solved for.", None
    )
    head_ratio: float | None = option(
        "Fraction of the key-value heads to remove, with their query heads. If not given: 0, or if global, as many as are cheap.",
        None,
    )
    allocation: Literal["uniform", "global"] = option(
        "As much from every layer, or from each what hurts the model least: heads may then go instead of channels.",
        "uniform",
    )
    protect: tuple[int, ...] = option("Layers to leave as they are.", ())
    multiple_of: int | None = option(
        "Keep a multiple of this many channels. If not given: 64, or less for layers narrower than 1024.", None
    )
    damping: float | None = option(
        "Added to the gram's diagonal, relative to its mean. If not given: 0.01, or 0.2 with a correction.", None
    )
    correction: float | None = option(
        "How far to move the FFN's outputs towards the dense model's hidden states, 0 to 1. If not given: 0, or 0.25 if global.",
        None,
    )
    step: int = option("Channels removed before the rest are ranked anew; 1 is the exact greedy.", 1)
    swaps: int = option("After the elimination, swap up to this many pairs of channels where the loss falls.", 0)
    one_shot: bool = option("Rank the channels once instead of eliminating them; faster for very wide layers.", False)

    def __post_init__(self) -> None:
        if self.ratio is None and self.params is None and not self.head_ratio:
            raise RecipeError(
                "osscar needs a target: 'ratio' or 'params' for the FFN channels, 'head_ratio' for heads."
            )
        if self.ratio is not None and self.params is not None:
            raise RecipeError("osscar has both 'ratio' and 'params', which ask for two widths. Give one of them.")
        for name, meaning in (("ratio", "remove"), ("head_ratio", "remove"), ("params", "keep")):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1 and (name, value) != ("head_ratio", 0):
                raise RecipeError(f"osscar has {name} {value}. Give the fraction to {meaning}, above 0 and below 1.")
        if self.allocation == "global" and self.ratio is None and self.params is None:
            raise RecipeError(
                "osscar has allocation 'global' and no channels to remove. Give 'ratio' or 'params' too."
            )
        if len(set(self.protect)) < len(self.protect) or any(index < 0 for index in self.protect):
            raise RecipeError(f"osscar is to protect the layers {list(self.protect)}. Name each once, counted from 0.")
        for name in ("multiple_of", "step"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"osscar has {name} {value}. Give a whole number of at least 1.")
        if self.damping is not None and not 0 < self.damping < torch.inf:
            raise RecipeError(f"osscar has damping {self.damping}. Give a number above 0; 0.01 is usual.")
        if self.correction is not None and not 0 <= self.correction <= 1:
            raise RecipeError(f"osscar has correction {self.correction}. Give a number from 0 to 1; 0.25 is usual.")
        if self.swaps < 0:
            raise RecipeError(f"osscar has swaps {self.swaps}. Give 0 or more.")

    @property
    def _correction(self) -> float:
        return (0.25 if self.allocation == "global" else 0.0) if self.correction is None else self.correction

    @property
    def _damping(self) -> float:
        return (0.2 if self._correction else 0.01) if self.damping is None else self.damping

    # What there will be

    def foresee(self, shape: Shape) -> Shape:
        unknown = [index for index in self.protect if index >= len(shape.layers)]
        if unknown:
            raise RecipeError(
                f"osscar is to protect the layer {unknown[0]}, but there are only 0 to {len(shape.layers) - 1}."
            )
        if len(self.protect) == len(shape.layers):
            raise RecipeError("osscar is to protect every layer, so there is nothing to prune. Leave some out.")
        fewer = self._each(shape, self._with_fewer_heads)
        if self.ratio is None and self.params is None:
            return fewer
        if self.ratio is not None:
            found = self._narrowed(fewer, self.ratio)
        else:
            assert self.params is not None
            found = self._solved(fewer, self.params * shape.parameters)
        return found if self.allocation == "uniform" else replace(found, searched_width=self._least(fewer))

    def _each(self, shape: Shape, change: Any) -> Shape:
        """With every layer changed that is not protected."""
        layers = (layer if index in self.protect else change(layer) for index, layer in enumerate(shape.layers))
        return replace(shape, layers=tuple(layers))

    def _with_fewer_heads(self, layer: LayerShape) -> LayerShape:
        if not self.head_ratio:
            return layer
        if not layer.heads:
            raise RecipeError(
                "osscar has a head_ratio, but the config of this architecture cannot say that there are fewer heads of the same size. "
                "Leave head_ratio out."
            )
        wanted = min(max(round(layer.heads * (1 - self.head_ratio)), 1), layer.heads - 1)
        if wanted not in layer.possible_heads:
            possible = [count for count in layer.possible_heads if count < layer.heads]
            raise RecipeError(
                f"osscar has head_ratio {self.head_ratio}, which keeps {wanted} of {layer.heads} key-value heads, and the config of this "
                + (
                    f"architecture allows {', '.join(map(str, possible))}: the number of query heads must divide the hidden size."
                    if possible
                    else "architecture allows no fewer. Leave head_ratio out."
                )
            )
        return layer.narrowed(heads=wanted)

    def _narrowed(self, shape: Shape, ratio: float) -> Shape:
        """With about this fraction of the channels removed from every layer that is not protected."""

        def narrow(layer: LayerShape) -> LayerShape:
            return layer.narrowed(
                width=self.kept_width(layer.width, ratio) if layer.width else None,
                expert_width=self.kept_width(layer.expert_width, ratio, experts=True) if layer.expert_width else None,
            )

        return self._each(shape, narrow)

    def _solved(self, shape: Shape, parameters: float) -> Shape:
        """With the widths that bring the model nearest to this many parameters.

        Raises:
            RecipeError: no width does.
        """
        multiples = ((width, self._multiple(width, experts)) for width, experts in _widths(shape))
        exact = sorted({kept / width for width, multiple in multiples for kept in range(multiple, width, multiple)})
        between = [(low + high) / 2 for low, high in pairwise(exact)]  # where layers have widths of their own
        found = {1 - kept: self._narrowed(shape, 1 - kept) for kept in (*exact, *between)}
        if not found:
            raise RecipeError("The layers are too narrow to keep a multiple of 'multiple_of' channels. Lower it.")
        nearest = min(found.values(), key=lambda shape: abs(shape.parameters - parameters))
        sizes = sorted(each.parameters for each in found.values())
        step = max(second - first for first, second in zip(sizes, [*sizes[1:], shape.parameters], strict=True))
        if abs(nearest.parameters - parameters) > step:
            total = parameters / self.params if self.params else parameters
            raise RecipeError(
                f"osscar is to keep {self.params:.4g} of the parameters. By the FFN channels it can keep {sizes[0] / total:.3f} to "
                f"{sizes[-1] / total:.3f} of them; change 'params', or remove heads or layers as well."
            )
        return nearest

    def kept_width(self, width: int, ratio: float, *, experts: bool = False) -> int:
        """Channels kept of `width`, of experts or not: the multiple nearest to what the ratio asks for; never none, never all.

        Raises:
            RecipeError: no multiple lies between none and all.
        """
        multiple = self._multiple(width, experts)
        kept = round(width * (1 - ratio) / multiple) * multiple
        kept = min(max(kept, multiple), (width - 1) // multiple * multiple)
        if kept < 1:
            raise RecipeError(
                f"osscar is to keep a multiple of {multiple} channels, and fewer than {width}. Lower multiple_of."
            )
        return kept

    def _least(self, shape: Shape) -> int:
        """What the FFN width of every layer will be a multiple of, as it is or narrowed."""
        return math.gcd(*(math.gcd(width, self._multiple(width, experts)) for width, experts in _widths(shape)))

    def _multiple(self, width: int, experts: bool) -> int:
        multiple = self.multiple_of or _usual_multiple(width)
        return math.lcm(multiple, EXPERT_MULTIPLE) if experts else multiple

    def estimate(self, shape: Shape, work: Workload) -> Cost:
        pairs = list(zip(shape.layers, self.foresee(shape).layers, strict=True))
        streams = 2 if self._correction else 1
        walk = work.walk(shape, streams)
        each = [self._cutting(work, before, after).beside(work.kept_states(streams)) for before, after in pairs]
        if self.allocation == "uniform":
            return walk.then(*each)
        few = work.on(min(HELD_OUT, work.windows), min(LENGTH, work.length))
        one, halves = replace(work, windows=max(work.windows - few.windows, 1)), range(len(pairs))
        trials = [self._trying(one, few, shape, index, pairs[index][1]) for index in halves]
        return Cost().then(*trials).beside(work.kept_states() + few.states(6)).then(walk, *each)

    def _cutting(self, work: Workload, before: LayerShape, after: LayerShape) -> Cost:
        """What it takes to cut one layer, besides moving the hidden states through it."""
        heads, width = after.heads < before.heads, after.width < before.width
        left = after.heads * after.per_head if heads or self.allocation == "global" else 0
        left += after.width * after.per_channel if width else 0
        left += after.expert_width * after.per_expert_channel if after.expert_width < before.expert_width else 0
        cost, kept = work.run(before, work.tokens), work.observed(before, heads=heads)
        features = work.queries(before)
        if heads:
            found = work.eliminating(features, work.queries(after), one_shot=True)
            cost = cost.then(found, work.summing(features).beside(work.gram(features))).then(Cost(kept))
        if width:
            narrowing = Cost(work.kept(work.tokens * after.width * work.itemsize) + work.gram(before.width))
            found = work.eliminating(before.width, after.width, self.one_shot, swaps=self.swaps)
            if self._correction:
                found = found.then(work.fitting(before.width))
            cost = cost.then(found, work.summing(before.width).beside(work.gram(before.width)), narrowing)
        if experts := before.per_expert_channel // (3 * work.hidden) if before.expert_width else 0:
            found = work.eliminating(before.expert_width, after.expert_width, self.one_shot).times(experts)
            summing = work.summing(before.expert_width, work.tokens * work.active * experts)
            cost = cost.then(found, summing).beside(work.kept(experts * 4 * before.expert_width**2))
        return replace(cost.beside(kept), left=0.0 if work.offloaded else left * work.itemsize)

    def _trying(self, work: Workload, few: Workload, shape: Shape, index: int, after: LayerShape) -> Cost:
        """What it takes to measure a layer cut to a few sizes."""
        layer, behind = shape.layers[index], shape.layers[index + 1 :]
        parts = () if index in self.protect else self._parts(layer, after)
        costs = [work.run(layer, work.tokens)]
        for part in parts:
            count = len(part.sizes) + 1
            copies = count * (work.layer(layer) + work.itemsize * work.hidden * layer.width)
            trial = self._cutting(work, layer, layer.narrowed(**{part.field: part.sizes[-1]}))
            runs = few.run_all(behind, few.tokens, count).then(few.losses(few.tokens / STRIDE, few.length, count))
            costs += [trial.times(len(part.sizes)), runs.beside(copies + work.observed(layer, heads=True))]
        return replace(Cost().then(*costs), left=0.0)

    # Deciding

    def decide(
        self, model: PreTrainedModel, family: Family, calibration: Calibration, progress: Progress
    ) -> Iterator[Decision]:
        shape = family.shape(model)
        uniform = self.foresee(shape)
        targets = uniform.layers
        if self.allocation == "global":
            measured = self._measured(model, family, calibration, shape, uniform, progress)
            targets = self._allocated(shape, uniform, measured)
            costs = ({part.field: dict(part.costs) for part in parts} for parts in measured)
            yield Decision(evidence={"nats_per_token_if_narrowed_alone": dict(enumerate(costs))})
        visits = layerwise.walk(model, family, calibration, progress, "OSSCAR, layer by layer")
        dense = layerwise.walk(model, family, calibration, Progress(), "") if self._correction else repeat(None)
        changed = False
        for visit, reference in zip(visits, dense, strict=False):
            if reference is not None:
                reference.leave()  # before this layer is cut
            if visit.index in self.protect:
                continue
            before, target = shape.layers[visit.index], targets[visit.index]
            if target.heads < before.heads:
                heads = self._decided(visit, family, "heads", target.heads, progress)
                visit.narrow_heads(heads.cuts.heads[visit.index])
                yield heads
            if target.expert_width < before.expert_width:
                yield self._decided(visit, family, "expert_width", target.expert_width, progress)
            if target.width < before.width or (changed and reference is not None and before.width):
                goal = reference if changed else None
                channels = self._decided(visit, family, "width", target.width, progress, goal)
                visit.narrow(channels.cuts.channels[visit.index])
                yield channels
            changed |= target != before

    def _allocated(
        self, shape: Shape, uniform: Shape, measured: Sequence[Sequence[Measured]]
    ) -> tuple[LayerShape, ...]:
        """The layers' shapes for allocation `global`."""
        fewer = self._each(shape, self._with_fewer_heads)
        wanted = uniform.parameters if self.params is None else round(self.params * shape.parameters)
        return tuple(allocate(fewer.layers, measured, fewer.parameters - wanted))

    def _measured(
        self,
        model: PreTrainedModel,
        family: Family,
        calibration: Calibration,
        shape: Shape,
        uniform: Shape,
        progress: Progress,
    ) -> list[list[Measured]]:
        """What it costs the model to narrow each part of each layer alone."""
        parts = [
            () if index in self.protect else tuple(self._parts(layer, target))
            for index, (layer, target) in enumerate(zip(shape.layers, uniform.layers, strict=True))
        ]
        losses = progress.once("costs", lambda: self._losses(model, family, calibration, parts, progress))
        measured = []
        for layer, of_layer, found in zip(shape.layers, parts, losses, strict=True):
            costs = []
            for part, each in zip(of_layer, found, strict=True):
                known = zip((getattr(layer, part.field), *part.sizes), (0.0, *each), strict=True)
                costs.append(Measured(part.field, tuple(known), part.unit, part.parameters))
            measured.append(costs)
        return measured

    def _losses(
        self,
        model: PreTrainedModel,
        family: Family,
        calibration: Calibration,
        parts: Sequence[Sequence[_Part]],
        progress: Progress,
    ) -> list[list[list[float]]]:
        """Of each layer, for each part of it that may be narrowed, what each size costs the model."""
        windows, held_out = split(calibration)
        divergence = Divergence(model, family, held_out)

        def measure(visit: Visit, probe: Visit) -> list[list[float]]:
            return [
                divergence.of(probe, self._decisions(visit, family, part.field, part.sizes))
                for part in parts[visit.index]
            ]

        visits = layerwise.walk(model, family, windows, progress, "Measuring what narrowing a layer costs")
        probes = layerwise.walk(model, family, held_out, Progress(), "")
        return [
            progress.once(f"costs of layer {visit.index}", partial(measure, visit, probe))
            for visit, probe in zip(visits, probes, strict=True)
        ]

    def _parts(self, layer: LayerShape, uniform: LayerShape) -> Iterator[_Part]:
        """What of a layer may be narrowed, and to which sizes it is to measure."""
        fewer = [count for count in layer.possible_heads if count < layer.heads]
        if self.head_ratio is None and fewer:
            yield _Part("heads", (fewer[-1],), None, layer.per_head)
        if layer.width:
            multiple = self._multiple(layer.width, experts=False)
            yield _Part("width", _trials(layer.width, uniform.width, multiple), multiple, layer.per_channel)
        if layer.expert_width:
            multiple = self._multiple(layer.expert_width, experts=True)
            sizes = _trials(layer.expert_width, uniform.expert_width, multiple)
            yield _Part("expert_width", sizes, multiple, layer.per_expert_channel)

    def _decided(
        self,
        visit: Visit,
        family: Family,
        field: str,
        size: int,
        progress: Progress,
        reference: Visit | None = None,
    ) -> Decision:
        """How a part of the layer is narrowed to a size; decided once, even if the run is killed and goes on."""

        def decide() -> Decision:
            (decision,) = self._decisions(visit, family, field, (size,), reference)
            return decision

        return progress.once(f"{field} of layer {visit.index}", decide)

    def _decisions(
        self, visit: Visit, family: Family, field: str, sizes: Sequence[int], reference: Visit | None = None
    ) -> list[Decision]:
        """How each size of a part of the layer would be reached."""
        if field == "heads":
            gram = observed_heads(visit, family)
            return [self._decide_heads(visit, family, gram, size) for size in sizes]
        if field == "width":
            gram = observed_channels(visit, family)
            aim = self._aim(visit, family, gram, reference)
            return [self._decide_channels(visit, family, gram, size, aim) for size in sizes]
        grams = _observed_experts(visit, family)
        return [self._decide_experts(visit, family, grams, size) for size in sizes]

    def _decide_heads(self, visit: Visit, family: Family, gram: Gram, keep: int) -> Decision:
        assert family.heads is not None
        aim = Aim.of(family.linear(visit.layer, family.attention_output))
        counts = family.head_counts(visit.layer)
        size = counts.queries * counts.size
        with named(f"The attention of layer {visit.index}", aim.weight, self._damping):
            result = eliminate_groups(aim.moments(gram, self._damping), aim.weight, keep, size)
        inputs = features_of(result.kept, size).tolist()
        name = f"{family.layers}.{visit.index}.{family.attention_output}"
        return Decision(
            cuts=Cuts(heads={visit.index: result.kept}),
            weights=aim.fitted(name, family.linear(visit.layer, family.attention_output), result, gram, inputs),
            evidence={"layer": visit.index, "heads": keep, "relative_error": result.relative_error},
        )

    def _decide_channels(self, visit: Visit, family: Family, gram: Gram, keep: int, aim: Aim) -> Decision:
        output = family.feed_forward.output
        result = self._eliminated(f"The FFN of layer {visit.index}", gram, aim, keep)
        name, linear = f"{family.layers}.{visit.index}.{output}", family.linear(visit.layer, output)
        return Decision(
            cuts=Cuts(channels={visit.index: result.kept}),
            weights=aim.fitted(name, linear, result, gram, result.kept),
            evidence={"layer": visit.index, "width": keep, "relative_error": result.relative_error},
        )

    def _decide_experts(self, visit: Visit, family: Family, grams: _ExpertGrams, keep: int) -> Decision:
        described = family.experts
        assert described is not None
        output: Tensor = getattr(family.module(visit.layer, described.module), described.output).detach()
        output = output.to(solving_device(output.device))
        results = [
            self._eliminated(f"Expert {number} of layer {visit.index}", gram, Aim(weight, None), keep)
            for number, (gram, weight) in enumerate(zip(grams.routed, output, strict=True))
        ]
        prefix = f"{family.layers}.{visit.index}."
        cuts = Cuts(experts={visit.index: tuple(result.kept for result in results)})
        weights = {f"{prefix}{described.module}.{described.output}": torch.stack([each.weight for each in results])}
        evidence: dict[str, Any] = {
            "layer": visit.index,
            "expert_width": keep,
            "relative_error": [result.relative_error for result in results],
            "tokens": [gram.tokens for gram in grams.routed],
        }
        if grams.shared is not None and described.shared is not None:
            linear = family.linear(visit.layer, described.shared.output)
            aim, width = Aim.of(linear), keep * (linear.weight.shape[1] // output.shape[2])
            result = self._eliminated(f"The shared experts of layer {visit.index}", grams.shared, aim, width)
            cuts = replace(cuts, shared={visit.index: result.kept})
            weights |= aim.fitted(f"{prefix}{described.shared.output}", linear, result, grams.shared, result.kept)
            evidence["shared_relative_error"] = result.relative_error
        return Decision(cuts, weights, evidence)

    def _eliminated(self, what: str, gram: Gram, aim: Aim, keep: int) -> Elimination:
        with named(what, aim.weight, self._damping):
            step = aim.weight.shape[1] if self.one_shot else self.step
            return eliminate(lambda: aim.moments(gram, self._damping), aim.weight, keep, step, self.swaps)

    def _aim(self, visit: Visit, family: Family, gram: Gram, reference: Visit | None) -> Aim:
        """What the FFN's output projection is to come close to: itself, moved towards the dense model's hidden states."""
        if reference is None:
            return Aim.of(family.linear(visit.layer, family.feed_forward.output))
        goal = (hidden for _, hidden in reference.stream)
        return moved(visit, family, gram, goal, self._damping, self._correction)


class _Part(NamedTuple):
    """A part of a layer that may be narrowed: the field of `LayerShape` that says its size."""

    field: str
    sizes: tuple[int, ...]
    """To be measured, from large to small."""
    unit: int | None
    """Sizes are multiples of this; None if nothing between those that are measured is possible."""
    parameters: int
    """That go with one head or channel."""


class _ExpertGrams(NamedTuple):
    """Grams of a mixture."""

    routed: list[Gram]
    shared: Gram | None


def _trials(width: int, uniform: int, multiple: int) -> tuple[int, ...]:
    """Widths at which to measure a layer: the uniform one, the narrowest that is worth it, and one in between."""
    narrowest = max(math.ceil(min(width / 2, 0.6 * uniform) / multiple), 1) * multiple
    middle = round((uniform + narrowest) / 2 / multiple) * multiple
    return tuple(sorted({uniform, middle, min(narrowest, uniform)}, reverse=True))


def _observed_experts(visit: Visit, family: Family) -> _ExpertGrams:
    described = family.experts
    assert described is not None
    output: Tensor = getattr(family.module(visit.layer, described.module), described.output)
    routed = [Gram(output.shape[2], output.device, visit.shelf) for _ in output]
    shared = None if described.shared is None else gram_for(family.linear(visit.layer, described.shared.output), visit)
    visit.observe_experts(lambda expert, rows: routed[expert].add(rows), None if shared is None else shared.add)
    return _ExpertGrams(routed, shared)


def _widths(shape: Shape) -> set[tuple[int, bool]]:
    """The FFN widths of the layers, each with whether it is that of experts."""
    return {
        (width, experts)
        for layer in shape.layers
        for width, experts in ((layer.width, False), (layer.expert_width, True))
        if width
    }


def _usual_multiple(width: int) -> int:
    """64, and for narrow layers the largest power of two that leaves at least 16 multiples."""
    multiple = LARGEST_MULTIPLE
    while multiple > 1 and width // multiple < 16:
        multiple //= 2
    return multiple


@hookimpl
def passes() -> Iterator[type[Pass]]:
    yield Osscar

"""Structured pruning to a target shape: which layers, heads, channels and features stay is learned with the weights, by gates under constraints.

Stage 1 of Sheared LLaMA (Xia et al., arXiv 2310.06694). Each layer, key-value head, FFN channel and feature of hidden states is multiplied
by a hard-concrete gate that is drawn anew in each step. The expected number of open gates, of each layer, is held at that of the target
shape (`training/gates.py`), in the paper after a fifth of the training. Whenever the model is looked at, it is as it would be
cut then: the likeliest gates stay, exactly as many as the shape has. At the end gates are multiplied into the weights, once, and a stock
checkpoint of the target shape comes out.

Ours differs in where it begins: with the model cut at once and refitted in closed form (`refit/first_cut.py`), and with gates in the order of
how much their units seem to matter, so that a short training need not find out what is known; the shorter it is, the more seldom gates are
drawn otherwise than they were cut. Hidden states are not refitted. And it learns from the predictions of the model as it was, beside the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from optimum_prune.anatomy.decoder import Decoder
from optimum_prune.anatomy.norms import norms_of
from optimum_prune.anatomy.shape import ATTENTION, FEED_FORWARD, LayerShape, Shape
from optimum_prune.anatomy.workload import Cost, Workload
from optimum_prune.calibration.stream import walk_cost
from optimum_prune.checkpoint.opening import meta_model
from optimum_prune.errors import RecipeError, reason
from optimum_prune.hooks.marker import hookimpl
from optimum_prune.hooks.plugins import load
from optimum_prune.machine import processes
from optimum_prune.options import option
from optimum_prune.passes.base import Pass
from optimum_prune.passes.prune import PrunePass
from optimum_prune.passes.training import TrainingPass
from optimum_prune.refit.bridging import best_window, best_window_cost
from optimum_prune.refit.first_cut import HEALING, first_cut
from optimum_prune.refit.principal import energies
from optimum_prune.refit.projecting import norms_behind
from optimum_prune.selection.bernoulli import Kind
from optimum_prune.selection.importance import distances
from optimum_prune.selection.likeness import as_narrow_as, check_alike
from optimum_prune.selection.masked import structured_metric
from optimum_prune.selection.otherwise import by_magnitude
from optimum_prune.selection.targets import check_size, hidden_axis
from optimum_prune.surgery.cuts import NOTE, Decision
from optimum_prune.surgery.operation import assign, local_members, sharing_copy
from optimum_prune.training.gates import APART, SHARPEST, Gates, Row, ranks
from optimum_prune.training.sheared import Shearing

if TYPE_CHECKING:
    from torch import Tensor

    from optimum_prune.calibration.calibration import Calibration
    from optimum_prune.training.lesson import Lesson

BLOCKS = {"heads": ATTENTION, "width": FEED_FORWARD}
"""Options, and the blocks whose units they count."""
SIZES = ("layers", *BLOCKS, "hidden_size")
LONG = 3200
"""Steps of a training that finds out by itself which units stay, as that of the paper."""


@dataclass(frozen=True, kw_only=True)
class Sheared(TrainingPass, PrunePass):
    """Learns with the weights, on text, which layers, heads, channels and features stay, and leaves a model of exactly the shape asked for."""

    name: ClassVar[str] = "sheared"
    trained_bytes: ClassVar[int] = 20
    layers: int | None = option("How many decoder layers stay.", None, at_least=1)
    heads: int | None = option("How many key-value heads stay in each layer.", None, at_least=1)
    width: int | None = option("How many FFN channels stay in each layer.", None, at_least=1)
    hidden_size: int | None = option("How many features of hidden states stay.", None, at_least=1)
    like: str | None = option("A model, by folder or Hub id, whose shape is the target, instead.", None)
    start: Literal["refitted", "metric", "flat"] = option(
        "Begin with the model cut at once and refitted, with gates in the order of how much their units seem to matter, or with all alike.",
        "refitted",
    )
    alpha: float = option(
        "How much the likelihood of the text counts; the dense model's predictions count for the rest.",
        0.5,
        at_least=0,
        at_most=1,
    )
    gate_rate: float = option("The learning rate of gates.", 0.1, above=0)
    ramp: float = option(
        "When the target is reached, unless begun with: a part of the training.", 0.2, above=0, at_most=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in SIZES if getattr(self, name) is not None]
        if not given and self.like is None:
            raise RecipeError(
                "sheared needs a target: some of 'layers', 'heads', 'width' and 'hidden_size', or 'like'."
            )
        if given and self.like is not None:
            raise RecipeError(f"sheared is given {given[0]} and the shape of {self.like}. Give one of them.")

    # What there will be

    def foresee(self, shape: Shape) -> Shape:
        layers = self.layers
        found = self._narrowed(shape)
        if self.like is not None:
            target = _shape_of(self.like)
            layers = len(target.layers)
        if layers is not None:
            if layers > len(shape.layers):
                raise RecipeError(f"sheared is to leave {layers} layers of {len(shape.layers)}. Ask for fewer.")
            found = found.keep(range(layers))
        if self.like is not None:
            check_alike(self.name, found, target, self.like)
        if found == shape:
            raise RecipeError("sheared is to leave the shape that the model has. Ask for less.")
        return found

    def _narrowed(self, shape: Shape) -> Shape:
        """With the units that stay of each layer, and of hidden states."""
        if self.like is not None:
            return as_narrow_as(self.name, shape, _shape_of(self.like), self.like)
        found = shape
        for name, block in BLOCKS.items():
            if (units := getattr(self, name)) is not None:
                layers = tuple(self._narrowed_layer(layer, block, name, units) for layer in found.layers)
                found = replace(found, layers=layers)
        if self.hidden_size is not None and self.hidden_size != shape.rest.units("hidden"):
            check_size(self.name, "hidden_size", self.hidden_size, hidden_axis(self.name, shape))
            found = found.narrowed({"hidden": self.hidden_size})
        return found

    def _narrowed_layer(self, layer: LayerShape, block: str, name: str, units: int) -> LayerShape:
        """With so many units along the first axis of a block, and as large a part of any other there."""
        axes = layer.within(block)
        if not axes:
            if block not in layer.blocks:
                return layer
            raise RecipeError(
                f"sheared is to leave {units} {name}, but the config of this architecture cannot say how many there are. Leave {name} out."
            )
        if units != axes[0].units:
            check_size(self.name, name, units, axes[0])
        return layer.narrowed({axis.name: axis.units * units // axes[0].units for axis in axes})

    def estimate(self, shape: Shape, work: Workload) -> Cost:
        walks = walk_cost(work, shape, streams=3)
        target = self.foresee(shape)
        span = len(shape.layers) - len(target.layers)
        if span and self.start == "refitted":
            walks = walks.followed_by(best_window_cost(work, shape, span))
        new = target.parameters * work.itemsize
        return walks.followed_by(super().estimate(shape, work)).with_memory(new).followed_by(Cost(left=new))

    @property
    def asks_dense(self) -> bool:
        return self.alpha < 1

    # Deciding

    def decide(self, decoder: Decoder, calibration: Calibration, lesson: Lesson | None = None) -> Iterator[Decision]:
        from optimum_prune.training.engine import train  # transformers' Trainer takes long to import
        from optimum_prune.training.objectives import Imitation, Likelihood
        from optimum_prune.training.predictions import Asked

        assert lesson is not None, "a pass that trains is given a lesson"
        if lesson.measures_references:
            lesson = lesson.with_references(decoder.model)
        rows = self._rows(decoder)
        scores = calibration.once("start", partial(self._scores, decoder, calibration, rows))
        weights: Mapping[str, Tensor] = {}
        if self.start == "refitted":
            cut = calibration.once("refitted", partial(self._refitted, decoder, calibration, rows, scores))
            weights, scores = cut["weights"], {**scores, **cut["scores"]}
        schedule = self.scheduled(decoder, lesson)
        chosen = {"apart": APART, "sharpness": _sharpness(schedule.steps)} if weights else {}
        gates = Gates(rows, scores, 0.0 if weights else self.ramp, **chosen)
        student = self._student(decoder, calibration, lesson, gates, weights)
        goal = Imitation(Asked(decoder.model.eval()), self.alpha) if self.asks_dense else Likelihood()
        found = dict(train(student, lesson, goal, schedule))
        off = max(float((student.gates.expected(row) / row.keep - 1).abs().max()) for row in rows)
        evidence = {NOTE: found.pop(NOTE), "off_target": off, "undecided": student.gates.undecided(), "trained": found}
        cuts = student.cuts()
        yield Decision(cuts, student.folded(cuts), evidence)

    def _rows(self, decoder: Decoder) -> list[Row]:
        """The gates: layer by layer, and of the whole model."""
        shape = decoder.shape()
        target, rows = self.foresee(shape), list[Row]()
        for layer, after in zip(decoder.layers, self._narrowed(shape).layers, strict=True):
            for axis in layer.axes.values():
                left = after.units(axis.name)
                if not axis.output or axis.follows or left == axis.units:
                    continue
                for each in (axis, *layer.followers(axis)):
                    rows.append(Row(layer.index, each.name, max(each.groups, 1), each.units, left * each.times))
        if len(target.layers) < len(shape.layers):
            rows.append(Row(None, "", 1, len(shape.layers), len(target.layers)))
        if target.rest.units("hidden") < shape.rest.units("hidden"):
            rows.append(Row(None, "hidden", 1, shape.rest.units("hidden"), target.rest.units("hidden")))
        return rows

    def _scores(self, decoder: Decoder, calibration: Calibration, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Of each row, how much its units seem to matter, for gates to begin with."""
        found: dict[str, Tensor] = {}
        if self.start == "flat":
            return found
        inner = [row for row in rows if row.layer is not None and row.groups == 1]
        kinds = {
            row.key: Kind(((row.layer, row.axis, row.units),), row.keep, {}) for row in inner if row.layer is not None
        }
        if kinds:
            found |= {key: score[None] for key, score in structured_metric(decoder, calibration, kinds).items()}
        for row in rows:
            if row.layer is not None and row.groups > 1:
                layer = decoder.layer(row.layer)
                found[row.key] = by_magnitude().units(layer.module, layer.axes[row.axis])
            elif row.layer is None and not row.axis:
                found[row.key] = torch.tensor([distances(decoder, calibration, 1, angular=False)])
            elif row.layer is None and (axis := decoder.hidden()) is not None:
                found[row.key] = energies(decoder, calibration, axis)[None]
        return found

    def _refitted(
        self, decoder: Decoder, calibration: Calibration, rows: Sequence[Row], scores: Mapping[str, Tensor]
    ) -> dict[str, Mapping[str, Tensor]]:
        """Weights of the model cut at once, and of each row that is cut in it, scores by which what it keeps comes first."""
        places = {(row.layer, row.axis): row for row in rows}
        sizes = {(row.layer, row.axis): row.keep for row in rows if row.layer is not None}
        layers = places.get((None, ""))
        window = range(0) if layers is None else best_window(decoder, calibration, layers.units - layers.keep, HEALING)
        left = tuple(index for index in range(len(decoder)) if index not in window)
        cut = first_cut(decoder, calibration, left, sizes)
        kept_of = dict(cut.units)
        if layers is not None:
            kept_of[None, ""] = left
        chosen_first: dict[str, Tensor] = {}
        for place, kept in kept_of.items():
            row = places[place]
            chosen = torch.zeros(row.groups, row.units, dtype=torch.bool)
            for group, units in enumerate(kept if row.groups > 1 else [kept]):
                chosen[group, list(units)] = True  # type: ignore[arg-type]  # of one group
            chosen_first[row.key] = ranks(scores[row.key]) + row.units * chosen
        return {"weights": cut.weights, "scores": chosen_first}

    def _student(
        self,
        decoder: Decoder,
        calibration: Calibration,
        lesson: Lesson,
        gates: Gates,
        weights: Mapping[str, Tensor],
    ) -> Shearing:
        """A copy of the model with gates, and with some other weights."""
        copied = replace(decoder, model=sharing_copy(decoder.model))
        for value in copied.model.parameters():
            value.data = value.data.clone()
        assign(copied.model, weights)
        few = calibration.windows.part(slice(processes.size()))
        layer, axis = decoder.layer(0), decoder.hidden()
        norms = [] if axis is None else norms_of(layer.module, local_members(axis, layer.prefix))
        return Shearing(
            copied,
            lesson.folder,
            gates,
            norms_behind(layer, calibration.quiet().on(few).embed(decoder), norms),
            rate=self.gate_rate,
            float32=self.in_float32(sum(value.numel() for value in copied.model.parameters())),
            zeros_stay=self.keep_zeros,
        )


def _sharpness(steps: int | None) -> float:
    """With what sharpness gates begin that may choose otherwise than was chosen: in a short training, what is tried costs more than it finds."""
    return float(SHARPEST ** (1 - min(1.0, (steps or 0) / LONG)))


@lru_cache(maxsize=4)
def _shape_of(model: str) -> Shape:
    """The shape of a model, by folder or Hub id; reads its config.

    Raises:
        RecipeError: it cannot be read, or is of no architecture that is known.
    """
    from transformers import AutoConfig

    try:
        made = meta_model(AutoConfig.from_pretrained(model), trust_remote_code=False)
        return Decoder.of(made, load().families).shape()
    except Exception as error:  # transformers raises many kinds
        raise RecipeError(
            f"sheared is to leave the shape of {model}, which cannot be read: {reason(error)}"
        ) from error


@hookimpl
def passes() -> Iterator[type[Pass]]:
    yield Sheared

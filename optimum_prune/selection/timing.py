"""How long a model takes to read a prompt or to write a token, as it is and with less of its layers.

Whole models are timed, and not layers: the weights of one layer alone stay in the processor's caches, and those of a model have to come from
memory each time. What a layer takes follows from models all of whose layers are made alike, as in ZipLM (arXiv 2302.04089). Each is timed in
turn with the model as it is, and what counts is the median of the ratios: a machine that does something else now and then does not decide.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch

from optimum_prune.anatomy.axis import Units
from optimum_prune.anatomy.shape import ATTENTION, LayerShape, Shape
from optimum_prune.anatomy.workload import Cost, Workload
from optimum_prune.errors import RecipeError
from optimum_prune.selection.allowed import SEEN, Allowed
from optimum_prune.selection.measures import Times, cuts_of
from optimum_prune.surgery.config import sync_config
from optimum_prune.surgery.cuts import Cuts, Decision
from optimum_prune.surgery.operation import carry_out, copy_of
from optimum_prune.surgery.padding import leading

if TYPE_CHECKING:
    from optimum_prune.anatomy.decoder import Decoder

Step = Literal["prefill", "decode"]
TURNS = (7, 40)
"""How often two models take turns, at least and at most."""
LONG_ENOUGH = 2.0
"""Seconds for which they do."""
TOKENS = 4
"""That are written in a turn."""
MODELS = 6
"""That are timed besides those with fewer units of an axis."""


@dataclass(frozen=True)
class Stopwatch:
    """Times models beside the one that they are made of."""

    dense: Decoder
    step: Step
    batch: int
    """Sequences."""
    context: int
    """Tokens of a prompt, or in front of the tokens that are written."""

    @torch.no_grad()
    def beside(self, other: Decoder) -> tuple[float, float]:
        """Seconds for a step of the model as it is, and how much of that another one takes."""
        steps = [self._step(each) for each in (self.dense, other)]
        for step in steps:
            step()()  # whatever happens once only
        seconds, ratios, started = list[float](), list[float](), time.perf_counter()
        while len(ratios) < TURNS[0] or (len(ratios) < TURNS[1] and time.perf_counter() - started < LONG_ENOUGH):
            before, after = (self._timed(step) for step in steps)
            seconds.append(before)
            ratios.append(after / before)
        tokens = TOKENS if self.step == "decode" else 1
        return statistics.median(seconds) / tokens, statistics.median(ratios)

    def _step(self, decoder: Decoder) -> Callable[[], Callable[[], object]]:
        """Prepares to read the prompt, or to write some tokens behind it, each time behind as many."""
        device = decoder.model.get_input_embeddings().weight.device
        prompt = torch.arange(self.batch * self.context, device=device).view(self.batch, -1) % self._vocabulary
        if self.step == "prefill":
            return lambda: lambda: decoder.model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        read = decoder.model(input_ids=prompt, use_cache=True, logits_to_keep=1).past_key_values

        def write(past: Any) -> None:
            for _ in range(TOKENS):
                decoder.model(input_ids=prompt[:, -1:], past_key_values=past, use_cache=True)

        return lambda: partial(write, copy.deepcopy(read))

    @property
    def _vocabulary(self) -> int:
        return int(self.dense.config.vocab_size) // 2  # tokens that stand for images are in the other half

    def _timed(self, step: Callable[[], Callable[[], object]]) -> float:
        accelerated = self.dense.model.device.type != "cpu"
        run = step()
        if accelerated:
            torch.accelerator.synchronize()
        started = time.perf_counter()
        run()
        if accelerated:
            torch.accelerator.synchronize()
        return time.perf_counter() - started

    def of(self, layers: Sequence[LayerShape | None]) -> float:
        """Of the time of the model as it is, how much one takes whose layers are left so, or go where there is None."""
        return self.beside(of_sizes(self.dense, layers))[1]

    def table(self, allowed: Allowed) -> Times:
        """The times of layers that may become less in these ways."""
        shapes = self.dense.shape().layers
        half = [None if index % 2 else shape for index, shape in enumerate(shapes)]
        seconds, left = self.beside(of_sizes(self.dense, half))
        layer = seconds * (1 - left) / max(half.count(None), 1)
        saved = {name: dict(self._saved(name, seconds, allowed)) for name in _axes(shapes, allowed)}
        blocks = {}
        if len(shapes) > 1 and any(map(allowed.may_lack_attention, range(len(shapes)))):
            without = [shape.without(ATTENTION, 0) if index % 2 else shape for index, shape in enumerate(shapes)]
            blocks[ATTENTION] = seconds * (1 - self.of(without)) / (len(shapes) // 2)
        return Times(seconds - layer * len(shapes), layer, shapes, saved, blocks)

    def _saved(self, axis: str, seconds: float, allowed: Allowed) -> Iterator[tuple[float, float]]:
        """With what share of the units of an axis a layer saves how many seconds."""
        shapes = self.dense.shape().layers
        seen = [allowed.seen(index, shape).get(axis, []) for index, shape in enumerate(shapes)]
        narrowed = sum(map(bool, seen))
        for place in range(max(map(len, seen))):
            layers = [
                shape.narrowed({axis: sizes[min(place, len(sizes) - 1)]}) if sizes else shape
                for shape, sizes in zip(shapes, seen, strict=True)
            ]
            pairs = zip(layers, shapes, seen, strict=True)
            shares = [after.units(axis) / before.units(axis) for after, before, sizes in pairs if sizes]
            yield statistics.mean(shares), seconds * (1 - self.of(layers)) / narrowed


def _axes(shapes: Sequence[LayerShape], allowed: Allowed) -> list[str]:
    """The axes that may be narrowed anywhere."""
    return list(dict.fromkeys(name for index, shape in enumerate(shapes) for name in allowed.seen(index, shape)))


def of_sizes(dense: Decoder, layers: Sequence[LayerShape | None]) -> Decoder:
    """A model of the sizes of another that would come of this one, with whichever weights."""
    made = copy_of(dense)
    units: dict[tuple[int | None, str], Units] = {
        (layer.index, name): kept
        for layer, after in zip(dense.layers, layers, strict=True)
        if after is not None
        for name, kept in leading(layer.axes.values(), after)
    }
    carry_out(made, Decision(cuts_of(layers, dense.shape()).merge(Cuts(units=units))))
    sync_config(made)
    return made


def timing_cost(work: Workload, shape: Shape, step: Step, batch: int, context: int) -> Cost:
    """What a table of times takes, and the measurements behind it."""
    models = MODELS + sum(len(SEEN) for _ in shape.layers[0].narrowable)
    turns = 2 * models * (TURNS[0] + 1 if step == "prefill" else 1)
    served = replace(work, windows=batch, length=context)
    copies = sum(map(served.layer, shape.layers)) + served.states(4)
    written = served.run_all(shape.layers, TOKENS * batch, 2 * models * TURNS[0] if step == "decode" else 0)
    return served.run_all(shape.layers, served.tokens, turns).followed_by(written).with_memory(copies)


def read_table(told: Any, where: str, shape: Shape) -> Times:
    """The times that a file holds.

    Raises:
        RecipeError: it holds something else.
    """
    try:
        return Times.read(told, shape)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RecipeError(
            f"The table {where} does not have the times of layers: it is to be a mapping of rest, layer, saved and saved_without, as a report has it."
        ) from error

"""Reconstruction layer by layer: each block learns to put out, from what reaches it, what the dense model has there.

No gradient passes through the model: a block of a layer is trained on its inputs in the pruned model towards the dense model's hidden
states behind it, so that it takes the memory of one layer, and a run that was killed goes on with the next block (LaCo; blockwise
tuning). In front of a gap, where layers were left out, attention goes half of the way over it, and the FFN the rest, as in healing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from optimum_prune.anatomy.shape import ATTENTION
from optimum_prune.calibration.stream import walk_cost
from optimum_prune.errors import RecipeError
from optimum_prune.hooks.marker import hookimpl
from optimum_prune.machine import processes
from optimum_prune.options import option
from optimum_prune.passes.base import Pass
from optimum_prune.passes.recover import RecoverPass, Recovery
from optimum_prune.refit.healing import SHARE
from optimum_prune.surgery.cuts import NOTE
from optimum_prune.training.layerwise import RATES, TRIED, Teaching, teach

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor, nn

    from optimum_prune.anatomy.shape import Shape
    from optimum_prune.anatomy.workload import Cost, Workload
    from optimum_prune.calibration.calibration import Calibration
    from optimum_prune.calibration.visit import LayerVisit

TRAINED_BYTES = 20
"""Of each parameter of a layer that is trained: two copies, a gradient and two averages of that, in float32."""
HELD_OUT = 8
"""One of so many batches is held out, at least one."""


@dataclass(frozen=True, kw_only=True)
class Reconstruct(RecoverPass):
    """Trains each block of each layer alone, towards what the dense model computes there."""

    name: ClassVar[str] = "reconstruct"
    compares_hidden: ClassVar[bool] = True
    steps: int = option("Steps of AdamW for each block.", 100, at_least=1)
    tokens: int = option("Tokens of a step; at least one window is taken.", 1024, at_least=1)
    learning_rate: float | None = option(
        "Of AdamW; if not given, the one of several that leaves the smallest error on held-out windows.",
        None,
        above=0,
        below=1,
    )
    keep_zeros: bool = option("Let the zeros of matrices that are zero by a quarter or more stay.", True)

    def estimate(self, shape: Shape, work: Workload) -> Cost:
        """Both models run once, and each block of each layer is trained, in float32."""
        at_once = max(1, self.tokens // work.length) * work.length
        few = work.on(at_once // work.length)
        tries = self.steps * (1 + (0 if self.learning_rate else len(RATES) * TRIED))
        trained = few.run_all(shape.layers, tries * at_once, 3)
        largest = max(layer.parameters for layer in shape.layers)
        held = TRAINED_BYTES * largest + 3 * max(few.run(layer, at_once).memory for layer in shape.layers)
        return walk_cost(work, shape, streams=2).followed_by(replace(trained, memory=held + work.stored_states(4)))

    def recover(self, recovery: Recovery) -> Mapping[str, Any]:
        calibration, windows = recovery.calibration, recovery.calibration.windows.share()
        if not processes.all_true(len(windows) >= 2):
            raise RecipeError(
                "reconstruct needs other windows than those it trains on to tell how good a layer is, at least 2 in each process. Ask for more "
                "samples."
            )
        at_once = min(self.tokens, len(windows) * windows.length // HELD_OUT)
        dense = _Dense(recovery, at_once)
        layers = {}
        for visit in calibration.walk(recovery.decoder, "Reconstructing", at_once):
            held_out = max(1, len(visit.stream) // HELD_OUT)
            teaching = Teaching(self.steps, self.learning_rate, held_out, self.keep_zeros)
            layers[str(visit.index)] = dict(_reconstructed(visit, dense.goals(visit), teaching, calibration))
        return {"reconstructed": layers, NOTE: _told([block for layer in layers.values() for block in layer.values()])}


def _told(blocks: Sequence[Mapping[str, float]]) -> str:
    """How it went, in a sentence."""
    better = [block for block in blocks if block["after"] < block["before"]]
    if not better:
        return "no block came nearer to the dense model on held-out windows, so all are as they were"
    before, after = (math.fsum(block[when] for block in better) / len(better) for when in ("before", "after"))
    return f"{len(better)} of {len(blocks)} blocks came nearer to the dense model, their mean squared error from {before:.3g} to {after:.3g}"


def _reconstructed(
    visit: LayerVisit, goals: Mapping[str, list[Tensor]], teaching: Teaching, calibration: Calibration
) -> Iterator[tuple[str, dict[str, float]]]:
    """Trains the blocks of a layer, one after the other, and puts their weights in; of each, how it went."""
    for block, goal in goals.items():
        made = calibration.once(f"{block} of layer {visit.index}", partial(_taught, visit, block, goal, teaching))
        for name, value in made["weights"].items():
            _parameter(visit, name).data.copy_(value)
        visit.forget(block)
        calibration.activations.release(*goal)
        yield block, {name: value for name, value in made.items() if name != "weights"}


def _taught(visit: LayerVisit, block: str, goal: list[Tensor], teaching: Teaching) -> dict[str, Any]:
    """How a block was trained, with its weights in their own dtype, for the journal."""
    made = teach(visit, block, goal, teaching)
    weights = {name: value.to(_parameter(visit, name).dtype) for name, value in made.weights.items()}
    return {"weights": weights, "learning_rate": made.rate, "before": made.before, "after": made.after}


def _parameter(visit: LayerVisit, path: str) -> nn.Parameter:
    return visit.layer.module.get_parameter(path)


class _Dense:
    """The hidden states of the dense model, layer by layer, and what the layers of the pruned model are to make of them."""

    def __init__(self, recovery: Recovery, at_once: int) -> None:
        self._layers = (*recovery.layers, len(recovery.teacher))
        self._store = recovery.calibration.activations
        self._visits = recovery.calibration.quiet().walk(recovery.teacher, "", at_once)

    def goals(self, visit: LayerVisit) -> dict[str, list[Float[Tensor, "w t h"]]]:
        """Of each block of a layer, the hidden states that are to be behind it, batch by batch."""
        first, end = self._layers[visit.index], self._layers[visit.index + 1]
        reference = next(each for each in self._visits if each.index == first)
        attended = reference.behind(ATTENTION)
        reference.leave()
        near = [hidden for _, hidden in reference.stream]
        for _ in range(first + 1, end):
            reference = next(self._visits)
        reference.leave()
        far = [hidden for _, hidden in reference.stream]
        halfway = attended
        if end > first + 1:
            halfway = [
                self._store.store(middle + SHARE * (behind - before))
                for middle, behind, before in zip(attended, far, near, strict=True)
            ]
        blocks = visit.layer.blocks
        goals = dict.fromkeys(blocks[-1:], far)
        return ({ATTENTION: halfway} if len(blocks) > 1 else {}) | goals


@hookimpl
def passes() -> list[type[Pass]]:
    """The pass of this file."""
    return [Reconstruct]

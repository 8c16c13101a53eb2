"""The best of some models that might be left: each is made on some windows, and measured on others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from optimum_prune.anatomy.workload import Cost, Workload
from optimum_prune.calibration.calibration import NoJournal
from optimum_prune.calibration.stream import walk_cost
from optimum_prune.evaluation.losses import losses_cost
from optimum_prune.machine.mapped_weights import write_changes_of
from optimum_prune.machine.memory import give_back
from optimum_prune.refit.pricing import STRIDE
from optimum_prune.refit.sequential import Repairs, Wanted, bringing_cost, brought_to
from optimum_prune.selection.divergence import Divergence
from optimum_prune.surgery.config import sync_config
from optimum_prune.surgery.operation import carry_out, copy_of

if TYPE_CHECKING:
    from optimum_prune.anatomy.decoder import Decoder
    from optimum_prune.anatomy.shape import Shape
    from optimum_prune.calibration.calibration import Calibration


def measured(
    dense: Decoder,
    fitted: Calibration,
    held_out: Mapping[str, Calibration],
    finalists: Sequence[Wanted],
    repairs: Repairs,
) -> list[dict[str, float]]:
    """What each of some models loses, in nats for each token, on each text that was held out.

    Args:
        dense: the model, which stays as it is.
    """
    if not finalists:
        return []
    divergences = {name: Divergence(dense, text, STRIDE) for name, text in held_out.items()}

    def lost(wanted: Wanted) -> dict[str, float]:
        scratch = copy_of(dense)
        own = replace(fitted, journal=NoJournal())
        for decision in brought_to(scratch, dense, own, wanted, repairs):
            carry_out(scratch, decision)
            write_changes_of(scratch.model, scratch.modules[0])
        sync_config(scratch)
        found = {name: each.of_model(scratch, held_out[name]) for name, each in divergences.items()}
        del scratch
        give_back()
        return found

    return [
        fitted.once(f"finalist {number}", partial(lost, wanted)) for number, wanted in enumerate(finalists, start=1)
    ]


def measuring_cost(fitted: Workload, few: Workload, shape: Shape, wanted: Wanted, repairs: Repairs) -> Cost:
    """What `measured` takes of one model."""
    made = bringing_cost(fitted, shape, wanted, repairs)
    weights = sum(layer.parameters for layer in shape.layers) * fitted.itemsize
    run = walk_cost(few, shape).followed_by(losses_cost(few, few.tokens / STRIDE, few.length, 2))
    return replace(made.with_memory(weights), left=0.0).followed_by(run)

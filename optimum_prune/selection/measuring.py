"""What it costs a model to narrow each of its layers alone, measured at a few sizes as the divergence of its predictions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from optimum_prune.anatomy.shape import AxisShape, Shape
from optimum_prune.selection.budget import Measured
from optimum_prune.selection.divergence import Divergence, split

if TYPE_CHECKING:
    from optimum_prune.anatomy.decoder import Decoder
    from optimum_prune.calibration.calibration import Calibration
    from optimum_prune.calibration.visit import LayerVisit
    from optimum_prune.surgery.cuts import Decision

Decide = Callable[["LayerVisit", str, Sequence[int]], list["Decision"]]
"""From a visit of a layer, the name of an axis and some sizes: how each of these would be reached."""


class Trial(NamedTuple):
    """An axis of a layer that may be narrowed."""

    axis: AxisShape
    sizes: tuple[int, ...]
    """To be measured, from large to small."""
    multiple: int | None
    """Sizes are multiples of this; None if nothing between those that are measured is possible."""


def measure_layers(
    decoder: Decoder, calibration: Calibration, trials: Mapping[int, Sequence[Trial]], decide: Decide
) -> list[list[Measured]]:
    """Of each layer, for each axis of it that may be narrowed, what each size costs the model; nothing is changed.

    Args:
        trials: of every layer.
    """
    layers = decoder.shape().layers
    losses = calibration.once("costs", lambda: _losses(decoder, calibration, trials, decide))
    measured = []
    for layer, of_layer, found in zip(layers, trials.values(), losses, strict=True):
        costs = []
        for trial, each in zip(of_layer, found, strict=True):
            known = zip((trial.axis.units, *trial.sizes), (0.0, *each), strict=True)
            parameters = layer.per_unit(trial.axis.name)
            costs.append(Measured(trial.axis.name, tuple(known), trial.multiple, parameters))
        measured.append(costs)
    return measured


def _losses(
    decoder: Decoder, calibration: Calibration, trials: Mapping[int, Sequence[Trial]], decide: Decide
) -> list[list[list[float]]]:
    """Of each layer, for each axis of it that may be narrowed, what each size costs the model."""
    fitted, held_out = (calibration.on(windows) for windows in split(calibration.windows))
    divergence = Divergence(decoder, held_out)

    def measure(visit: LayerVisit, probe: LayerVisit) -> list[list[float]]:
        return [divergence.of(probe, decide(visit, trial.axis.name, trial.sizes)) for trial in trials[visit.index]]

    visits = fitted.walk(decoder, "Measuring what narrowing a layer costs")
    probes = held_out.quiet().walk(decoder, "")
    return [
        calibration.once(f"costs of layer {visit.index}", partial(measure, visit, probe))
        for visit, probe in zip(visits, probes, strict=True)
    ]


def told(shape: Shape, measured: Sequence[Sequence[Measured]]) -> dict[str, Any]:
    """What was measured, as evidence."""
    costs = [
        {layer.axis_named(part.axis).size: dict(part.costs) for part in parts}
        for layer, parts in zip(shape.layers, measured, strict=True)
    ]
    return {"nats_per_token_if_narrowed_alone": dict(enumerate(costs))}

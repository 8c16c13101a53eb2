"""What a plugin may add. A plugin is a module with one or more of these functions, marked `@hookimpl`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

from optimum_prune.hooks.marker import PROJECT

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from optimum_prune.anatomy.axis import AxisKind
    from optimum_prune.anatomy.family import Family
    from optimum_prune.passes.base import Pass
    from optimum_prune.passes.outcome import Outcome
    from optimum_prune.text.source import Source

hookspec = pluggy.HookspecMarker(PROJECT)


@hookspec
def passes() -> Iterable[type[Pass]]:  # type: ignore[empty-body]
    """Steps that a recipe can name."""


@hookspec
def families() -> Iterable[Family]:  # type: ignore[empty-body]
    """Architectures that passes can work on."""


@hookspec
def axes() -> Iterable[AxisKind]:  # type: ignore[empty-body]
    """Kinds of axes that decoder layers may have, beside heads, channels and experts."""


@hookspec
def calibration_sources() -> Iterable[Source]:  # type: ignore[empty-body]
    """Ways to get text."""


@hookspec
def before_pass(step: Pass, model: PreTrainedModel | None) -> None:
    """Called before a pass starts. A `VetoError` raised here, or another `OptimumPruneError`, ends the run with what it says.

    Whatever else is raised is a fault of the hook, such as that a tracker finds no network: it is said, and the run goes on.
    `model` is the live model for a pass that works in place, and None for one that works from folder to folder.
    """


@hookspec
def pass_finished(outcome: Outcome) -> None:
    """Called when a pass has finished, with what it did. Whatever is raised here is said, and the run goes on."""

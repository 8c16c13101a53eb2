"""What a plugin may add. A plugin is a module with one or more of these functions, marked `@hookimpl`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from optimum_prune.anatomy import Family
    from optimum_prune.calibration import Source
    from optimum_prune.passes import Outcome, Pass

PROJECT = "optimum_prune"
"""Name of the pluggy project and of the entry-point group."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def passes() -> Iterable[type[Pass]]:  # type: ignore[empty-body]
    """Steps that a recipe can name."""


@hookspec
def families() -> Iterable[Family]:  # type: ignore[empty-body]
    """Architectures that passes can work on."""


@hookspec
def calibration_sources() -> Iterable[Source]:  # type: ignore[empty-body]
    """Ways to get text."""


@hookspec
def before_pass(step: Pass, model: PreTrainedModel | None) -> None:
    """Called before a pass starts; an exception raised here vetoes the run.

    `model` is the live model for a pass that works in place, and None for one that works from folder to folder.
    """


@hookspec
def pass_finished(outcome: Outcome) -> None:
    """Called when a pass has finished, with what it did."""

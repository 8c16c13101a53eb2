"""Hooks that hear of passes while a run goes on: one may veto it, and none can lose it by failing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from optimum_prune.errors import OptimumPruneError
from optimum_prune.machine.isolation import guarded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from optimum_prune.hooks.plugins import Plugins
    from optimum_prune.machine.progress import Progress
    from optimum_prune.passes.base import Pass
    from optimum_prune.passes.outcome import Outcome


class _FaultError(OptimumPruneError):
    """What went wrong in a hook."""


def before_pass(plugins: Plugins, step: Pass, model: PreTrainedModel | None, progress: Progress) -> None:
    """Tells all hooks that a pass is about to start. What goes wrong in one is said, and the run goes on.

    Raises:
        OptimumPruneError: a hook raised it, to veto the run.
    """
    for name, hear in _hooks(plugins, "before_pass"):
        with _faults_said(f"The hook 'before_pass' of {name}", progress):
            hear(step=step, model=model)


def pass_finished(plugins: Plugins, outcome: Outcome, progress: Progress) -> None:
    """Tells all hooks what a pass did. What goes wrong in one is said, and the run goes on; it is too late for a veto."""
    for name, hear in _hooks(plugins, "pass_finished"):
        who = f"The hook 'pass_finished' of {name}"
        try:
            with _faults_said(who, progress):
                hear(outcome=outcome)
        except OptimumPruneError as error:
            progress.warn(f"{who} failed: {error} The run goes on without it.")


def _hooks(plugins: Plugins, hook: str) -> Iterator[tuple[str, Callable[..., object]]]:
    """Each plugin's hook of a name, with what the plugin is called."""
    implementations = getattr(plugins.manager.hook, hook).get_hookimpls()
    for each in reversed(implementations):
        others = [other.plugin for other in implementations if other.plugin is not each.plugin]
        yield each.plugin_name, plugins.manager.subset_hook_caller(hook, others)


@contextmanager
def _faults_said(who: str, progress: Progress) -> Iterator[None]:
    try:
        with guarded(who, remedy="", kind=_FaultError):
            yield
    except (_FaultError, OSError) as error:
        failed = error if isinstance(error, _FaultError) else f"{who} failed: {error}."
        progress.warn(f"{str(failed).strip()} The run goes on without it.")

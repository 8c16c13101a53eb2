"""Whether what a plugin offers fits this version: what does not is refused when it is loaded, with what to change."""

from __future__ import annotations

import inspect
from typing import Any

from optimum_prune.errors import PluginError
from optimum_prune.passes.base import Pass, Stage
from optimum_prune.passes.folder import FolderPass
from optimum_prune.passes.prune import PrunePass
from optimum_prune.passes.recover import RecoverPass

KINDS: dict[Stage, type[Pass]] = {
    Stage.PRUNE: PrunePass,
    Stage.RECOVER: RecoverPass,
    Stage.QUANTIZE: FolderPass,
    Stage.EXPORT: FolderPass,
}
"""What a pass of each stage must be, for whoever carries it out."""
METHODS = {"decide": ("decoder", "calibration"), "recover": ("recovery",), "check": ("spec",)}
"""The arguments of the methods of a pass."""
MOVED = {
    "hookspecs": "hooks.marker",
    "passes": "passes.base",
    "calibration": "text.windows",
    "anatomy": "anatomy.family",
    "cuts": "surgery.cuts",
    "shape": "anatomy.shape",
    "layerwise": "calibration.stream",
    "methods": "builtin.prune",
    "families": "builtin.families",
    "prospect": "passes.checkpoint_spec",
    "runtime": "evaluation.runtime",
    "exporting": "conversion.exporting",
    "progress": "machine.progress",
}
"""Modules of an earlier version, and where most of what they held lies now."""


def check_pass(step: type[Pass], plugin: str) -> None:
    """Refuses a pass that could not be carried out.

    Raises:
        PluginError: it has no stage, another base than its stage asks for, or methods with the arguments of an earlier version.
    """
    stage = getattr(step, "stage", None)
    if not isinstance(stage, Stage):
        raise PluginError(
            f"The pass '{step.name}' of the plugin {plugin} has no stage. Make it a PrunePass, a RecoverPass or a FolderPass."
        )
    if not issubclass(step, KINDS[stage]):
        raise PluginError(
            f"The pass '{step.name}' of the plugin {plugin} has the stage {stage.name} and is no {KINDS[stage].__name__}. Make it one, or "
            f"give it another stage."
        )
    for name, wanted in METHODS.items():
        method = getattr(step, name, None)
        if method is None:
            continue
        if name == "decide" and step.trains:
            wanted = (*wanted, "lesson")
        taken = tuple(inspect.signature(method).parameters)[1:]
        if len(taken) != len(wanted):
            raise PluginError(
                f"The pass '{step.name}' of the plugin {plugin} was written for another version of optimum-prune: its {name} takes "
                f"({', '.join(taken)}), and is called with ({', '.join(wanted)}). See 'Add a method' in the README."
            )


def why_not_imported(error: BaseException) -> str:
    """What a plugin's failing import means, as the end of a sentence."""
    if isinstance(error, SystemExit):
        return f"it ends the program with sys.exit({error.code!r})"
    plain = f"{type(error).__name__}: {error}"
    missing: Any = getattr(error, "name", None) or ""
    package, _, rest = missing.partition(".")
    old = rest.partition(".")[0]
    if not isinstance(error, ImportError) or package != "optimum_prune" or old not in MOVED:
        return plain
    return (
        f"{plain}. It was written for another version of optimum-prune; what it needs is to be imported from optimum_prune itself, or lies in "
        f"optimum_prune.{MOVED[old]} now"
    )

"""Registration of models whose layers differ in shape with transformers' auto classes, as soon as those are imported.

The auto classes take about a second to import, which `optimum-cli prune --help` should not wait for. So they are not imported here:
where they are not there yet, the registration waits for them.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING

from optimum_prune.errors import SurgeryError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

AUTO_CLASSES = "transformers.models.auto.configuration_auto"
STOCK = ("transformers.models.", "optimum_prune.surgery.")
"""Modules of the configs of transformers' architectures, and of those whose layers differ already."""


def register_when_imported() -> None:
    """Registers pruned models with the auto classes: at once if these are imported, or else right after they are."""
    if AUTO_CLASSES in sys.modules:
        register()
    else:
        sys.meta_path.insert(0, _Finder())


def register() -> None:
    """Makes the model type of pruned models known to `AutoConfig`; the rest follows when such a config is read."""
    from transformers.models.auto.configuration_auto import AutoConfig

    from optimum_prune.surgery.configuration_pruned import MODEL_TYPE, PrunedConfig

    AutoConfig.register(MODEL_TYPE, PrunedConfig, exist_ok=True)


class _Finder(MetaPathFinder):
    """A finder that finds the auto classes' module as the others do, and registers once that is imported; then it is gone."""

    def find_spec(self, fullname: str, *_: object) -> ModuleSpec | None:
        if fullname != AUTO_CLASSES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = _with_registration(spec.loader.exec_module)  # type: ignore[assignment, method-assign]
        return spec


def _with_registration(execute: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
    def execute_and_register(module: ModuleType) -> None:
        execute(module)
        register()

    return execute_and_register


def check_heterogeneous(config: PreTrainedConfig, name: str) -> None:
    """Refuses a model whose layers are to differ, if that could not be saved: one with code of its own.

    Raises:
        SurgeryError: it could not be.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and type(config).__module__.startswith(STOCK):
        return
    raise SurgeryError(
        f"The layers of {name} would differ in shape or lack a block, which can be saved for architectures of transformers only, and it brings "
        f"code of its own. Keep the same sizes and blocks in every layer."
    )

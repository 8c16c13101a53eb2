"""Finds plugins, looks names up, and explains a miss or a clash.

Built-in passes, families and sources come in through the same hooks as a stranger's: each module of the folders in `builtin` is
registered as a plugin, then each entry point of the group `optimum_prune` of what is installed.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import entry_points, metadata, version
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pluggy

from optimum_prune.anatomy.axes import HIDDEN, KINDS
from optimum_prune.anatomy.axis import AxisKind
from optimum_prune.anatomy.family import Family
from optimum_prune.errors import PluginError, shown, unknown
from optimum_prune.hooks import hookspecs
from optimum_prune.hooks.fitting import check_pass, why_not_imported
from optimum_prune.hooks.marker import PROJECT
from optimum_prune.passes.base import Pass
from optimum_prune.surgery.cuts import BLOCKS, LAYERS
from optimum_prune.text.source import Source

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

BUILT_IN = "optimum-prune"
IN_CUTS = ("pass", LAYERS, BLOCKS)
"""What stands in `cuts.json` beside the names of axes."""
HOOKS = tuple(name for name in vars(hookspecs) if hasattr(getattr(hookspecs, name), f"{PROJECT}_spec"))


@dataclass(frozen=True)
class Provider:
    """Who brought a pass."""

    distribution: str
    version: str


@dataclass(frozen=True)
class Plugins:
    """Everything that plugins offer, by name."""

    passes: Mapping[str, type[Pass]]
    providers: Mapping[str, Provider]
    """Of each pass."""
    families: tuple[Family, ...]
    sources: Mapping[str, Source]
    manager: pluggy.PluginManager

    def pass_named(self, name: str) -> type[Pass]:
        """The pass of a name.

        Raises:
            PluginError: no such pass; the message has the extra that brings it, or the nearest name and all names.
        """
        if name not in self.passes:
            if name in extras():
                raise PluginError(
                    f"The pass '{name}' comes with a plugin that is not installed. Run: pip install '{BUILT_IN}[{name}]'"
                )
            raise PluginError(unknown("pass", name, self.passes, "Installed"))
        return self.passes[name]


def extras() -> list[str]:
    """The extras of this distribution; each that brings a pass is called as that."""
    return metadata(BUILT_IN).get_all("Provides-Extra") or []


def load(hooks: Iterable[object] = ()) -> Plugins:
    """All plugins of this environment, and these further hook objects, such as a tracker of the library's user.

    Raises:
        PluginError: a plugin that fails to import, has a hook that does not exist or none at all, or offers a name that is
            taken. The message names the plugin, or both.
    """
    try:
        hooks = tuple(hooks)
    except TypeError as error:
        raise PluginError(
            f"The hooks are given as {shown(hooks)}, which is no list. Give a list of objects."
        ) from error
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    providers: dict[str, Provider] = {}
    for name, module in _built_in():
        _register(manager, module, name)
        providers[name] = Provider(BUILT_IN, version(BUILT_IN))
    for point in sorted(entry_points(group=PROJECT), key=lambda point: point.name):
        name = f"{point.name} ({point.dist.name if point.dist else 'unknown distribution'})"
        if manager.has_plugin(name):
            raise PluginError(f"Two plugins are called '{name}'. Uninstall one, or rename its entry point.")
        _register(manager, _import(point, name), name)
        providers[name] = Provider(point.dist.name, point.dist.version) if point.dist else Provider("unknown", "")
    for number, hook in enumerate(hooks, start=1):
        name = f"{type(hook).__name__} given as hook {number}"
        _register(manager, hook, name)
        providers[name] = Provider("given", "")
    return _collect(manager, providers)


def _built_in() -> Iterator[tuple[str, object]]:
    """Every module below the folder `builtin`."""
    package = importlib.import_module("optimum_prune.builtin")
    prefix = f"{package.__name__}."
    for module in sorted(pkgutil.walk_packages(package.__path__, prefix), key=lambda module: module.name):
        if not module.ispkg:
            yield module.name.removeprefix(prefix), importlib.import_module(module.name)


def _import(point: EntryPoint, name: str) -> object:
    try:
        return point.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise PluginError(
            f"The plugin {name} cannot be imported: {why_not_imported(error)}. Mend or uninstall it."
        ) from error


def _register(manager: pluggy.PluginManager, plugin: object, name: str) -> None:
    try:
        manager.register(plugin, name)
        implemented = [caller.name for caller in manager.get_hookcallers(plugin) or ()]
        strange = [hook for hook in implemented if hook not in HOOKS]
        if strange:
            raise PluginError(
                f"The plugin {name} has a hook that does not exist. {unknown('hook', strange[0], HOOKS, 'Hooks')}"
            )
    except pluggy.PluginValidationError as error:
        reason = str(error).strip().split("\n")[-1]
        raise PluginError(f"The plugin {name} has a hook with wrong arguments: {reason}") from error
    if not implemented:
        raise PluginError(
            f"The plugin {name} has no hook. Mark its functions with @hookimpl; hooks: {', '.join(HOOKS)}."
        )


def _collect(manager: pluggy.PluginManager, providers: Mapping[str, Provider]) -> Plugins:
    passes = list(_provided(manager, "passes", _is_pass))
    families = list(_provided(manager, "families", lambda item: isinstance(item, Family)))
    sources = list(_provided(manager, "calibration_sources", lambda item: isinstance(item, Source)))
    axes = list(_provided(manager, "axes", lambda item: isinstance(item, AxisKind)))
    for step, owner in passes:
        check_pass(step, owner)
    owners = _owners("pass", ((step.name, owner) for step, owner in passes))
    _owners("family", ((family.name, owner) for family, owner in families))
    _owners("architecture", ((kind, owner) for family, owner in families for kind in family.model_types))
    _owners("calibration source", ((source.name, owner) for source, owner in sources))
    _owners("text file suffix", ((suffix, owner) for source, owner in sources for suffix in source.suffixes))
    built_in = ((name, BUILT_IN) for name in (*(kind.name for kind in (*KINDS, HIDDEN)), *IN_CUTS))
    _owners("axis", (*built_in, *((kind.name, owner) for kind, owner in axes)))
    further = tuple(kind for kind, _ in axes)
    return Plugins(
        passes=MappingProxyType({step.name: step for step, _ in passes}),
        providers=MappingProxyType({name: providers[owner] for name, owner in owners.items()}),
        families=tuple(replace(family, axes=(*family.axes, *further)) for family, _ in families),
        sources=MappingProxyType({source.name: source for source, _ in sources}),
        manager=manager,
    )


def _provided(manager: pluggy.PluginManager, hook: str, right: Callable[[Any], bool]) -> Iterator[tuple[Any, str]]:
    """What each plugin yields from a hook, with the plugin's name."""
    for implementation in getattr(manager.hook, hook).get_hookimpls():
        name = implementation.plugin_name
        try:
            items = list(implementation.function())
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise PluginError(
                f"The hook '{hook}' of the plugin {name} fails: {type(error).__name__}: {error}. Mend or uninstall it."
            ) from error
        for item in items:
            if not right(item):
                raise PluginError(f"The hook '{hook}' of the plugin {name} yields {item!r}. See its docstring.")
            yield item, name


def _is_pass(item: Any) -> bool:
    return isinstance(item, type) and issubclass(item, Pass) and isinstance(getattr(item, "name", None), str)


def _owners(kind: str, pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Name -> plugin; no name may have two."""
    owners: dict[str, str] = {}
    for name, owner in pairs:
        if name in owners:
            raise PluginError(
                f"The {kind} '{name}' is offered by two plugins: {owners[name]} and {owner}. Uninstall one, or rename what it offers."
            )
        owners[name] = owner
    return owners

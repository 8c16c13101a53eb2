"""The forecast of a run: what a recipe would do to a model and what that would cost, for `compress plan` to print."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optimum_prune.anatomy.axes import KINDS
from optimum_prune.anatomy.shape import FEED_FORWARD
from optimum_prune.machine import processes
from optimum_prune.machine.isolation import guarded
from optimum_prune.machine.progress import Progress
from optimum_prune.passes.base import Pass
from optimum_prune.plan import speed
from optimum_prune.plan.plan import make_plan
from optimum_prune.plan.planner import Phase, Planner
from optimum_prune.plan.source import open_source

if TYPE_CHECKING:
    from optimum_prune.anatomy.shape import Shape
    from optimum_prune.hooks.plugins import Plugins
    from optimum_prune.recipe import Recipe


@dataclass(frozen=True)
class Forecast:
    """What a recipe would do, and what it would cost."""

    model: str
    phases: tuple[Phase, ...]
    itemsize: int
    """Bytes of a weight."""
    windows: int
    length: int
    evaluation_windows: int
    evaluation_length: int
    offloaded: bool
    """Whether the weights stay on disk."""
    device: str
    disk: int
    """Bytes that are written, at most at one time."""
    words: tuple[str, ...] = ()
    """What passes say of themselves."""

    @property
    def memory(self) -> int:
        """Bytes at the peak of the whole run."""
        return max(phase.memory for phase in self.phases)

    @property
    def seconds(self) -> float:
        """About how long what is known of it takes."""
        return sum(phase.seconds or 0.0 for phase in self.phases)

    # As a table

    def rows(self) -> list[tuple[str, ...]]:
        """A table of the phases."""
        headings = _headings(phase.shape for phase in self.phases if phase.shape is not None)
        head = ("", "stage", "layers", *headings, "parameters", "weights", "peak memory", "time")
        return [head, *(self._row(phase, headings) for phase in self.phases)]

    def _row(self, phase: Phase, headings: Sequence[str]) -> tuple[str, ...]:
        shape, sizes = phase.shape, ("",) * (len(headings) + 3)
        if shape is not None:
            columns = shape.columns()
            sizes = (
                str(len(shape.layers)),
                *(columns.get(heading, "") for heading in headings),
                f"{shape.parameters / 1e6:,.1f} M",
                f"{shape.parameters * self.itemsize / 1e6:,.1f} MB",
            )
        memory = f"{phase.memory / 1e9:,.2f} GB"
        if phase.seconds is None:
            return (phase.name, phase.stage, *sizes, f"{phase.bound} {memory}", "not known")
        return (phase.name, phase.stage, *sizes, memory, f"{phase.bound or 'about'} {duration(phase.seconds)}")

    def remarks(self, free: int, room: int) -> list[str]:
        """What the figures are of, what they add up to, and whether it fits, a sentence each.

        Args:
            free: bytes of memory that a process can have.
            room: bytes that can be written.
        """
        bounds = {phase.bound for phase in self.phases}
        at_most = " at most" if "at most" in bounds else ""
        without = ", without what is not known" if "at least" in bounds else ""
        reported = f"evaluation on {self.evaluation_windows} of {self.evaluation_length}"
        remarks = [
            f"Calibration on {self.windows} windows of {self.length} tokens, "
            f"{reported if self.evaluation_windows else 'no evaluation'}, on {self.device}; weights "
            f"{'on disk, one layer in memory at a time' if self.offloaded else 'in memory'}.",
            f"In all about {self.memory / 1e9:,.2f} GB of memory,{at_most} about {duration(self.seconds)}{without}, and "
            f"{self.disk / 1e9:,.2f} GB on disk.",
        ]
        remarks += self.words
        if self.memory > free:
            remedy = (
                "ask for fewer or shorter windows"
                if self.offloaded or self.device != "cpu"
                else "use --offload, or fewer or shorter windows"
            )
            remarks.append(f"That is more than the {free / 1e9:,.1f} GB of memory that are free here: {remedy}.")
        if self.disk > room:
            remarks.append(f"There are {room / 1e9:,.1f} GB of disk left here: name an --output elsewhere.")
        return remarks

    # As plain data

    def to_json(self) -> str:
        """Every figure."""
        fields = {"steps" if name == "phases" else name: value for name, value in vars(self).items()}
        steps = [self._plain(phase) for phase in self.phases]
        return json.dumps({**fields, "steps": steps, "peak_memory": self.memory, "seconds": self.seconds}, indent=2)

    def _plain(self, phase: Phase) -> dict[str, Any]:
        known: dict[str, Any] = {
            "name": phase.name,
            "stage": phase.stage,
            "peak_memory": phase.memory,
            "seconds": phase.seconds,
            "bound": phase.bound,
        }
        shape = phase.shape
        if shape is None:
            return known
        axes = _axes(each.shape for each in self.phases if each.shape is not None)
        return {
            **known,
            "layers": len(shape.layers),
            **{size: [layer.units(name) for layer in shape.layers] for name, size in axes.items()},
            "searched_width": _searched_width(shape),
            "searched_blocks": shape.searched_blocks,
            "parameters": shape.parameters,
            "bytes": shape.parameters * self.itemsize,
        }


def _searched_width(shape: Shape) -> int | None:
    """The number that the widths of all FFNs will be multiples of, if a search decides on them."""
    widths = {axis.name for layer in shape.layers for axis in layer.within(FEED_FORWARD)}
    return min((multiple for name, multiple in shape.searched.items() if name in widths), default=None)


def _headings(shapes: Iterable[Shape]) -> list[str]:
    """The headings of the sizes that a table shows: those of every family, and what changes besides."""
    columns = [shape.columns() for shape in shapes]
    always = [kind.heading for kind in KINDS if kind.inputs_are]
    changed = [each for each in columns[0] if len({column.get(each) for column in columns}) > 1]
    return list(dict.fromkeys([*always, *changed]))


def _axes(shapes: Iterable[Shape]) -> dict[str, str]:
    """The axes whose units plain data tells, and what these are called there: those of every family, and what changes besides."""
    found = {kind.name: kind.size_name for kind in KINDS if kind.inputs_are}
    units: dict[str, set[int]] = {}
    for shape in shapes:
        for layer in shape.layers:
            for axis in layer.axes:
                units.setdefault(axis.name, set()).add(axis.units)
                if len(units[axis.name]) > 1:
                    found.setdefault(axis.name, axis.size)
    return found


def forecast(recipe: Recipe, plugins: Plugins) -> Forecast:
    """What a recipe would do to the model that its settings name, of which nothing but the config is read.

    Raises:
        OptimumPruneError: whatever would make a run fail before it reads the weights.
    """
    progress = Progress()
    with progress.libraries(), processes.alone():  # imported, they take the memory that they will take in a run
        source = open_source(recipe.settings, progress, families=plugins.families, config_only=True)
        plan = make_plan(recipe, plugins, source)
    planner = Planner(plan, speed.measured(plan.dtype, plan.device))
    phases = tuple(planner.phases())
    words = [_word(step, shape) for step, shape in zip(recipe.in_memory, plan.shapes, strict=False)]
    return Forecast(
        model=source.name,
        phases=phases,
        itemsize=plan.dtype.itemsize,
        windows=plan.calibration.windows,
        length=plan.calibration.length,
        evaluation_windows=plan.evaluation.windows,
        evaluation_length=plan.evaluation.length,
        offloaded=plan.offloads,
        device=plan.device,
        disk=planner.disk,
        words=tuple(filter(None, words)),
    )


def _word(step: Pass, shape: Shape) -> str:
    """What a pass says of itself."""
    with guarded(f"The pass '{step.name}'"):
        return str(step.remark(shape))


def duration(seconds: float) -> str:
    """A time that nobody knows exactly: `3 s`, `12 min`, `5 h`."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{max(seconds, 1):.0f} s"

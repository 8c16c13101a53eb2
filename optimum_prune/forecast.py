"""What a recipe would do to a model, and what that would cost in memory, time and disk: from its config, without its weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum_prune import checkpoint, speed
from optimum_prune.anatomy import find_family
from optimum_prune.calibration import CHARACTERS, CHARACTERS_PER_TOKEN, LENGTH, PIECE, SAMPLES, Text, texts_to_use
from optimum_prune.compress import check_conversions, foresee
from optimum_prune.cost import Cost, Workload
from optimum_prune.errors import RecipeError
from optimum_prune.measure import resident
from optimum_prune.passes import PrunePass, Stage
from optimum_prune.progress import Progress
from optimum_prune.prospect import Prospect
from optimum_prune.subject import SHARE_OF_FREE, device_of, length_limit, meta_model, open_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from optimum_prune.plugins import Plugins
    from optimum_prune.recipe import Recipe
    from optimum_prune.shape import Shape
    from optimum_prune.speed import Speed

PROBED = 2 * checkpoint.PROBE_WINDOWS * checkpoint.PROBE_TOKENS
"""Tokens that a verification computes, with and without a cache."""
RETAINED = 0.5
"""Of what a step holds at its peak, the part that the allocator does not give back to the system, but to later steps."""
SCATTERED = 1.25
"""What a pass takes of the system for each byte that it holds: what is free lies between what is not."""
READING, READ = 145, 65
"""Bytes that a character takes while it is tokenized, and afterwards."""
WIKITEXT_SIZE = 11_000_000
"""Characters of the text that is read if none is named; what others of the Hub have is not known without a network."""
TOKENIZER = 700
"""Bytes that a tokenizer takes for each token it knows."""


def free_memory() -> int:
    """Bytes that a process can have now."""
    import psutil

    return int(psutil.virtual_memory().available)


@dataclass(frozen=True)
class Step:
    """One step of a run."""

    name: str
    stage: str
    """Of a pass; empty of what is no pass."""
    shape: Shape | None
    """Of the model afterwards; none where it does not change."""
    memory: int
    """Bytes of the process at its peak."""
    seconds: float | None
    """About how long it takes; None where nobody can say."""
    bound: str = ""
    """"at most" or "at least", where memory and time are only known so."""


@dataclass(frozen=True)
class Forecast:
    """What a recipe would do, and what it would cost."""

    model: str
    steps: tuple[Step, ...]
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

    @property
    def memory(self) -> int:
        """Bytes at the peak of the whole run."""
        return max(step.memory for step in self.steps)

    @property
    def seconds(self) -> float:
        """About how long what is known of it takes."""
        return sum(step.seconds or 0.0 for step in self.steps)

    def rows(self) -> list[tuple[str, ...]]:
        """A table of the steps."""
        head = ("", "stage", "layers", "heads", "FFN width", "parameters", "weights", "peak memory", "time")
        return [head, *(self._row(step) for step in self.steps)]

    def _row(self, step: Step) -> tuple[str, ...]:
        shape = step.shape
        sizes = ("",) * 5
        if shape is not None:
            sizes = (
                str(len(shape.layers)),
                shape.describe_heads(),
                shape.describe_width(),
                f"{shape.parameters / 1e6:,.1f} M",
                f"{shape.parameters * self.itemsize / 1e6:,.1f} MB",
            )
        memory = f"{step.memory / 1e9:,.2f} GB"
        if step.seconds is None:
            return (step.name, step.stage, *sizes, f"{step.bound} {memory}", "not known")
        return (step.name, step.stage, *sizes, memory, f"{step.bound or 'about'} {duration(step.seconds)}")

    def remarks(self, free: int, room: int) -> list[str]:
        """What the figures are of, what they add up to, and whether it fits, a sentence each.

        Args:
            free: bytes of memory that a process can have.
            room: bytes that can be written.
        """
        bounds = {step.bound for step in self.steps}
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

    def to_json(self) -> str:
        """Every figure."""
        steps: list[dict[str, Any]] = []
        for step in self.steps:
            shape = step.shape
            sizes = (
                {}
                if shape is None
                else {
                    "layers": len(shape.layers),
                    "heads": [layer.heads for layer in shape.layers],
                    "width": [layer.width for layer in shape.layers],
                    "expert_width": [layer.expert_width for layer in shape.layers],
                    "searched_width": shape.searched_width,
                    "searched_blocks": shape.searched_blocks,
                    "parameters": shape.parameters,
                    "bytes": shape.parameters * self.itemsize,
                }
            )
            known = {"name": step.name, "stage": step.stage, "peak_memory": step.memory, "seconds": step.seconds}
            steps.append({**known, "bound": step.bound, **sizes})
        plain = {**asdict(self), "steps": steps, "peak_memory": self.memory, "seconds": self.seconds}
        return json.dumps(plain, indent=2)


def forecast(recipe: Recipe, plugins: Plugins) -> Forecast:
    """What a recipe would do to the model that its settings name.

    Raises:
        OptimumPruneError: whatever would make a run fail before it reads the weights.
    """
    opened = open_model(recipe.settings)
    family, config = find_family(opened.config, plugins.families), opened.config
    with Progress().libraries():  # imported, they take the memory that they will take in a run
        shape = family.shape(meta_model(config, recipe.settings.trust_remote_code))
    shapes = foresee(recipe.passes, shape)
    check_conversions(recipe.passes, Prospect(config, family, shapes[-1]))
    device, text = device_of(recipe.settings), family.text_config(config)
    dtype = checkpoint.dtype_of(config, recipe.settings.dtype)
    offloaded = _offloaded(opened, recipe, shapes[0].parameters * dtype.itemsize, device)
    calibration, evaluation = _windows(recipe, length_limit(text))
    work = _workload(
        text, shapes[0], dtype.itemsize, *calibration, offloaded=offloaded, shelf=recipe.settings.shelf(offloaded)
    )
    mapped = dtype == (config.dtype or dtype) and device == "cpu" and not opened.gguf_file
    planner = _Planner(recipe, shapes, work, evaluation, speed.measured(dtype, device), mapped)
    steps = tuple(planner.steps())
    return Forecast(
        model=opened.name,
        steps=steps,
        itemsize=dtype.itemsize,
        windows=work.windows,
        length=work.length,
        evaluation_windows=evaluation[0],
        evaluation_length=evaluation[1],
        offloaded=offloaded,
        device=device,
        disk=planner.disk,
    )


def _characters(text: Text) -> int:
    """How much of a text is read, as far as that can be told without reading it."""
    if not text.named or text.samples == 0:
        return 0
    wanted = CHARACTERS_PER_TOKEN * (SAMPLES if text.samples is None else text.samples) * (text.length or LENGTH)
    size = WIKITEXT_SIZE if text.text is None else Path(text.text).stat().st_size
    return min(size, max(CHARACTERS, wanted))


def _offloaded(opened: checkpoint.Checkpoint, recipe: Recipe, size: int, device: str) -> bool:
    """Whether a run would leave the weights on disk."""
    local = Path(opened.source).is_dir() and opened.gguf_file is None
    if recipe.settings.offload is None:
        return local and device == "cpu" and size > SHARE_OF_FREE * free_memory()
    return recipe.settings.offload


def _windows(recipe: Recipe, limit: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Number and length of the windows to calibrate on, and of those to report on, if the texts are long enough."""
    length = recipe.calibration.length or min(LENGTH, limit)
    reported = recipe.evaluation.length or length
    for each in (length, reported):
        if each > limit:
            raise RecipeError(
                f"Windows of {each} tokens are asked for, and the model takes at most {limit}. Ask for shorter ones."
            )
    samples = (SAMPLES if text.samples is None else text.samples for text in (recipe.calibration, recipe.evaluation))
    windows, reported_windows = samples
    return (windows, length), (reported_windows, reported)


def _workload(
    config: PreTrainedConfig,
    shape: Shape,
    itemsize: int,
    windows: int,
    length: int,
    *,
    offloaded: bool,
    shelf: float,
) -> Workload:
    query_heads = config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or query_heads
    size = (
        getattr(config, "v_head_dim", None) or getattr(config, "head_dim", None) or config.hidden_size // query_heads
    )
    experts = max((layer.per_expert_channel for layer in shape.layers), default=0) / (3 * config.hidden_size)
    chosen = getattr(config, "num_experts_per_tok", None) or 1
    return Workload(
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        head_width=query_heads // heads * size,
        heads=heads,
        itemsize=itemsize,
        windows=windows,
        length=length,
        offloaded=offloaded,
        shelf=shelf,
        active=min(chosen / experts, 1.0) if experts else 1.0,
    )


def duration(seconds: float) -> str:
    """A time that nobody knows exactly: `3 s`, `12 min`, `5 h`."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{max(seconds, 1):.0f} s"


class _Planner:
    """Goes through a run step by step, and keeps what is held in memory from one step to the next."""

    def __init__(
        self,
        recipe: Recipe,
        shapes: Sequence[Shape],
        work: Workload,
        evaluation: tuple[int, int],
        speed: Speed,
        mapped: bool,
    ) -> None:
        self._recipe = recipe
        self._shapes = shapes
        self._work = work
        self._evaluation = work.on(*evaluation) if evaluation[0] else None
        self._speed = speed
        self._mapped = mapped
        self._weights = 0 if work.offloaded else shapes[0].parameters * work.itemsize
        self._process = resident() + TOKENIZER * work.vocabulary
        self._retained = 0.0
        self.disk = shapes[-1].parameters * work.itemsize

    def steps(self) -> Iterator[Step]:
        """What happens, in order."""
        before, after, offloaded = self._shapes[0], self._shapes[-1], self._work.offloaded
        texts = texts_to_use(self._recipe.calibration, self._recipe.evaluation)
        piece = min(max(map(_characters, texts)), PIECE)
        reading = Cost(memory=READING * piece, reading=before.parameters * self._work.itemsize)
        yield self._step("loading", "", before, reading, 0 if self._mapped else self._weights)
        self._retained = READ * piece
        yield from self._evaluating("evaluation before", before)
        self._retained = 0.0  # a run gives it back here, and offloaded after each decision
        for shape, step in zip(self._shapes, self._recipe.passes, strict=False):
            if not isinstance(step, PrunePass):
                continue
            cost = step.estimate(shape, self._work)
            cost = replace(cost, memory=SCATTERED * cost.memory)
            left = cost.left if self._mapped and not offloaded else 0.0
            bound = "at most" if getattr(step, "search", None) == "racing" else ""
            yield self._step(step.name, step.stage.name, step.foresee(shape), cost, self._weights + left, bound)
            self._weights += int(left)
            self._retained = 0.0 if offloaded else max(self._retained, RETAINED * cost.memory)
        size = after.parameters * self._work.itemsize
        yield self._step("saving", "", None, Cost(reading=3 * size), self._weights)
        if not offloaded:  # the pruned model is gone; the reloaded one is mapped from its files
            self._retained, self._weights = 0.0, size
        probing = self._work.on(1, PROBED).run_all(after.layers, PROBED).then(self._work.losses(PROBED, PROBED))
        yield self._step("verification", "", None, probing, self._weights)
        yield from self._evaluating("evaluation after", after)
        yield from self._conversions(size)

    def _evaluating(self, name: str, shape: Shape) -> Iterator[Step]:
        if self._evaluation is not None:
            yield self._step(name, "", None, self._evaluation.evaluating(shape), self._weights)

    def _conversions(self, size: int) -> Iterator[Step]:
        """Passes from folder to folder run libraries whose needs nobody knows; they hold the model at least."""
        for step in self._recipe.passes:
            if isinstance(step, PrunePass):
                continue
            held = size * (4 // self._work.itemsize) if step.stage is Stage.EXPORT else size
            yield Step(step.name, step.stage.name, self._shapes[-1], self._process + held, None, "at least")
            self.disk += held

    def _step(self, name: str, stage: str, shape: Shape | None, cost: Cost, weights: float, bound: str = "") -> Step:
        memory = int(self._process + weights + max(cost.memory, self._retained))
        return Step(name, stage, shape, memory, self._speed.seconds(cost), bound)

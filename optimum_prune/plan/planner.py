"""What the phases of a run cost: the plan gone through in order, with what is held in memory from one phase to the next."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from optimum_prune.anatomy.workload import Cost, Workload
from optimum_prune.checkpoint import verification
from optimum_prune.checkpoint.opening import length_limit
from optimum_prune.evaluation.losses import losses_cost
from optimum_prune.evaluation.perplexity import evaluation_cost
from optimum_prune.machine.isolation import guarded
from optimum_prune.machine.memory import resident
from optimum_prune.passes.base import Pass, Stage
from optimum_prune.refit.controls import controls_cost
from optimum_prune.text.drawing import characters_read
from optimum_prune.text.text import texts_to_use
from optimum_prune.text.tokenization import PIECE

if TYPE_CHECKING:
    from optimum_prune.anatomy.shape import Shape
    from optimum_prune.plan.plan import Plan
    from optimum_prune.plan.speed import Speed

PROBED = 2 * verification.PROBE_WINDOWS * verification.PROBE_TOKENS
"""Tokens that a verification computes, with and without a cache."""
RETAINED = 0.5
"""Of what a phase holds at its peak, the part that the allocator does not give back to the system, but to later phases."""
SCATTERED = 1.25
"""What a pass takes of the system for each byte that it holds: what is free lies between what is not."""
READING, READ = 145, 65
"""Bytes that a character takes while it is tokenized, and afterwards."""
TOKENIZER = 700
"""Bytes that a tokenizer takes for each token it knows."""


@dataclass(frozen=True)
class Phase:
    """A phase of a run: a pass, or what is done before, between and after passes."""

    name: str
    stage: str
    """Of a pass; empty of what is no pass."""
    shape: Shape | None
    """Of the model afterwards; None where it does not change."""
    memory: int
    """Bytes of the process at its peak."""
    seconds: float | None
    """About how long it takes; None where nobody can say."""
    bound: str = ""
    """"at most" or "at least", where memory and time are only known so."""


class Planner:
    """The phases of a run that is planned, and the bytes that are written.

    Args:
        speed: of the machine.
    """

    def __init__(self, plan: Plan, speed: Speed) -> None:
        self._plan = plan
        self._speed = speed
        self._work = workload(plan)
        self._before, self._after = plan.shapes[0], plan.shapes[-1]
        self._weights = 0 if plan.offloads else plan.bytes_of(self._before)
        self._process = resident() + TOKENIZER * self._work.vocabulary
        self._retained = 0.0
        self.disk = room(plan)
        """At most at one time, as far as the phases were asked for."""

    def phases(self) -> Iterator[Phase]:
        """What happens, in order."""
        recipe = self._plan.recipe
        piece = min(self._characters(), PIECE)
        reading = Cost(memory=READING * piece, reading=self._plan.bytes_of(self._before))
        yield self._phase(
            "loading", reading, shape=self._before, weights=self._weights if self._plan.source.resident else 0
        )
        self._retained = READ * piece
        yield from self._evaluating("evaluation before", self._before)
        self._retained = 0.0  # a run gives it back here, and offloaded after each decision
        changing = zip(recipe.in_memory, self._plan.shapes, self._plan.shapes[1:], strict=False)
        for step, before, after in changing:
            yield self._changing(step, before, after)
        yield from self._saved()
        for step in recipe.conversions:
            yield self._converting(step)

    def _characters(self) -> int:
        """The most that is read of one text."""
        recipe = self._plan.recipe
        texts = texts_to_use(recipe.calibration, recipe.evaluation)
        return max(characters_read(*texts, length_limit(self._plan.config)))

    def _changing(self, step: Pass, before: Shape, after: Shape) -> Phase:
        """A pass on the model in memory."""
        with guarded(f"The pass '{step.name}'"):
            cost, offloaded = step.estimate(before, self._work), self._plan.offloads
        weights = self._weights + self._plan.teacher_bytes
        if cost is None:
            return Phase(step.name, step.stage.name, after, self._process + weights, None, "at least")
        controlled = step.stage is Stage.PRUNE and self._plan.evaluation.windows > 0
        if controlled:
            cost = cost.followed_by(controls_cost(before, self._work))
        cost = replace(cost, memory=SCATTERED * cost.memory)
        resident = self._plan.source.resident
        left = 0.0 if offloaded or (resident and not controlled) else cost.left
        bound = "at most" if step.may_end_early else ""
        phase = self._phase(step.name, cost, stage=step.stage.name, shape=after, weights=weights + left)
        self._weights += 0 if resident else int(left)
        self._retained = 0.0 if offloaded else max(self._retained, RETAINED * cost.memory)
        return replace(phase, bound=bound)

    def _saved(self) -> Iterator[Phase]:
        """What follows the passes in memory: the model is saved, loaded again and measured again."""
        yield self._phase("saving", Cost(reading=3 * self._plan.disk))
        if not self._plan.offloads:  # the pruned model is gone; the reloaded one is mapped from its files
            self._retained, self._weights = 0.0, self._plan.disk
        probed = self._work.on(1, PROBED)
        probing = probed.run_all(self._after.layers, PROBED).followed_by(losses_cost(self._work, PROBED, PROBED))
        yield self._phase("verification", probing)
        yield from self._evaluating("evaluation after", self._after)

    def _evaluating(self, name: str, shape: Shape) -> Iterator[Phase]:
        wanted = self._plan.evaluation
        if wanted.windows:
            yield self._phase(name, evaluation_cost(self._work.on(wanted.windows, wanted.length), shape))

    def _converting(self, step: Pass) -> Phase:
        """A pass from folder to folder: it runs libraries whose needs nobody knows, and holds the model at least."""
        held = self._plan.disk if step.stage.makes_checkpoint else self._plan.disk * (4 // self._work.itemsize)
        self.disk += held
        return Phase(step.name, step.stage.name, self._after, self._process + held, None, "at least")

    def _phase(
        self, name: str, cost: Cost, *, stage: str = "", shape: Shape | None = None, weights: float | None = None
    ) -> Phase:
        held = self._weights if weights is None else weights
        memory = int(self._process + held + max(cost.memory, self._retained))
        return Phase(name, stage, shape, memory, self._speed.seconds(cost))


def room(plan: Plan) -> int:
    """Bytes on disk of the checkpoint that the passes in memory leave, and of what is kept meanwhile for a run that goes on after a kill."""
    work, steps = workload(plan), list(zip(plan.recipe.in_memory, plan.shapes, plan.shapes[1:], strict=False))
    made = sum(plan.bytes_of(after) for step, _, after in steps if step.stage is Stage.RECOVER)
    return plan.disk + made + int(max((step.keeps(before, work) for step, before, _ in steps), default=0))


def workload(plan: Plan) -> Workload:
    """On how much text a plan runs a model of which sizes, for the costs of its passes."""
    return Workload(
        hidden=plan.config.hidden_size,
        vocabulary=plan.config.vocab_size,
        itemsize=plan.dtype.itemsize,
        windows=plan.calibration.windows,
        length=plan.calibration.length,
        offloaded=plan.offloads,
        stored=plan.activation_budget,
    )

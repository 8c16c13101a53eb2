"""What a training is watched by: the held-out perplexity, which decides what is kept and when it ends, and the clock."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from optimum_prune.errors import NumericalError
from optimum_prune.evaluation.perplexity import TOKENS_PER_BATCH, perplexity
from optimum_prune.machine import interrupts, processes
from optimum_prune.machine.progress import Progress
from optimum_prune.machine.whole_files import whole
from optimum_prune.surgery.cuts import NOTE
from optimum_prune.text.windows import Windows
from optimum_prune.training.lesson import STATE, Lesson
from optimum_prune.training.schedule import Course, Schedule
from optimum_prune.training.student import Student

SHARED = 1e-4
"""Of the weights of domains, as in Sheared LLaMA."""
POINTS = 200
"""Steps of which the report has the loss, at most."""


class Watch(TrainerCallback):  # type: ignore[misc]  # transformers declares no types
    """Looks at a training after each step."""

    def __init__(self, student: Student, lesson: Lesson, schedule: Schedule) -> None:
        self.student = student
        self.course = Course(schedule)
        self.mixture = lesson.mixture(schedule.windows)
        self.lesson = lesson
        self._schedule = schedule
        self._looks: list[tuple[int, float]] = []
        """Steps, and the held-out perplexity after them."""
        self._losses: list[tuple[int, float, float]] = []
        """Steps, the loss of each, and its learning rate."""
        self._moves: list[tuple[int, list[float], list[float]]] = []
        """Steps, the held-out loss of each domain after them, and its weight from there on."""
        self._why = ""
        """Why it ended early."""
        self._saved = time.monotonic()
        self.tell: Callable[[dict[str, float]], object] = lambda _: None
        """Lets trackers know of figures."""
        self._measuring = 0.0
        """Seconds of this training that were spent on held-out windows."""
        self._per_step = schedule.windows * lesson.domains[0].windows.length
        """Tokens, over all processes."""
        self._at_once = min(schedule.at_once * lesson.domains[0].windows.length, TOKENS_PER_BATCH)

    # Called by the Trainer

    def on_train_begin(self, _: TrainingArguments, state: TrainerState, *__: Any, **___: Any) -> None:
        """Measures the model as it is, unless that was done in an earlier run."""
        steps = self._schedule.steps
        total, done = (None if steps is None else steps * self._per_step), state.global_step * self._per_step
        self._bar = self.lesson.progress.bar("Training", total, done, unit="tok")
        if not self._looks:
            self._look(0)

    def on_log(
        self, _: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **__: Any
    ) -> None:
        """Notes the loss of a step; one that is not finite ends the training."""
        if "loss" not in logs:
            return
        self._losses.append((state.global_step, logs["loss"], logs["learning_rate"]))
        self._bar.set_postfix_str(f"loss {logs['loss']:.3f}, ppl {self._looks[-1][1]:,.2f}", refresh=False)
        if not math.isfinite(logs["loss"]):
            self._why = f"the loss of step {state.global_step} is not finite"
            control.should_training_stop = True

    def on_step_end(self, _: TrainingArguments, state: TrainerState, control: TrainerControl, **__: Any) -> None:
        """Looks how good the model is when it is time to, and decides whether to go on and whether to keep the state."""
        self.student.end_step()
        step = state.global_step
        self.course.look_at_the_clock()
        part = self.course.part(step)
        if int(part * self._schedule.looks) > len(self._looks) - 1:
            self._look(step)
        if self.lesson.update_every and step % self.lesson.update_every == 0:
            self._move_weights(step)
        self._advance(step, part)
        over = part >= 1 or bool(self._why)
        due = not over and time.monotonic() - self._saved > 60 * self._schedule.checkpoint_minutes
        stops, saves = processes.broadcast_from_first(lambda: (over, due or interrupts.waiting()))
        control.should_training_stop, control.should_save = stops, saves

    def on_save(self, *_: Any, **__: Any) -> None:
        """A state was kept: one that was told to stop ends with it."""
        self._saved = time.monotonic()
        if interrupts.waiting():
            raise KeyboardInterrupt

    def write_state(self, place: Path) -> None:
        """Adds to a kept state what its Trainer does not know; it is whole with that."""
        if processes.first():
            with whole(place / STATE) as partial:
                partial.write_text(json.dumps(self._state()))

    # What it knows

    def _advance(self, step: int, part: float) -> None:
        """Moves the bar; a training by minutes will come to so many tokens as it seems now."""
        if self._schedule.steps is None:
            self._bar.total = round(step * self._per_step / max(part, 1e-3))
        self._bar.update(self._per_step)

    def _look(self, step: int) -> None:
        """Measures the held-out perplexity; the weights are kept if it is the best."""
        found = self._measured()
        best = min((value for _, value in self._looks), default=math.inf)
        self._looks.append((step, found))
        self.tell({"held_out_perplexity": found})
        if step and found < best:
            self.student.keep(found, step)
        since = len(self._looks) - 1 - min(range(len(self._looks)), key=lambda look: self._looks[look][1])
        if since >= self._schedule.patience:
            self._why = f"the held-out perplexity was no better in {since} looks"

    def _move_weights(self, step: int) -> None:
        """Gives more weight to the domains that are farther from their references (Sheared LLaMA, arXiv 2310.06694, algorithm 1)."""
        losses = [math.log(self._measured(domain.held_out)) for domain in self.lesson.domains]
        references = [domain.reference or 0.0 for domain in self.lesson.domains]
        self.mixture.weights = moved(self.mixture.weights, losses, references)
        self._moves.append((step, losses, list(self.mixture.weights)))
        names = [domain.name for domain in self.lesson.domains]
        self.tell({f"weight of {name}": weight for name, weight in zip(names, self.mixture.weights, strict=True)})
        self.tell({f"held-out loss of {name}": loss for name, loss in zip(names, losses, strict=True)})

    def _measured(self, windows: Windows | None = None) -> float:
        """The perplexity on the held-out windows, or on some of them."""
        model, began = self.student.model, time.monotonic()
        training = model.training
        model.eval()
        try:
            with self.student.computing():
                return perplexity(model, windows or self.lesson.held_out, Progress(), self._at_once).value
        except NumericalError:
            return math.inf
        finally:
            model.train(training)
            self._measuring += time.monotonic() - began

    def _state(self) -> dict[str, Any]:
        return {
            "seconds": self.course.seconds,
            "measuring": self._measuring,
            "mixture": self.mixture.state(),
            "looks": self._looks,
            "losses": self._losses,
            "moves": self._moves,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state that was kept."""
        self.course.goes_on_after(state["seconds"])
        self._measuring = state["measuring"]
        self.mixture.load(state["mixture"])
        self._looks = [(step, value) for step, value in state["looks"]]
        self._losses = [(step, loss, rate) for step, loss, rate in state["losses"]]
        self._moves = [(step, losses, weights) for step, losses, weights in state["moves"]]

    def ended(self) -> dict[str, Any]:
        """Gives the model the best weights that it had, and tells how it went."""
        self._bar.close()
        before = self._looks[0][1]
        best, step = self.student.best()
        steps = self._losses[-1][0] if self._losses else 0
        tokens, seconds = steps * self._per_step, self.course.seconds
        speed = tokens / max(seconds - self._measuring, 1e-9)
        better = best < before
        self.student.give_back(best=better)
        after = self._measured() if better else before
        if better and after >= before:  # to be rounded to the model's dtype cost more than was won
            self.student.give_back(best=False)
            better, after = False, before
        every = max(1, len(self._losses) // POINTS)
        found: dict[str, Any] = {
            "steps": steps,
            "tokens": tokens,
            "seconds": round(seconds, 1),
            "tokens_per_second": round(speed, 1),
            "held_out": {"before": before, "after": after, "text": self.lesson.held_out.source},
            "kept": f"the weights after step {step}" if better else "the weights as they were",
            "looks": [list(look) for look in self._looks],
            "losses": [list(each) for each in self._losses[::every]],
        }
        if self.lesson.update_every:
            found["domains"] = {
                "names": [domain.name for domain in self.lesson.domains],
                "references": [domain.reference for domain in self.lesson.domains],
                "moves": [list(move) for move in self._moves],
            }
        told = f"perplexity on {self.lesson.held_out.source} from {before:,.2f} to {after:,.2f} with {tokens:,} tokens"
        if not better:
            told = f"perplexity on {self.lesson.held_out.source} was never below {before:,.2f}, so {self.student.left_alone}"
        if self._why:
            found["ended_early"] = self._why
            told += f" ({self._why})"
        return found | {NOTE: told}


def moved(weights: Sequence[float], losses: Sequence[float], references: Sequence[float]) -> list[float]:
    """Weights of domains, each multiplied by how far its loss is above its reference, exponentially; they sum to 1.

    A little of them is shared out evenly, so that no domain is ever forgotten.
    """
    new = [
        weight * math.exp(min(max(loss - reference, 0.0), 50.0))
        for weight, loss, reference in zip(weights, losses, references, strict=True)
    ]
    return [(1 - SHARED) * weight / math.fsum(new) + SHARED / len(new) for weight in new]

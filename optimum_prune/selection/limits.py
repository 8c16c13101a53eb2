"""What a person limits a model to: its size or its speed, in one of several ways."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optimum_prune.anatomy.workload import Cost, Workload
from optimum_prune.calibration.cache import cache_bytes
from optimum_prune.checkpoint.opening import length_limit
from optimum_prune.errors import RecipeError
from optimum_prune.machine import given_files, processes
from optimum_prune.machine.mapped_weights import lies_on_disk
from optimum_prune.machine.sizes import size_of
from optimum_prune.options import NUMBER, check_options, option
from optimum_prune.selection.goals import SIZES, SPEEDS, Goal
from optimum_prune.selection.measures import Measure, Served, Times, Weights, whole
from optimum_prune.selection.timing import TOKENS, Stopwatch, read_table, timing_cost

if TYPE_CHECKING:
    from optimum_prune.anatomy.decoder import Decoder
    from optimum_prune.anatomy.shape import Shape
    from optimum_prune.calibration.calibration import Calibration
    from optimum_prune.selection.allowed import Allowed
    from optimum_prune.selection.shapes import Choice

BATCH, CONTEXT = 1, 1024
"""Sequences that are served at a time, and tokens of each, if nobody says."""
GUESS = 0.8
"""Of the parameters, for a plan, where only the model itself can tell how many there will be."""
LEAST_SIZE = 1000
"""Bytes: a smaller number is no size of a model, and most likely meant as a fraction."""
LARGEST_TABLE = 10**7
"""Bytes of a table of times."""


@dataclass(frozen=True, kw_only=True)
class Limit:
    """What a model is to be limited to, in one of several ways."""

    params: float | None = option(
        "Fraction of all the model's parameters to keep.", None, above=0, below=1, each_by_itself=True
    )
    bytes: str | None = option(
        "Weights on disk, without what a file says of them: a fraction of what they take, such as 0.8, or a size, such as 200MB.",
        None,
        or_number=True,
        each_by_itself=True,
    )
    serving_memory: str | None = option(
        "Weights and the cache of keys and values for 'batch' sequences of 'context' tokens: a fraction or a size.",
        None,
        or_number=True,
        each_by_itself=True,
    )
    prefill_speed: float | None = option(
        "How many times as fast 'batch' prompts of 'context' tokens are to be read.",
        None,
        above=1,
        each_by_itself=True,
    )
    decode_speed: float | None = option(
        "How many times as fast tokens are to be written behind 'context' others, for 'batch' sequences at a time.",
        None,
        above=1,
        each_by_itself=True,
    )
    batch: int | None = option(f"Sequences that are served at a time. If not given: {BATCH}.", None, at_least=1)
    context: int | None = option(f"Tokens of each of these. If not given: {CONTEXT}.", None, at_least=1)
    speed_table: str | None = option(
        "A JSON file with the times of layers on the machine that will serve, as a report has them; measured on this one if not given.",
        None,
    )

    def check_limit(self, step: str) -> None:
        """Refuses no limit, several, and what belongs to another one.

        Raises:
            RecipeError: naming the pass.
        """
        check_options(self, f"pass '{step}'")
        limits = [name for name in (*SIZES, *SPEEDS) if getattr(self, name) is not None]
        if len(limits) != 1:
            given = f"has {' and '.join(limits)}" if limits else "is not told how small the model is to become"
            raise RecipeError(f"{step} {given}. Give one of {', '.join((*SIZES, *SPEEDS))}.")
        (limit,) = limits
        served = [name for name in ("batch", "context") if getattr(self, name) is not None]
        if served and limit in ("params", "bytes"):
            raise RecipeError(
                f"{step} has {served[0]} and {limit}, which is the same for every {served[0]}. Leave {served[0]} out."
            )
        if self.speed_table is not None and limit not in SPEEDS:
            raise RecipeError(f"{step} has speed_table and {limit}, for which no time matters. Leave speed_table out.")
        if limit in SIZES and limit != "params":
            self._fraction_or_size(getattr(self, limit))

    def timing_cost(self, work: Workload, shape: Shape) -> Cost:
        """What measuring times takes; nothing where no time matters."""
        if self.limit not in SPEEDS or self.speed_table is not None:
            return Cost()
        return timing_cost(work, shape, SPEEDS[self.limit], self.batch or BATCH, self.context or CONTEXT)

    @property
    def limit(self) -> str:
        """The option in which it is given."""
        return next(name for name in (*SIZES, *SPEEDS) if getattr(self, name) is not None)

    @property
    def share(self) -> float | None:
        """The fraction of the parameters that will be left; None where only the model itself can tell."""
        if self.params is not None or self.bytes is None:
            return self.params
        fraction = self._fraction_or_size(self.bytes)
        return fraction if fraction < 1 else None

    @property
    def guess(self) -> float:
        """About what fraction of the parameters will be left."""
        speed = self.prefill_speed or self.decode_speed
        return self.share or (max(1 / speed, 0.3) if speed else GUESS)

    @staticmethod
    def _fraction_or_size(text: str) -> float:
        """A fraction below 1, or bytes.

        Raises:
            RecipeError: it is neither.
        """
        if NUMBER.fullmatch(text) and float(text) < LEAST_SIZE:
            if 0 < float(text) < 1:
                return float(text)
            raise RecipeError(
                f"A size of {text} is asked for. Give a fraction above 0 and below 1, such as 0.8, or a size such as 200MB."
            )
        return float(size_of(text, "size"))

    def goal(self, step: str, decoder: Decoder, calibration: Calibration, allowed: Allowed) -> Goal:
        """What that means of a model, which is measured for it.

        Raises:
            RecipeError: the table cannot be read, or the model is not to be timed so.
        """
        shape, limit = decoder.shape(), self.limit
        if limit in SPEEDS:
            return self._speed_goal(step, decoder, calibration, allowed)
        if self.params is not None:
            return Goal.of_parameters(self.params, shape)
        weights = Weights(decoder.model.dtype.itemsize)
        measure: Measure = weights
        if limit == "serving_memory":
            measure = Served(weights, shape.layers, cache_bytes(decoder, *self._served(step, decoder)))
        before = whole(measure, shape.layers, shape.rest)
        wanted = self._fraction_or_size(getattr(self, limit))
        return Goal(limit, measure, wanted * before if wanted < 1 else wanted, before)

    def _served(self, step: str, decoder: Decoder) -> tuple[int, int]:
        """How many sequences of how many tokens."""
        written = TOKENS if self.limit == "decode_speed" else 0
        longest, context = length_limit(decoder.config) - written, self.context
        if context is not None and context > longest:
            behind = f" in front of the {written} that are written" if written else ""
            raise RecipeError(f"{step} has context {context}, and this model takes {longest} tokens at most{behind}.")
        return self.batch or BATCH, context or min(CONTEXT, longest)

    def _speed_goal(self, step: str, decoder: Decoder, calibration: Calibration, allowed: Allowed) -> Goal:
        limit, shape = self.limit, decoder.shape()
        stopwatch = Stopwatch(decoder, SPEEDS[limit], *self._served(step, decoder))
        if self.speed_table is not None:
            return self._by_table(step, shape)
        if lies_on_disk(decoder.modules[0]):
            raise RecipeError(
                f"{step} has {limit}, and the model's weights stay on disk, so that its time would be the disk's. Give a speed_table."
            )
        told = calibration.once(
            "times", lambda: processes.broadcast_from_first(lambda: stopwatch.table(allowed).told())
        )
        times = Times.read(told, shape)
        before = whole(times, shape.layers, shape.rest)

        def timed(choice: Choice) -> float:
            """Of one that is made of the model as it is."""
            share = calibration.once("time", lambda: processes.broadcast_from_first(lambda: stopwatch.of(choice)))
            return before * share

        return Goal(limit, times, before / getattr(self, limit), before, timed, times.told())

    def known_goal(self, step: str, shape: Shape) -> Goal | None:
        """What can be told before there is a model; None where only that can tell.

        Raises:
            RecipeError: the table cannot be read.
        """
        if self.share is not None:
            return Goal.of_parameters(self.share, shape)
        return None if self.speed_table is None else self._by_table(step, shape)

    def _by_table(self, step: str, shape: Shape) -> Goal:
        """A speed, by the times of a table that is given."""
        table = str(self.speed_table)
        times = read_table(_json(table, step), table, shape)
        before = whole(times, shape.layers, shape.rest)
        return Goal(self.limit, times, before / getattr(self, self.limit), before, times=times.told())


def _json(name: str, step: str) -> Any:
    """What a JSON file holds.

    Raises:
        RecipeError: it cannot be read.
    """
    file = given_files.path_of(name)
    flaw = given_files.flaw(file)
    if not flaw:
        try:
            return json.loads(given_files.beginning(file, LARGEST_TABLE))
        except OSError as error:
            flaw = f"gives an error ({error.strerror})"
        except (ValueError, RecursionError):
            flaw = "is no JSON"
    raise RecipeError(f"The speed_table {name} of {step} cannot be read: it {flaw}. Name a JSON file.")

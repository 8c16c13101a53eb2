"""Text of several kinds to calibrate on: windows to fit to, and others to measure on, of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from optimum_prune.anatomy.workload import Workload
from optimum_prune.calibration.own_text import own_text
from optimum_prune.errors import RecipeError
from optimum_prune.machine import processes
from optimum_prune.selection.divergence import held_out_of, split
from optimum_prune.text.tasks import SOURCE as TASKS
from optimum_prune.text.tasks import task_windows
from optimum_prune.text.windows import Windows, joined

if TYPE_CHECKING:
    from torch import Tensor

    from optimum_prune.anatomy.decoder import Decoder
    from optimum_prune.calibration.calibration import Calibration

HELD_OUT, HELD_OUT_LENGTH = 4, 256
"""Windows of each kind that are measured on, at most, and tokens of these that are used."""
CONTINUED = 2
"""Of three windows that the model writes, so many continue passages of the text given."""


def held_out_work(work: Workload, own: int, *, tasks: bool = False) -> Workload:
    """That of the windows to measure on.

    Args:
        own: windows that the model writes.
        tasks: whether there are tasks.
    """
    counts = (held_out_of(each, HELD_OUT) for each in (work.windows, _altogether_own(own), work.windows) if each)
    return work.on(sum(counts) + HELD_OUT * tasks, min(HELD_OUT_LENGTH, work.length))


@dataclass(frozen=True)
class TextKinds:
    """Windows of one length, by what kind of text they are."""

    given: Windows
    own: Windows | None = None
    """What the model wrote when it was asked for nothing."""
    continued: Windows | None = None
    """What it wrote behind passages of the text given."""
    tasks: Windows | None = None
    """Questions with their answers, to which nothing is fitted."""

    @classmethod
    def with_own(
        cls, decoder: Decoder, calibration: Calibration, count: int, tasks: Windows | None = None
    ) -> TextKinds:
        """The text that is given, and so many windows of the model's own: a third of them its own altogether."""
        given, own = calibration.windows, _altogether_own(count)

        def written(what: str, number: int, begun: Windows, *, continuing: bool) -> Windows | None:
            if not number:
                return None
            write = partial(own_text, decoder, begun, number, continuing=continuing)
            tokens = given.tokens.new_tensor(calibration.once(what, lambda: write().tokens.tolist()))
            return Windows.from_tokens(tokens, given.source, given.bos)

        return cls(
            given,
            written("own text", own, given, continuing=False),
            written("text continued", count - own, _parted(given)[0], continuing=True),
            tasks,
        )

    @property
    def all(self) -> Windows:
        """Every window."""
        return joined([each for each in (self.given, self.own, self.continued) if each is not None])

    def fitted(self, most: int) -> Windows:
        """Those to fit to: of the text given no more than so many, and no more of what the model wrote."""
        some = [_parted(self.given)[0].part(slice(most))]
        if self.own is not None:
            some.append(_parted(self.own)[0].part(slice(most if self.continued is None else -(-most // 2))))
        if self.continued is not None:
            some.append(self.continued.part(slice(most // 2)))
        return joined(some)

    def held_out(self) -> dict[str, Windows]:
        """Those to measure on, shorter, by their kind; a single window serves for both.

        One kind more is a passage of the text given, twice: few heads tell what was there before, and on most text nobody misses them.
        """
        given = _parted(self.given)[1]
        own = {} if self.own is None else {"the model's own": _parted(self.own)[1]}
        tasks = {} if self.tasks is None else {"the tasks": self.tasks}
        return {"the text given": given, **own, "a passage twice": _half_twice(given), **tasks}


def read_tasks(step: str, names: Sequence[str], calibration: Calibration) -> Windows | None:
    """Windows of tasks, as they were when the run began; None if there are none.

    Args:
        step: the pass that asks.
        names: of files.

    Raises:
        RecipeError: there is no tokenizer to read them with.
        TextError: a file holds something else.
    """
    if not names:
        return None
    given, tokenizer = calibration.windows, calibration.tokenizer
    if tokenizer is None:
        raise RecipeError(f"{step} has tasks, and there is no tokenizer to read them with. Leave them out.")

    def read() -> list[Tensor]:
        bos = int(given.tokens[0, 0]) if given.bos else None
        found = task_windows(names, tokenizer, min(HELD_OUT_LENGTH, given.length), HELD_OUT, bos)
        return [found.tokens, found.mask]

    tokens, mask = calibration.once("tasks", lambda: processes.broadcast_from_first(read))
    return Windows(tokens.to(given.tokens), mask.to(given.mask), TASKS, given.bos)


def _altogether_own(count: int) -> int:
    """Of so many windows that the model writes, how many continue nothing."""
    return count - CONTINUED * count // 3


def _parted(windows: Windows) -> tuple[Windows, Windows]:
    """Those to fit to, and those to measure on."""
    return split(windows, HELD_OUT, HELD_OUT_LENGTH)


def _half_twice(windows: Windows) -> Windows:
    """As many tokens: those of the first half, and the same again."""
    half = -(-windows.length // 2)
    tokens, mask = (
        torch.cat([each[:, :half]] * 2, dim=1)[:, : windows.length] for each in (windows.tokens, windows.mask)
    )
    return Windows(tokens, mask, windows.source, windows.bos)

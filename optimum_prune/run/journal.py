"""The journal of a run: what its passes have computed so far, kept on disk piece by piece, so that a killed run goes on where it was.

A pass is carried out again from its beginning, on the model as it was loaded; but what it computed before it was killed, it is handed
instead of computing it once more. So the journal knows nothing of what a pass does, and what comes out is the same to the bit.

Each piece is a safetensors file: its tensors, and in its metadata what it is and the rest of it as JSON. Its name has its number and
its digest, and it gets that name when it is whole. The first that is missing or damaged ends the journal.

Of several processes, each has a journal of its own, with the pieces of its windows. What all of them decided together is kept by the
first; the others keep the name of its file. They go on behind the last piece that all of them have.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor

from optimum_prune.calibration.calibration import Calibration
from optimum_prune.errors import PassError, reason
from optimum_prune.machine import processes, tensor_files
from optimum_prune.surgery.cuts import Cuts, Decision

T = TypeVar("T")
NAME = re.compile(r"(\d+)-([0-9a-f]+)\.safetensors")
DIGITS = 16
"""Of a digest, in a file's name."""
ELSEWHERE = "elsewhere"
"""In a piece, the name of the file of the first process that has what it is."""
TENSOR, DECISION = "__tensor__", "__decision__"
"""In the JSON, the keys of what JSON does not know."""
BEFORE = "0 before"
"""What pieces are of that no pass computed."""
DONE = "done"
"""What the last piece of a pass is called."""


class Journal:
    """The pieces in a folder that exists, and those that are added to them.

    Args:
        first: the folder of the first process's journal; that folder, in the first process.
    """

    def __init__(self, folder: Path, first: Path) -> None:
        self._folder = folder
        self._first = first
        self._files = list(_whole(folder))
        useless = [file for file in set(folder.iterdir()) - set(self._files) if NAME.fullmatch(file.name)]
        for file in useless:
            file.unlink()
        self.damaged = bool(useless)
        """Whether pieces were there of which nobody can go on."""
        self._pieces = {_metadata(file)["what"]: file for file in self._files}
        self._pass = BEFORE
        self._passes = 0
        self._at_work = False
        self._asked = Counter[str]()
        self._latest: tuple[object, str] | None = None
        """What was asked for last within a pass, and what it is called."""

    def __len__(self) -> int:
        """How many pieces there are."""
        return len(self._files)

    @property
    def stopped_behind_others(self) -> bool:
        """Whether a pass is at work, and others before it are done."""
        return self._passes > 1 and self._at_work

    def forget_behind(self, passes: int) -> None:
        """Removes what passes behind so many computed."""
        self._keep_the_first(sum(int(what.partition(" ")[0]) <= passes for what in self._pieces))

    def align(self) -> None:
        """Removes what follows on the last piece that all processes have."""
        if processes.size() == 1:
            return
        everyone = processes.gathered([list(self._pieces)])
        common = set(everyone[0]).intersection(*everyone)
        last = max((place for place, what in enumerate(self._pieces, start=1) if what in common), default=0)
        self._keep_the_first(last)

    def _keep_the_first(self, count: int) -> None:
        for file in self._files[count:]:
            file.unlink()
        self._files = self._files[:count]
        self._pieces = dict(list(self._pieces.items())[:count])

    def once(self, what: str, compute: Callable[[], T]) -> T:
        """What `compute` returns, kept before it is returned; or what was kept, if it was computed before.

        Args:
            what: its name; the second of a name is another piece than the first.
            compute: must depend on nothing but the model, the text, the options and what was decided before.

        Returns:
            A decision, or plain data with tensors in it. What was kept has lists for tuples, and text for the keys of mappings.
        """
        self._asked[what] += 1
        key = f"{self._pass}: {what} ({self._asked[what]})"
        return self._once(key, compute)

    def _once(
        self,
        key: str,
        compute: Callable[[], T],
        *,
        alike: bool = False,
        written: Callable[[Tensor], None] | None = None,
    ) -> T:
        """See `once`.

        Args:
            alike: whether all processes compute the same, as they do whenever they decide.
            written: called with each tensor when it is kept.
        """
        kept = self._pieces.get(key)
        value: T = self._read(kept) if kept else self._keep(key, compute(), alike=alike, written=written)
        self._latest = value, key
        return value

    def decisions(self, name: str, decide: Callable[[], Iterable[Decision]]) -> Iterator[Decision]:
        """The decisions of the next pass, each kept before it is carried out; of a pass that was done, without deciding again.

        Args:
            name: of the pass.
        """
        self._begin(name)
        done = f"{self._pass}: {DONE}"
        if done in self._pieces:
            for key in self._read(self._pieces[done]):
                yield self._read(self._pieces[key])
            self._at_work = False
            return
        keys = []
        for made in decide():
            if self._latest is not None and made is self._latest[0]:  # the pass kept it itself
                decision = made
            else:
                decision = self.once("decision", partial(_given, made))
            assert self._latest is not None
            keys.append(self._latest[1])
            self._latest = None  # which may be all weights of a model
            yield decision
        self._keep(done, keys)
        self._at_work = False

    def result(self, name: str, carry_out: Callable[[], T], written: Callable[[Tensor], None] | None = None) -> T:
        """What the next pass comes to, kept when it is done; of a pass that was done, without carrying it out again.

        Args:
            name: of the pass.
            carry_out: returns what `once` can keep.
            written: called with each tensor of it when it is kept.
        """
        self._begin(name)
        done = self._once(f"{self._pass}: {DONE}", carry_out, alike=True, written=written)
        self._at_work, self._latest = False, None
        return done

    def _begin(self, name: str) -> None:
        """Keeps what follows as another pass's."""
        self._passes += 1
        self._at_work = True
        self._pass, self._asked = f"{self._passes} {name}", Counter()

    def _read(self, file: Path) -> Any:
        """A piece as it was kept."""
        return _read(self._first / name if (name := _metadata(file).get(ELSEWHERE)) else file)

    def _keep(self, key: str, value: T, *, alike: bool = False, written: Callable[[Tensor], None] | None = None) -> T:
        """Keeps a piece; what all processes have alike, the first keeps for all."""
        if processes.size() == 1 or not (alike or isinstance(value, Decision)):
            self._write(key, value, written=written)
            return value
        if processes.first():
            self._write(key, value, written=written)
        name = processes.broadcast_from_first(lambda: self._files[-1].name)
        if not processes.first():
            self._write(key, None, {ELSEWHERE: name})
        return value

    def _write(
        self,
        key: str,
        value: object,
        more: Mapping[str, str] | None = None,
        written: Callable[[Tensor], None] | None = None,
    ) -> None:
        tensors: dict[str, Tensor] = {}
        try:
            text = json.dumps(value, default=partial(_plain, tensors))
        except (TypeError, ValueError, RecursionError) as error:
            raise PassError(
                f"What '{key}' came to cannot be kept: {reason(error)} Mend the pass: it may keep plain data, tensors and decisions."
            ) from error
        partial_file = self._folder / "partial"
        tensor_files.write(tensors, partial_file, {"what": key, "value": text, **(more or {})}, written=written)
        with partial_file.open("rb+") as opened:
            os.fsync(opened.fileno())
        place = self._folder / f"{len(self._files):06}-{_digest(partial_file)}.safetensors"
        partial_file.replace(place)
        self._files.append(place)
        self._pieces[key] = place


def journal_of(calibration: Calibration) -> Journal | None:
    """The journal that a run keeps for its passes; None if it keeps none."""
    return calibration.journal if isinstance(calibration.journal, Journal) else None


def _given(value: T) -> T:
    return value


def _whole(folder: Path) -> Iterator[Path]:
    """The pieces in order, up to the first that is missing or damaged."""
    found = sorted(file for file in folder.iterdir() if NAME.fullmatch(file.name))
    for number, file in enumerate(found):
        match = NAME.fullmatch(file.name)
        assert match is not None
        if int(match[1]) != number or match[2] != _digest(file) or not _is_piece(file):
            return
        yield file


def _is_piece(file: Path) -> bool:
    """Whether a file holds what a journal keeps."""
    try:
        about = _metadata(file)
        json.loads(about["value"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError):
        return False
    return "what" in about


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while piece := opened.read(tensor_files.CHUNK):
            digest.update(piece)
    return digest.hexdigest()[:DIGITS]


def _metadata(file: Path) -> Mapping[str, str]:
    with safe_open(file, "pt") as opened:
        metadata: Mapping[str, str] = opened.metadata()
    return metadata


def _read(file: Path) -> Any:
    """A piece as it was kept; its tensors are mapped from the file."""
    with safe_open(file, "pt") as opened:

        def restored(plain: dict[str, Any]) -> Any:
            if TENSOR in plain:
                return opened.get_tensor(plain[TENSOR])
            if DECISION in plain:
                cuts, weights, evidence = plain[DECISION]
                return Decision(Cuts.from_json(cuts), weights, evidence)
            return plain

        return json.loads(opened.metadata()["value"], object_hook=restored)


def _plain(tensors: dict[str, Tensor], value: object) -> Any:
    """What JSON is to have in place of what it does not know; tensors are put aside."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value
        return {TENSOR: name}
    if isinstance(value, Decision):
        return {DECISION: [value.cuts.to_json(), dict(value.weights), dict(value.evidence)]}
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Iterable):
        return list(value)
    raise TypeError(f"a {type(value).__name__} is neither plain data nor a tensor nor a decision")

"""Processes that share a run: each has the whole model and its own share of the windows, and what they add up to is known to all.

Windows are shared out where they enter the model (`Windows.share`), and whatever is summed over windows is summed over processes before
anything is decided by it. So every process takes the same decisions and holds the same model, and the first alone writes. In a single
process all of this does nothing.

What sums, hands out or waits here is to be called by every process, in the same order. A process that fails closes its connections,
upon which the others fail at their next sum, silently: one sentence is enough.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import distributed
from torch.distributed.rendezvous import rendezvous

from optimum_prune.errors import OptimumPruneError, reason, shown

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

PATIENCE = timedelta(days=30)
"""How long a process waits for the others: the first may quantize for hours. Those that fail are noticed at once."""
PREFIXES = ("", "PMI_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_")
"""Of the variables in which torchrun, accelerate and MPI say rank and size."""
FAILURES = "optimum_prune/failures"
MOST = 10**6
"""More processes than any run has."""


class ProcessError(OptimumPruneError):
    """Processes of a run that do not find each other, or lost one another."""


@dataclass(frozen=True)
class _Processes:
    """All processes of a run, as one of them sees them."""

    rank: int = 0
    size: int = 1
    here: int = 1
    """How many of them share this machine."""
    store: Any = None
    """Where they leave messages that no sum carries; none if somebody else connected them."""
    accelerator: str = ""
    """The type of the device whose tensors can be summed where they are; those of others go by way of the CPU."""


_ALONE = _Processes()
_processes: ContextVar[_Processes] = ContextVar("_processes", default=_ALONE)


@contextmanager
def started() -> Iterator[None]:
    """Connects the processes that `torchrun`, `accelerate launch` or MPI started, for the time of a `with`.

    Each gets an accelerator of its own, as far as there are any. If torch's default process group is there already, that is used.

    Raises:
        ProcessError: they do not find each other.
    """
    already = distributed.is_available() and distributed.is_initialized()
    if already:
        several = distributed.get_world_size()
        found = _Processes(distributed.get_rank(), several, _number("LOCAL_WORLD_SIZE", "LOCAL_SIZE", several))
        if "nccl" in str(distributed.get_backend_config()):
            found = replace(found, accelerator="cuda")
    else:
        size = _number("WORLD_SIZE", "SIZE", 1, at_least=1)
        rank = _number("RANK", "RANK", 0, below=size if size > 1 else MOST)
        found = _connected(rank, size) if size > 1 else _ALONE
    token = _processes.set(found)
    try:
        yield
    except BaseException:
        speaks()  # whatever becomes of this error, it is the one to be told of
        raise
    finally:
        _processes.reset(token)
        if found.size > 1 and not already:
            distributed.destroy_process_group()


def _connected(rank: int, size: int) -> _Processes:
    here = _number("LOCAL_WORLD_SIZE", "LOCAL_SIZE", size, at_least=1)
    local = _number("LOCAL_RANK", "LOCAL_RANK", rank, below=size)
    accelerator = ""
    if torch.cuda.is_available():
        torch.cuda.set_device(local % torch.cuda.device_count())
        accelerator = "cuda" if here <= torch.cuda.device_count() and distributed.is_nccl_available() else ""
    backend = "cpu:gloo,cuda:nccl" if accelerator else "gloo"
    try:
        store, _, _ = next(rendezvous("env://", rank, size))
        distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    except (RuntimeError, ValueError, OSError, OverflowError) as error:
        raise ProcessError(
            f"The {size} processes do not find each other: {reason(error)} Start them with torchrun or `accelerate launch --multi_gpu`."
        ) from error
    return _Processes(rank, size, here, store, accelerator)


def _number(name: str, of_mpi: str, default: int, *, at_least: int = 0, below: int = MOST) -> int:
    """The number in the first of the environment's variables for it that is set.

    Raises:
        ProcessError: it is no number, or not such a one.
    """
    for each in (name, *(prefix + of_mpi for prefix in PREFIXES[1:])):
        text = os.environ.get(each, "").strip()
        if not text:
            continue
        if not re.fullmatch("[0-9]{1,9}", text) or not at_least <= int(text) < below:
            raise ProcessError(
                f"The environment variable {each} is {shown(text)}, and should be a number from {at_least} to {below - 1}. Unset it, or start "
                f"several processes with torchrun or `accelerate launch --multi_gpu`."
            )
        return int(text)
    return default


def lacking() -> str:
    """What is to be said if `accelerate launch` was asked for more processes and started this one only; else nothing."""
    asked = "MASTER_ADDR" in os.environ and any(name.startswith("ACCELERATE_") for name in os.environ)
    if not asked or _number("WORLD_SIZE", "SIZE", 0):
        return ""
    return (
        "accelerate launch started one process only, as it does without --multi_gpu. Give it --multi_gpu, which needs no GPU, and leave out "
        "--cpu; or use torchrun."
    )


@contextmanager
def alone() -> Iterator[None]:
    """Lets this process work as if it were the only one, for the time of a `with`."""
    token = _processes.set(_ALONE)
    try:
        yield
    finally:
        _processes.reset(token)


def size() -> int:
    """How many processes the run has."""
    return _processes.get().size


def here() -> int:
    """How many processes of the run share this machine and its memory."""
    return _processes.get().here


def rank() -> int:
    """The number of this process among those of the run, from 0."""
    return _processes.get().rank


def first() -> bool:
    """Whether this is the process that writes and talks."""
    return rank() == 0


def speaks() -> bool:
    """Whether this process, which fails, is the one to say so: the first that fails."""
    store = _processes.get().store
    if store is None:
        return True
    try:
        return bool(store.add(FAILURES, 1) == 1)
    except RuntimeError:  # whoever holds the store is gone already
        return False


def steps(items: Sequence[T]) -> list[T | None]:
    """The items of this process, then None as often as the first process, which has the most windows, has more."""
    return [*items, *[None] * (broadcast_from_first(lambda: len(items)) - len(items))]


def gathered(mine: Sequence[T]) -> list[T]:
    """What all processes have of each of their windows, in the order of the windows as they were before they were shared out."""
    if size() == 1:
        return list(mine)
    everyone: list[Any] = [None] * size()
    with _together():
        distributed.all_gather_object(everyone, list(mine))
    missing = object()
    rounds = zip_longest(*everyone, fillvalue=missing)
    return [item for each in rounds for item in each if item is not missing]


def all_sum(tensor: Tensor) -> Tensor:
    """The sum of a tensor over the processes of the run, the same on each; may be computed in place."""
    if size() == 1:
        return tensor
    stays = tensor.device.type in ("cpu", _processes.get().accelerator)
    summed = tensor.contiguous() if stays else tensor.cpu()
    with _together():
        distributed.all_reduce(summed)
    return summed.to(tensor.device)


def all_sums(values: Iterable[float]) -> list[float]:
    """The sums of a few numbers over the processes of the run."""
    summed: list[float] = all_sum(torch.tensor(list(values), dtype=torch.float64)).tolist()
    return summed


def all_true(mine: bool) -> bool:
    """Whether something holds in every process of the run."""
    return all_sums([not mine])[0] == 0


def broadcast_from_first(make: Callable[[], T]) -> T:
    """What the first process of the run makes, handed to all of them."""
    if size() == 1:
        return make()
    made = [make() if first() else None]
    with _together():
        distributed.broadcast_object_list(made, src=0)
    return made[0]  # type: ignore[return-value]  # the first made it


def agreed(decision: T) -> T:
    """The decision of this process, if every process of the run made the same.

    Raises:
        ProcessError: they did not.
    """
    if not all_true(broadcast_from_first(lambda: decision) == decision):
        raise ProcessError(
            "The processes came to different decisions from the same sums, as they may on machines that are not alike. Run them on machines "
            "of one kind, or in one process."
        )
    return decision


def wait() -> None:
    """Returns when every process of the run has come here."""
    all_sums([0])


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ProcessError(
            f"One of the {size()} processes of this run ended before its work was done, and said nothing; it may have been killed, as "
            f"happens when memory runs out. Run fewer processes, or use --offload."
        ) from error


# Any process of this machine


def runs(process: int) -> bool:
    """Whether a process of this machine has not ended yet, whoever started it.

    Args:
        process: its number, which another process may have by now; `started_at` tells them apart.
    """
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def started_at(process: int) -> float:
    """When a process of this machine began, in seconds since 1970; 0 if it has ended or cannot be looked at."""
    import psutil

    try:
        began: float = psutil.Process(process).create_time()
    except psutil.Error:
        return 0.0
    return began

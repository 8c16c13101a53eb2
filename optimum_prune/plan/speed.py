"""How fast this machine is, measured on the spot in about a second."""

from __future__ import annotations

import mmap
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from optimum_prune.anatomy.workload import Cost

TOKENS, HIDDEN, WIDTH = 512, 1024, 2048
"""Sizes of the products that are timed."""
FEATURES = 1024
"""Size of the matrix that is factorised."""
FILE = 2**24
"""Bytes of the file that is read."""
LONG_ENOUGH = 0.15
"""Seconds for which each thing is repeated: the mean tells how fast the machine is with whatever else it has to do."""


@dataclass(frozen=True)
class Speed:
    """Seconds for one of each thing that a `Cost` counts."""

    products: float
    elements: float
    statistics: float
    solving: float
    reading: float

    def seconds(self, cost: Cost) -> float:
        """How long a piece of work takes."""
        return (
            cost.products * self.products
            + cost.elements * self.elements
            + cost.statistics * self.statistics
            + cost.solving * self.solving
            + cost.reading * self.reading
        )


@torch.no_grad()
def measured(dtype: torch.dtype, device: str) -> Speed:
    """The speed of a device in a dtype."""
    rows = torch.ones(TOKENS, HIDDEN, dtype=dtype, device=device)
    weight = torch.ones(WIDTH, HIDDEN, dtype=dtype, device=device)
    wide = torch.ones(TOKENS, WIDTH, dtype=dtype, device=device)
    plain, total = wide.float(), torch.zeros(WIDTH, WIDTH, device=device)
    matrix = torch.eye(FEATURES, dtype=torch.float64, device=device if device != "mps" else "cpu")

    def activate() -> None:
        torch.nn.functional.silu(wide).mul_(wide)

    return Speed(
        products=_mean(lambda: torch.nn.functional.linear(rows, weight), device) / (2 * TOKENS * HIDDEN * WIDTH),
        elements=_mean(activate, device) / (TOKENS * WIDTH),
        statistics=_mean(lambda: total.addmm_(plain.T, plain), device) / (2 * TOKENS * WIDTH**2),
        solving=_mean(lambda: matrix @ matrix, device) / (2 * FEATURES**3),
        reading=_reading(),
    )


def _mean(work: Callable[[], object], device: str) -> float:
    """Seconds that it takes."""
    accelerated = torch.device(device).type != "cpu"
    work()
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < LONG_ENOUGH:
        work()
        count += 1
        if accelerated:
            torch.accelerator.synchronize()
    return (time.perf_counter() - started) / count


def _reading() -> float:
    """Seconds for a byte of a mapped file that the system has read before."""
    with tempfile.TemporaryFile() as file:
        file.write(bytes(FILE))
        file.flush()

        def touch() -> float:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            return torch.frombuffer(memory, dtype=torch.int64).sum().item()

        return _mean(touch, "cpu") / FILE

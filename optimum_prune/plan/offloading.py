"""The rule by which the weights of a model stay on disk, for plans and runs alike."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from optimum_prune.errors import RecipeError
from optimum_prune.machine import processes
from optimum_prune.machine.memory import free_memory

SHARE_OF_FREE = 0.7
"""A model larger than this part of the free memory stays on disk, unless it is told otherwise."""
ON_THE_HOST = ("cpu", "mps")
"""Types of devices whose memory is the host's."""


@dataclass(frozen=True)
class Weights:
    """The weights of a model that is to be loaded."""

    name: str
    """Of the model."""
    size: int
    """Bytes that they take when they are loaded."""
    local: bool
    """Whether they lie in a folder of this machine."""
    mappable: bool
    """Whether they can stay on disk, in safetensors files of that folder."""
    converted: bool
    """Whether loading makes tensors on the host of what is in the files; else the files are mapped."""


@dataclass(frozen=True)
class Room:
    """The memory that there is for a model: free bytes, and how many processes load it there."""

    device: str
    host: float
    accelerator: float = math.inf
    """Infinite where nobody can say, or where there is none."""
    on_host: int = 1
    on_accelerator: int = 1

    @classmethod
    def around(cls, device: str) -> Room:
        """The memory of the machine, of several processes the least that any of them sees.

        To be called by all processes.
        """
        return cls(
            device,
            host=min(processes.gathered([free_memory()])),
            accelerator=min(processes.gathered([_free_on(device)])),
            on_host=processes.here(),
            on_accelerator=-(-processes.here() // _count_like(device)),
        )


def stays_on_disk(asked: bool | None, weights: Weights, room: Room) -> bool:
    """Whether weights stay on disk, where they are mapped and computed with on the CPU: as asked, or if they do not fit in memory.

    Raises:
        RecipeError: it is asked for and cannot be; or they do not fit on an accelerator.
    """
    if asked is False:
        return False
    if asked:
        _check_asked(weights, room.device)
        return True
    if room.device == "cpu":
        return weights.mappable and room.on_host * weights.size > SHARE_OF_FREE * room.host
    _check_accelerator(weights, room)
    return False


def _check_asked(weights: Weights, device: str) -> None:
    if not weights.local:
        raise RecipeError(
            f"The weights of {weights.name} are to stay on disk, which takes a folder with safetensors files. Fetch the model into a folder "
            f"first, or leave --offload out."
        )
    if device != "cpu":
        raise RecipeError(
            f"The weights of {weights.name} are to stay on disk, and the device is {device}: mapped weights are computed with "
            f"on the CPU. Use --device cpu, or leave --offload out."
        )


def _check_accelerator(weights: Weights, room: Room) -> None:
    where, free = room.device, room.accelerator
    if room.on_accelerator * weights.size <= free:
        if not weights.converted or room.on_host * weights.size <= room.host:
            return
        where, free = "the host, where they are converted to another dtype", room.host
    remedy = (
        "with --device cpu they can stay on disk"
        if weights.mappable
        else "use a smaller --dtype, or a device with more memory"
    )
    raise RecipeError(
        f"The weights of {weights.name} take {weights.size / 1e9:.1f} GB on {room.device}, and {free / 1e9:.1f} GB are free on {where}: "
        f"{remedy}."
    )


def _free_on(device: str) -> float:
    """Bytes that are free on a device, if anybody can say."""
    if torch.device(device).type in ON_THE_HOST:
        return free_memory()
    module: Any = torch.get_device_module(device)
    try:
        free, _ = module.mem_get_info(device)
    except (AttributeError, RuntimeError):  # of a kind that does not tell
        return math.inf
    return float(free)


def _count_like(device: str) -> int:
    """How many devices processes share among them: all of a kind, if none is named by its number."""
    named = torch.device(device)
    if named.type in ON_THE_HOST or named.index is not None:
        return 1
    module: Any = torch.get_device_module(device)
    return max(int(module.device_count()), 1)

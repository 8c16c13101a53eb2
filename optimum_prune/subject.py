"""The model that is to be compressed, opened but not loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from optimum_prune import checkpoint, distributed
from optimum_prune.anatomy import Family, find_family
from optimum_prune.errors import RecipeError, reason
from optimum_prune.offload import Store, weight_files
from optimum_prune.progress import Progress
from optimum_prune.recipe import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


SHARE_OF_FREE = 0.7
"""A model larger than this part of the free memory stays on disk, unless it is told otherwise."""


@dataclass(frozen=True)
class Subject:
    """The model that is to be compressed; opened, but loaded only when everything else is known to be right."""

    name: str
    source: str | None
    """Its folder, Hub id or file, if it comes from one."""
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase | None
    load: Callable[[Store | None], PreTrainedModel]
    """Loads it into memory, or maps it if there is a store for weights that stay on disk."""
    companions: tuple[Path, ...] = ()
    """Files that belong beside the weights, whatever is done to them."""
    offloads: bool = False
    """Whether its weights are to stay on disk."""
    in_memory: bool = False
    """Whether its weights are the caller's, so that nothing tells whether they were changed."""


def open_subject(
    settings: Settings, progress: Progress, *, families: Iterable[Family] | None = None, quantized: bool = False
) -> Subject:
    """The model that settings name, opened.

    Args:
        families: those of which the model must be; any model will do if not given.
        quantized: whether a model of packed weights will do.

    Raises:
        RecipeError: they name none.
        CheckpointError: it cannot be opened.
        FamilyError: it is of none of the families.
    """
    opened = open_model(settings, quantized=quantized)
    if families is not None:
        find_family(opened.config, families)
    load = partial(checkpoint.load, opened, settings.dtype, device_of(settings), progress)
    offloads = _offloads(opened, settings)
    return Subject(opened.name, opened.source, opened.config, opened.tokenizer(), load, opened.companions(), offloads)


def open_model(settings: Settings, *, quantized: bool = False) -> checkpoint.Checkpoint:
    """The checkpoint that settings name.

    Raises:
        RecipeError: they name none.
        CheckpointError: it cannot be opened.
    """
    if settings.model is None:
        raise RecipeError("No model is named. Give one with --model, or as 'model' in the recipe.")
    return checkpoint.open_checkpoint(settings.model, settings.trust_remote_code, quantized=quantized)


def _offloads(opened: checkpoint.Checkpoint, settings: Settings) -> bool:
    """Whether the weights stay on disk: as asked, or if they would take more than is free.

    Raises:
        RecipeError: it is asked for, and cannot be.
    """
    import psutil

    local = Path(opened.source).is_dir() and opened.gguf_file is None
    if settings.offload is None:
        free = psutil.virtual_memory().available
        fits = not local or distributed.here() * checkpoint.bytes_on_disk(Path(opened.source)) <= SHARE_OF_FREE * free
        return local and not distributed.by_all(fits)
    if not settings.offload:
        return False
    if not local:
        raise RecipeError(
            f"The weights of {opened.name} are to stay on disk, which takes a folder with safetensors files. Fetch the model into a folder "
            f"first, or leave --offload out."
        )
    if device_of(settings) != "cpu":
        raise RecipeError(
            f"The weights of {opened.name} are to stay on disk, and the device is {device_of(settings)}: mapped weights are computed with "
            f"on the CPU. Use --device cpu, or leave --offload out."
        )
    weight_files(Path(opened.source))
    return True


def device_of(settings: Settings) -> str:
    """The device to compute on.

    Raises:
        RecipeError: torch does not know it, or does not see it here.
    """
    if settings.device == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return str(found) if found is not None else "cpu"
    try:
        torch.empty(0, device=settings.device)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise RecipeError(
            f"The device '{settings.device}' cannot be used: {reason(error)} Use cpu, or a device that torch sees here."
        ) from error
    return settings.device


def length_limit(config: PreTrainedConfig) -> int:
    """Tokens that a model takes at once, by its config."""
    return getattr(config, "max_position_embeddings", None) or 2**31


def meta_model(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model that a config describes, without storage for its weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return model

"""The model that is to be compressed, opened but not loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from optimum_prune import checkpoint
from optimum_prune.anatomy import Family, find_family
from optimum_prune.errors import RecipeError, reason
from optimum_prune.progress import Progress
from optimum_prune.recipe import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Subject:
    """The model that is to be compressed; opened, but loaded only when everything else is known to be right."""

    name: str
    source: str | None
    """Its folder, Hub id or file, if it comes from one."""
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase | None
    load: Callable[[], PreTrainedModel]
    companions: tuple[Path, ...] = ()
    """Files that belong beside the weights, whatever is done to them."""
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
    return Subject(opened.name, opened.source, opened.config, opened.tokenizer(), load, opened.companions())


def open_model(settings: Settings, *, quantized: bool = False) -> checkpoint.Checkpoint:
    """The checkpoint that settings name.

    Raises:
        RecipeError: they name none.
        CheckpointError: it cannot be opened.
    """
    if settings.model is None:
        raise RecipeError("No model is named. Give one with --model, or as 'model' in the recipe.")
    return checkpoint.open_checkpoint(settings.model, settings.trust_remote_code, quantized=quantized)


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

"""The model that is to be compressed, opened but not loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from optimum_prune.anatomy.counts import count_parameters
from optimum_prune.anatomy.family import Family, find_family
from optimum_prune.checkpoint import loading, opening, saving
from optimum_prune.checkpoint.companions import belongs_beside
from optimum_prune.checkpoint.files import file_names
from optimum_prune.checkpoint.opening import meta_model
from optimum_prune.checkpoint.quiet import quietly
from optimum_prune.checkpoint.soundness import check_sound
from optimum_prune.checkpoint.taking import COMPUTABLE, taken
from optimum_prune.errors import CheckpointError, RecipeError, reason
from optimum_prune.machine.mapped_weights import MappedWeights
from optimum_prune.machine.progress import Progress
from optimum_prune.machine.tensor_files import weight_files
from optimum_prune.plan.offloading import Room, Weights, stays_on_disk
from optimum_prune.recipe import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class ModelSource:
    """The model that is to be compressed; opened, but loaded only when everything else is known to be right."""

    name: str
    source: str | None
    """Its folder, Hub id or file, if it comes from one."""
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase | None
    load: Callable[[MappedWeights | None], PreTrainedModel]
    """Loads it into memory, or maps it if there is a place for weights that stay on disk."""
    companions: tuple[Path, ...] = ()
    """Files that belong beside the weights, whatever is done to them."""
    offloads: bool = False
    """Whether its weights are to stay on disk."""
    in_memory: bool = False
    """Whether its weights are the caller's, so that nothing tells whether they were changed."""
    mappable: bool = False
    """Whether `load` can map it, as its files and its device are."""
    resident: bool = True
    """Whether loading it takes memory that the system cannot take back: tensors that no file is mapped to."""

    @classmethod
    def of_model(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, progress: Progress | None = None
    ) -> ModelSource:
        """A caller's model in memory, which is changed in place.

        Raises:
            CheckpointError: it is none that can be pruned as it is.
        """
        model = taken(model)
        name = model.name_or_path or type(model).__name__
        if changed := saving.settle_for_saving(model, name):
            (progress or Progress()).say(changed)
        return cls(name, name, model.config, tokenizer, partial(_looked_at, model, name), in_memory=True)


def _looked_at(model: PreTrainedModel, name: str, _: MappedWeights | None) -> PreTrainedModel:
    """A caller's model, in evaluation mode; it was run once, and every weight looked at."""
    loading.check_resident(model, name)
    with quietly():
        check_sound(model.eval(), name)
    return model


def open_source(
    settings: Settings,
    progress: Progress,
    *,
    families: Iterable[Family] | None = None,
    quantized: bool = False,
    config_only: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tokenizer_needed: bool = True,
    weights_needed: bool = True,
) -> ModelSource:
    """The model that settings name, opened.

    Args:
        families: those of which the model must be; any model will do if not given.
        quantized: whether a model of packed weights will do.
        config_only: whether nothing but its config is read, and it need have nothing else.
        tokenizer: to be used instead of its own, which it then need not have.
        tokenizer_needed: whether to refuse a model that has none.
        weights_needed: whether to refuse one that has no weights, as what was exported has none.

    Raises:
        RecipeError: they name none; or where its weights are to be, they cannot be.
        CheckpointError: it cannot be opened. A FamilyError: it is of none of the families.
    """
    opened = _opened(settings, families, quantized=quantized)
    device = device_of(settings)
    weights = _weights(opened, settings.dtype)
    _check_offload(settings, opened)
    offloads = stays_on_disk(settings.offload, weights, Room.around(device))
    if weights_needed and not config_only:
        _check_files(opened, offloads)
        if opened.remark and not quantized:
            progress.say(opened.remark)
    return ModelSource(
        opened.name,
        opened.source,
        opened.config,
        tokenizer=None if config_only else _tokenizer(opened, tokenizer, needed=tokenizer_needed),
        load=partial(_load, opened, settings.dtype, device, progress),
        companions=() if config_only else opened.companions(tokenizer=tokenizer is None),
        offloads=offloads,
        mappable=weights.mappable and device == "cpu",
        resident=weights.converted or device != "cpu",
    )


def _opened(settings: Settings, families: Iterable[Family] | None, *, quantized: bool) -> opening.Checkpoint:
    """The checkpoint that settings name, of one of the families."""
    if settings.model is None:
        raise RecipeError("No model is named. Give one with --model, or as 'model' in the recipe.")
    opened = opening.open_checkpoint(settings.model, settings.trust_remote_code, quantized=quantized)
    if families is not None:
        find_family(opened.config, families)
    _check_dtype(opened, settings.dtype)
    return opened


def _load(
    opened: opening.Checkpoint, dtype: str, device: str, progress: Progress, weights: MappedWeights | None
) -> PreTrainedModel:
    """The model of a checkpoint, as it can be saved again."""
    model = loading.load(opened, dtype, device, progress, weights)
    if not opened.packed:
        saving.settle_for_saving(model, opened.name)
    return model


def _check_files(opened: opening.Checkpoint, offloads: bool) -> None:
    """Refuses a model whose files cannot be read, or not where its weights are to be."""
    if offloads:
        weight_files(Path(opened.source), opened.weights_file)
    loading.check_fits(opened)


def _tokenizer(
    opened: opening.Checkpoint, given: PreTrainedTokenizerBase | None, *, needed: bool
) -> PreTrainedTokenizerBase | None:
    """The tokenizer that is given, or the checkpoint's own; None if it has none and needs none."""
    if given is not None:
        return given
    names = file_names(opened.source)
    own = [name for name in names if belongs_beside(name) and not belongs_beside(name, tokenizer=False)]
    there = bool(own) or not names or any(name.startswith("tokenizer") for name in names)
    return opened.tokenizer() if needed or there or opened.gguf_file else None


def _check_dtype(opened: opening.Checkpoint, dtype: str) -> None:
    """Refuses weights in a dtype in which nothing can be computed, if that is to be kept."""
    chosen = loading.dtype_of(opened.config, dtype)
    if chosen not in COMPUTABLE and not opened.packed:
        raise CheckpointError(
            f"The weights of {opened.name} are in {str(chosen).removeprefix('torch.')}, in which a model cannot be computed. Give --dtype "
            f"bfloat16."
        )


def _check_offload(settings: Settings, opened: opening.Checkpoint) -> None:
    """Refuses to leave weights on disk that are in a .gguf file, where they are packed in a way of its own."""
    if settings.offload and opened.gguf_file:
        raise RecipeError(
            f"The weights of {opened.name} are to stay on disk, and it is a .gguf file, which is unpacked into memory. Save it as safetensors "
            f"with transformers first, or leave --offload out."
        )


def _weights(opened: opening.Checkpoint, dtype: str) -> Weights:
    """What is known of the weights of a checkpoint before they are read."""
    folder = Path(opened.source)
    local = folder.is_dir() and opened.gguf_file is None
    size = saving.bytes_on_disk(folder) if local else 0
    own, chosen = opened.config.dtype, loading.dtype_of(opened.config, dtype)
    packed = opened.packed
    if not packed and size and own is not None:
        size = size * chosen.itemsize // own.itemsize
    elif not packed:  # they are yet to be fetched, or stored in a form that is not the one in which they are loaded
        size = count_parameters(meta_model(opened.config, opened.trust_remote_code)).total * chosen.itemsize
    return Weights(
        opened.name,
        size,
        local=local,
        mappable=local and not packed and _has_safetensors(folder, opened.weights_file),
        converted=chosen != (own or chosen) or opened.gguf_file is not None,
    )


def _has_safetensors(folder: Path, named: str | None) -> bool:
    """Whether a checkpoint's folder holds its weights as safetensors; one without any weights is taken to get such."""
    try:
        return bool(weight_files(folder, named))
    except CheckpointError:
        return saving.bytes_on_disk(folder) == 0


def device_of(settings: Settings) -> str:
    """The device to compute on.

    Raises:
        RecipeError: torch does not know it, or does not see it here.
    """
    if settings.device == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return str(found) if found is not None else "cpu"
    try:
        if torch.empty(0, device=settings.device).is_meta:
            raise ValueError("it computes nothing")
    except (RuntimeError, AssertionError, ValueError) as error:
        raise RecipeError(
            f"The device '{settings.device}' cannot be used: {reason(error)} Use cpu, or a device that torch sees here."
        ) from error
    return settings.device

"""Checkpoints saved, as transformers 5 and 4.57 both read them, and what their weights take in bytes."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch

from optimum_prune.checkpoint.generation import settle
from optimum_prune.checkpoint.mapping import saving_mapped
from optimum_prune.checkpoint.quiet import quietly
from optimum_prune.checkpoint.soundness import follow_ties
from optimum_prune.checkpoint.transformers4 import add_older_fields
from optimum_prune.errors import CheckpointError, OutputError, found_no_memory, reason
from optimum_prune.machine.given_files import path_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from optimum_prune.machine.mapped_weights import MappedWeights
    from optimum_prune.machine.progress import Progress

WITH_CODE = ("config.json", "tokenizer_config.json", "processor_config.json")
"""Files that may name the modules that a checkpoint's own code is in."""


def weight_bytes(model: torch.nn.Module) -> int:
    """What the weights of a model take on disk, in bytes; tied ones count once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def stored_bytes(name: str, model: torch.nn.Module) -> int:
    """What a checkpoint takes where it is: its files, or if these are on the Hub, its weights as loaded; in bytes."""
    path = path_of(name)
    if path.is_file():
        return path.stat().st_size
    return bytes_on_disk(path) if path.is_dir() else weight_bytes(model)


def bytes_on_disk(folder: Path) -> int:
    """What the weight files of a checkpoint take, in bytes."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in (".safetensors", ".bin", ".gguf"))


def settle_for_saving(model: PreTrainedModel, name: str) -> str:
    """Makes of what a model says of itself something that can be saved, in place, so that no run fails at its end.

    Returns:
        What was changed, as a sentence; empty if nothing was that anybody sees.

    Raises:
        CheckpointError: it cannot be saved.
    """
    from transformers import GenerationConfig

    follow_ties(model)
    if getattr(model, "generation_config", None) is None:
        model.generation_config = GenerationConfig.from_model_config(model.config)
    changed = settle(model.generation_config, name)
    try:
        with quietly(), TemporaryDirectory() as aside:
            model.config.save_pretrained(aside)
            type(model.config).from_pretrained(aside)
    except Exception as error:  # whatever a config has that it does not write, or reads otherwise
        raise CheckpointError(
            f"The config of {name} cannot be saved and read again: {reason(error)} Mend it."
        ) from error
    return changed


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    progress: Progress,
    weights: MappedWeights | None = None,
) -> None:
    """Writes a checkpoint that stock transformers 5 reads, and 4.57 too.

    Args:
        weights: where the model's weights are, if on disk.

    Raises:
        OutputError: it cannot be written, such as on a full disk.
    """
    try:
        with progress.libraries(), quietly(), nullcontext() if weights is None else saving_mapped(weights):
            model.save_pretrained(folder)
        if tokenizer is not None:
            with quietly():
                tokenizer.save_pretrained(folder)
        add_older_fields(folder)
        name_no_code_elsewhere(folder)
    except Exception as error:  # full disks, and configs that transformers refuses to write
        if found_no_memory(error):
            raise
        remedy = "Make room, or name an --output elsewhere." if isinstance(error, OSError) else "Please report it."
        raise OutputError(f"The checkpoint cannot be written: {reason(error)} {remedy}") from error


def name_no_code_elsewhere(folder: Path) -> None:
    """Takes out of a checkpoint's JSON files what names code that does not lie beside them, such as that of a model which was loaded without."""
    for file in (folder / name for name in WITH_CODE):
        plain = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if not isinstance(named := plain.get("auto_map"), dict):
            continue
        kept = {kind: where for kind, where in named.items() if lies_beside(where, folder)}
        if kept != named:
            plain = {**plain, "auto_map": kept} if kept else {key: plain[key] for key in plain if key != "auto_map"}
            file.write_text(json.dumps(plain, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def lies_beside(where: object, folder: Path) -> bool:
    """Whether all modules that an entry of `auto_map` names are files of a folder."""
    named = [name for name in (where if isinstance(where, list) else [where]) if name is not None]
    return all((folder / f"{str(name).rpartition('.')[0]}.py").is_file() for name in named)

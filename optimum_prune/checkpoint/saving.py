"""Checkpoints saved, as transformers 5 and 4.57 both read them, and what their weights take in bytes."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from optimum_prune.checkpoint.transformers4 import add_older_fields
from optimum_prune.errors import OutputError, reason

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from optimum_prune.machine.mapped_weights import MappedWeights
    from optimum_prune.machine.progress import Progress


def weight_bytes(model: torch.nn.Module) -> int:
    """What the weights of a model take on disk, in bytes; tied ones count once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def stored_bytes(name: str, model: torch.nn.Module) -> int:
    """What a checkpoint takes where it is: its files, or if these are on the Hub, its weights as loaded; in bytes."""
    path = Path(name).expanduser()
    if path.is_file():
        return path.stat().st_size
    return bytes_on_disk(path) if path.is_dir() else weight_bytes(model)


def bytes_on_disk(folder: Path) -> int:
    """What the weight files of a checkpoint take, in bytes."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in (".safetensors", ".bin", ".gguf"))


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
        with progress.libraries(), nullcontext() if weights is None else weights.saving():
            model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        add_older_fields(folder)
    except Exception as error:  # full disks, and configs that transformers refuses to write
        raise OutputError(
            f"The checkpoint cannot be written: {reason(error)} Make room, or name an --output elsewhere."
        ) from error

"""Files of weights, looked into before a model is loaded from them: what is there, in which dtype, and which of them is damaged."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from optimum_prune.errors import CheckpointError, printable
from optimum_prune.machine.tensor_files import SPREAD, files_of_weights, header, without_weights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def check_weight_files(folder: Path, config: PreTrainedConfig) -> int:
    """Opens each file of weights in a folder, so that the broken one is named.

    Returns:
        How many numbers they hold; 0 if that is not known.

    Raises:
        CheckpointError: there are none; one is no such file, or one that may hold more than tensors.
    """
    if any(SPREAD.fullmatch(file.name) for file in folder.iterdir()):
        return 0
    named = getattr(config, "transformers_weights", None)
    found = files_of_weights(folder, named)
    if not found:
        raise without_weights(folder, named)
    counts = [_check_pickle(file) if file.suffix == ".bin" else _count(file) for file in found]
    return sum(counts) if all(counts) else 0


def _count(file: Path) -> int:
    return sum(prod(shape) for _, shape, *_ in header(file).values())


def _check_pickle(file: Path) -> int:
    try:
        content = torch.load(file, map_location="meta", weights_only=True)
        if not isinstance(content, Mapping):
            raise TypeError("it holds no weights by their names")
        return sum(value.numel() for value in content.values() if isinstance(value, torch.Tensor))
    except Exception as error:  # of a file that is damaged, or that would run code
        raise CheckpointError(
            f"The weights file {printable(str(file))} is damaged, or a pickle with more in it than tensors, which might run code and so is not "
            f"opened. Get the model as safetensors, or convert it where you trust it."
        ) from error


def stored_dtype(folder: Path, config: PreTrainedConfig) -> torch.dtype | None:
    """The dtype of the first weights in a folder's files, which transformers takes where the config names none."""
    found = files_of_weights(folder, getattr(config, "transformers_weights", None))
    if not found or found[0].suffix == ".bin":
        return None
    return next((dtype for dtype, *_ in header(found[0]).values() if dtype.is_floating_point), None)

"""Checkpoints opened: all that can be known of them without reading a weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from optimum_prune.errors import CheckpointError, FamilyError, reason

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

PROCESSORS = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
QUIETLY: dict[str, Any] = {
    "_raise_exceptions_for_gated_repo": False,
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk or on the Hub, opened but not loaded."""

    name: str
    """As the user named it."""
    source: str
    """Folder or Hub id."""
    gguf_file: str | None
    trust_remote_code: bool
    config: PreTrainedConfig

    def arguments(self) -> dict[str, Any]:
        """What every `from_pretrained` needs to find it."""
        return _arguments(self.gguf_file, self.trust_remote_code)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer.

        Raises:
            CheckpointError: there is none that can be read.
        """
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.source, **self.arguments())
        except Exception as error:  # transformers raises many kinds
            raise CheckpointError(f"The tokenizer of {self.name} cannot be read: {reason(error)}") from error

    def companions(self) -> tuple[Path, ...]:
        """What lies beside the weights of a model that sees or hears: the configs of its processors."""
        from transformers.utils import cached_file

        if self.gguf_file:
            return ()
        found = (cached_file(self.source, name, **QUIETLY) for name in PROCESSORS)
        return tuple(Path(file) for file in found if file is not None)


def open_checkpoint(model: str, trust_remote_code: bool = False, *, quantized: bool = False) -> Checkpoint:
    """Opens a folder, a Hub id or a `.gguf` file, and reads its config.

    Args:
        quantized: whether a checkpoint of packed weights will do, which can be evaluated but not cut.

    Raises:
        CheckpointError: it is not there, is no model, or is quantized and must not be.
    """
    from transformers import AutoConfig, PreTrainedConfig

    source, gguf_file = _locate(model)
    arguments = _arguments(gguf_file, trust_remote_code)
    try:
        plain, _ = PreTrainedConfig.get_config_dict(source, **arguments)
        if not gguf_file and not quantized:
            _refuse_quantized(plain, model)
        config = AutoConfig.from_pretrained(source, **arguments)
    except CheckpointError:
        raise
    except Exception as error:
        if isinstance(error, ValueError) and "does not recognize this architecture" in str(error):
            raise FamilyError(
                f"The installed transformers does not know the architecture '{plain.get('model_type')}' of {model}. Upgrade transformers, "
                f"or allow the checkpoint's own code with --trust-remote-code if it brings some."
            ) from error
        kind = "as a model" if Path(source).is_dir() else "from the Hub, and no folder is called so"
        raise CheckpointError(f"{model} cannot be opened {kind}: {reason(error)}") from error
    return Checkpoint(model, source, gguf_file, trust_remote_code, config)


def _arguments(gguf_file: str | None, trust_remote_code: bool) -> dict[str, Any]:
    return {"gguf_file": gguf_file} if gguf_file else {"trust_remote_code": trust_remote_code}


def _locate(model: str) -> tuple[str, str | None]:
    """Folder or Hub id, and the name of the `.gguf` file in the folder."""
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise CheckpointError(f"The model file {model} does not exist. Name a .gguf file, a folder or a Hub id.")
        return str(path.parent), path.name
    if path.is_file():
        raise CheckpointError(
            f"The model {model} is a file, but no .gguf file. Name the folder that holds it, or a .gguf file."
        )
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CheckpointError(
                f"The folder {model} is no model: it has no config.json. Name a folder with a checkpoint."
            )
        return str(path), None
    if model.startswith((".", "/", "~")) or model.count("/") > 1 or not model.strip("/ "):
        raise CheckpointError(f"The model folder {model} does not exist. Name a folder, a Hub id or a .gguf file.")
    return model, None


def _refuse_quantized(config: Mapping[str, Any], model: str) -> None:
    quantization = config.get("quantization_config")
    if quantization is not None:
        method = (
            quantization.get("quant_method", "an unnamed method")
            if isinstance(quantization, Mapping)
            else quantization
        )
        raise CheckpointError(
            f"{model} is already quantized ({method}): its weights are packed and cannot be cut exactly. Prune the unquantized "
            f"checkpoint, and quantize as a later pass of the recipe."
        )


def length_limit(config: PreTrainedConfig) -> int:
    """Tokens that a model takes at once, by its config."""
    return getattr(config, "max_position_embeddings", None) or 2**31


def meta_model(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model that a config describes, without storage for its weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return model

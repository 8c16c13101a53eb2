"""Checkpoints opened: all that can be known of them without reading a weight."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from optimum_prune.checkpoint.adapters import ADAPTERS, refuse_adapter
from optimum_prune.checkpoint.boundary import check_folder, check_names, check_tokenizer_files, found_files
from optimum_prune.checkpoint.companions import companions_of
from optimum_prune.checkpoint.described import check_described, check_plain, refuse_quantized
from optimum_prune.checkpoint.files import cached, file_names
from optimum_prune.checkpoint.generation import FILE as GENERATION
from optimum_prune.checkpoint.generation import check_generation
from optimum_prune.checkpoint.quiet import quietly
from optimum_prune.checkpoint.stored import stored_dtype
from optimum_prune.checkpoint.vocabulary import check_vocabulary
from optimum_prune.errors import CheckpointError, FamilyError, printable, reason
from optimum_prune.machine.given_files import flaw, mapping_in, path_of
from optimum_prune.machine.tensor_files import INDICES, listed

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

CONFIG, TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"


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
    remark: str = ""
    """What will be changed of it when it is saved, as a sentence."""
    local: bool = False
    """Whether it was found in a folder of this machine."""

    @property
    def packed(self) -> bool:
        """Whether its weights are quantized."""
        return getattr(self.config, "quantization_config", None) is not None

    @property
    def weights_file(self) -> str | None:
        """The file that its config names for its weights, if it does."""
        return getattr(self.config, "transformers_weights", None)

    def check_there(self) -> None:
        """Refuses a folder that was there when it was opened: no model of the Hub that has its name is taken for it.

        Raises:
            CheckpointError: it is not there any more.
        """
        if self.local and not Path(self.source).is_dir():
            raise CheckpointError(
                f"The model's folder {printable(self.source)} is gone: it was there when this began. Put it back, and begin again."
            )

    def arguments(self) -> dict[str, Any]:
        """What every `from_pretrained` needs to find it."""
        return _arguments(self.gguf_file, self.trust_remote_code)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer.

        Raises:
            CheckpointError: there is none that can be read.
        """
        from transformers import AutoTokenizer

        folder = Path(self.source)
        file = folder / TOKENIZER_CONFIG if folder.is_dir() else cached(self.source, TOKENIZER_CONFIG)
        plain, where = {} if file is None else mapping_in(file), f"{self.name}'s {TOKENIZER_CONFIG}"
        check_names(plain, where)
        check_tokenizer_files(plain, folder, where)
        try:
            with quietly():
                tokenizer = AutoTokenizer.from_pretrained(self.source, **found_files(plain), **self.arguments())
        except (KeyboardInterrupt, SystemExit):
            raise
        except (
            BaseException
        ) as error:  # transformers raises many kinds, and what is written in Rust raises none of Python's
            if _asks_for_trust(error):
                raise _not_trusted(self.name, "tokenizer") from error
            raise CheckpointError(f"The tokenizer of {self.name} cannot be read: {reason(error)}") from error
        if not isinstance(getattr(tokenizer, "model_max_length", 0), (int, float)):
            raise CheckpointError(f"The 'model_max_length' of {where} is no number. Mend it.")
        if not self.gguf_file:
            check_vocabulary(tokenizer, self.name, file_names(self.source))
        return tokenizer

    def companions(self, *, tokenizer: bool = True) -> tuple[Path, ...]:
        """The files that belong beside its weights, whatever is done to them.

        Args:
            tokenizer: whether those of its tokenizer do.
        """
        if self.gguf_file:
            return ()
        file_of = Path(self.source).joinpath if Path(self.source).is_dir() else partial(cached, self.source)
        return companions_of(file_names(self.source), file_of, tokenizer=tokenizer, code=self.trust_remote_code)


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
    if not gguf_file:
        _check_files(source, model, trust_remote_code)
    plain: Mapping[str, Any] = {}
    try:
        with quietly():
            plain, _ = PreTrainedConfig.get_config_dict(source, gguf_file=gguf_file)
            check_plain(plain, model, trust_remote_code)
            if not quantized and not gguf_file:
                refuse_quantized(plain, model)
            config = AutoConfig.from_pretrained(source, **arguments)
    except CheckpointError:
        raise
    except Exception as error:
        raise _cannot_be_opened(error, model, source, plain) from error
    if not isinstance(config.dtype, torch.dtype | None):
        raise CheckpointError(
            f"The config of {model} names the dtype '{plain.get('dtype', plain.get('torch_dtype'))}', which torch does not know. Mend its "
            f"config.json."
        )
    if gguf_file:
        return Checkpoint(model, source, gguf_file, trust_remote_code, config, local=True)
    local = Path(source).is_dir()
    if config.dtype is None and local:
        config.dtype = stored_dtype(Path(source), config)
    return Checkpoint(model, source, None, trust_remote_code, config, _check_generation(source, model), local)


def _arguments(gguf_file: str | None, trust_remote_code: bool) -> dict[str, Any]:
    """Whether code is run is always said: where it is not, transformers asks on standard input."""
    gguf = {"gguf_file": gguf_file} if gguf_file else {}
    return {"trust_remote_code": trust_remote_code, **gguf}


# Where it is


def _locate(model: str) -> tuple[str, str | None]:
    """Folder or Hub id, and the name of the `.gguf` file in the folder."""
    path, shown = path_of(model), printable(model)
    try:
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"The model {shown} cannot be read: {reason(error)}") from error
    if path.suffix == ".gguf" and not is_folder:
        if found := flaw(path):
            raise CheckpointError(f"The model file {shown} {found}. Name a .gguf file, a folder or a Hub id.")
        return str(path.parent), path.name
    if is_file:
        raise CheckpointError(
            f"The model {shown} is a file, but no .gguf file. Name the folder that holds it, or a .gguf file."
        )
    if is_folder:
        return str(path), None
    if os.path.lexists(path):
        raise CheckpointError(f"The model {shown} {flaw(path)}. Name a folder, a Hub id or a .gguf file.")
    if model.startswith((".", "/", "~")) or model.count("/") > 1 or not model.strip("/ "):
        raise CheckpointError(f"The model folder {shown} does not exist. Name a folder, a Hub id or a .gguf file.")
    return model, None


# What is refused


def _check_files(source: str, model: str, trust_remote_code: bool) -> None:
    """Refuses what is no model's folder, an adapter, and files that lie outside."""
    folder = Path(source)
    if not folder.is_dir():
        refuse_adapter([name for name in ADAPTERS[:1] if cached(source, name)], model)
        for index in filter(None, (cached(source, name) for name in INDICES)):
            listed(index, all_there=False)
        return
    refuse_adapter([name for name in ADAPTERS if os.path.lexists(folder / name)], model)
    if not os.path.lexists(folder / CONFIG):
        raise CheckpointError(
            f"The folder {printable(model)} is no model: it has no config.json. Name a folder with a checkpoint."
        )
    check_folder(folder, code=trust_remote_code)


def _check_generation(source: str, model: str) -> str:
    """What has to be changed of a generation config for it to be valid, as a sentence; nothing if there is none, or it is."""
    file = Path(source) / GENERATION if Path(source).is_dir() else cached(source, GENERATION)
    if file is None or not file.exists():
        return ""
    with quietly():
        return check_generation(file, model)


def _cannot_be_opened(
    error: Exception, model: str, source: str, plain: Mapping[str, Any]
) -> CheckpointError | FamilyError:
    """What is said of a checkpoint whose config transformers does not read."""
    if _asks_for_trust(error):
        return _not_trusted(model, "model")
    if isinstance(error, ValueError) and "does not recognize this architecture" in str(error):
        return FamilyError(
            f"The installed transformers does not know the architecture '{plain.get('model_type')}' of {model}. Upgrade transformers, "
            f"or allow the checkpoint's own code with --trust-remote-code if it brings some."
        )
    if isinstance(error, ImportError):  # as of a .gguf file in older transformers
        return CheckpointError(
            f"{printable(model)} needs a package that is not installed: {reason(error)} Install it, or upgrade transformers."
        )
    kind = "as a model" if Path(source).is_dir() else "from the Hub, and no folder is called so"
    return CheckpointError(f"{printable(model)} cannot be opened {kind}: {reason(error)}")


def _asks_for_trust(error: BaseException) -> bool:
    return isinstance(error, ValueError) and "trust_remote_code" in str(error)


def _not_trusted(model: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"The {what} of {model} needs code that comes with it, which is not run unless that is asked for. Read the code, then give "
        f"--trust-remote-code (in Python, trust_remote_code=True)."
    )


# What follows from it


def length_limit(config: PreTrainedConfig) -> int:
    """Tokens that a model takes at once, by its config."""
    return getattr(config, "max_position_embeddings", None) or 2**31


def meta_model(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model that a config describes, without storage for its weights.

    Raises:
        CheckpointError: it describes none.
    """
    from transformers import AutoModelForCausalLM

    try:
        with quietly(), torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
            model.tie_weights()  # which not every transformers does of itself on this device
            check_described(model)
    except Exception as error:  # whatever an architecture makes of a config that it does not expect
        name = config.name_or_path or type(config).__name__
        if _asks_for_trust(error):
            raise _not_trusted(name, "model") from error
        raise CheckpointError(
            f"The config of {name} describes no model that can be made: {type(error).__name__}: {reason(error)} Mend its config.json."
        ) from error
    return model

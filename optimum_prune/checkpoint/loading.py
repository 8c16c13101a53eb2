"""Checkpoints loaded: one function reads the weights and refuses those that do not fit their config, whoever asks for them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from optimum_prune.checkpoint.opening import Checkpoint, meta_model
from optimum_prune.errors import CheckpointError, OptimumPruneError, SurgeryError, VerificationError, reason
from optimum_prune.machine.progress import Progress
from optimum_prune.machine.tensor_files import weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from optimum_prune.machine.mapped_weights import MappedWeights

PROBLEMS = {"missing_keys": "missing", "unexpected_keys": "unexpected", "mismatched_keys": "of another shape"}
"""What transformers calls the weights that do not fit a config, and what we do."""


@dataclass(frozen=True)
class Loading:
    """How a saved checkpoint is loaded."""

    dtype: torch.dtype
    device: str
    """"auto" spreads it over all devices."""
    trust_remote_code: bool = False
    progress: Progress = Progress()
    weights: MappedWeights | None = None
    """Where its weights stay on disk; in memory if None."""


@dataclass(frozen=True)
class Refusal:
    """What is said of a checkpoint that cannot be loaded, and which error says it."""

    error: type[OptimumPruneError]
    unreadable: str
    """That its weights cannot be read; why is added."""
    unfit: str
    """That it does not fit its config; which weights do not is added."""
    remedy: str = ""
    tolerated: Collection[str] = ()
    """Those of `PROBLEMS` that do no harm."""


def load(
    checkpoint: Checkpoint, dtype: str, device: str, progress: Progress, weights: MappedWeights | None = None
) -> PreTrainedModel:
    """The model of a checkpoint, in evaluation mode.

    Args:
        dtype: name of a torch dtype, or "auto" for the checkpoint's own.
        weights: where its weights stay on disk; in memory if not given.

    Raises:
        CheckpointError: weights that cannot be read, or are missing.
    """
    _check_weight_files(checkpoint)
    refusal = Refusal(
        CheckpointError,
        f"The weights of {checkpoint.name} cannot be read",
        f"The checkpoint {checkpoint.name} is incomplete",
        remedy=" Those weights would be random; fetch it again.",
        tolerated=("unexpected_keys",),
    )
    arguments = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype), **checkpoint.arguments()}
    if checkpoint.gguf_file:
        from transformers import GgufConfig

        arguments["quantization_config"] = GgufConfig(dequantize=True)
    placed = weights is not None
    if weights is None and getattr(checkpoint.config, "quantization_config", None) is not None:
        arguments["device_map"], placed = device, True  # packed weights cannot be moved afterwards
    with progress.libraries():
        model = _loaded(checkpoint.source, arguments, refusal, weights)
    return model if placed else model.to(device)


def load_model(model: str | Path, **arguments: Any) -> PreTrainedModel:
    """The model of a folder or Hub id, also one whose layers differ in shape, in evaluation mode and in its own dtype.

    Args:
        model: the folder, as a run of optimum-prune left it, or a Hub id.
        arguments: for `AutoModelForCausalLM.from_pretrained`.

    Raises:
        CheckpointError: weights that cannot be read, or are missing.
    """
    refusal = Refusal(
        CheckpointError, f"The weights of {model} cannot be read", f"The checkpoint {model} does not fit its config"
    )
    return _loaded(model, {"dtype": "auto", **arguments}, refusal)


def reload(folder: Path, loading: Loading) -> PreTrainedModel:
    """The model of a checkpoint that was just saved, in evaluation mode.

    Raises:
        VerificationError: weights that cannot be read, or do not fit the config.
    """
    refusal = Refusal(
        VerificationError,
        "The saved checkpoint cannot be loaded again",
        "The saved checkpoint does not fit its config",
    )
    arguments: dict[str, Any] = {"dtype": loading.dtype, "trust_remote_code": loading.trust_remote_code}
    placed = loading.weights is not None
    if loading.weights is None and loading.device == "auto":
        arguments["device_map"], placed = "auto", True
    with loading.progress.libraries():
        model = _loaded(folder, arguments, refusal, loading.weights)
    return model if placed else model.to(loading.device)


def _loaded(
    source: str | Path, arguments: Mapping[str, Any], refusal: Refusal, weights: MappedWeights | None = None
) -> PreTrainedModel:
    """The model of a folder or Hub id, in evaluation mode; weights that are missing would be random, and are refused.

    Args:
        arguments: for `from_pretrained`.
        weights: where its weights stay on disk, if the source is a folder; in memory if not given.
    """
    from transformers import AutoModelForCausalLM

    try:
        if weights is None:
            model, info = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **arguments)
        else:
            model, info = _mapped(Path(source), weights, **arguments)
    except refusal.error:
        raise
    except Exception as error:  # transformers raises many kinds
        raise refusal.error(f"{refusal.unreadable}: {reason(error)}") from error
    if problems := _problems(info, refusal.tolerated):
        raise refusal.error(f"{refusal.unfit}: {problems}.{refusal.remedy}")
    if weights is not None:
        weights.write_changes(model)  # what is stored in another dtype, or under older names
        weights.attach(model)
    loaded: PreTrainedModel = model.eval()
    return loaded


def _mapped(
    folder: Path, weights: MappedWeights, dtype: torch.dtype | str, trust_remote_code: bool
) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """The model of a folder with its weights mapped from its files, and what transformers says of their names and shapes."""
    from transformers import AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    tensors = {name: tensor for file in weight_files(folder) for name, tensor in weights.map(file).items()}
    chosen = dtype_of(config, "auto") if isinstance(dtype, str) else dtype
    kind = type(meta_model(config, trust_remote_code))
    model, info = kind.from_pretrained(None, config=config, state_dict=tensors, dtype=chosen, output_loading_info=True)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.name_or_path = str(folder)
    return model, info


def _problems(info: Mapping[str, Any], tolerated: Collection[str]) -> str:
    """Weights that a load found missing, unexpected or of another shape, in one phrase; empty if there are none."""
    found = [
        f"{len(info[key])} weights {kind}, such as {sorted(map(str, info[key]))[0]}"
        for key, kind in PROBLEMS.items()
        if info[key] and key not in tolerated
    ]
    return "; ".join(found)


def _check_weight_files(checkpoint: Checkpoint) -> None:
    """Opens each safetensors file of a local checkpoint, so that the broken one is named."""
    if checkpoint.gguf_file or not Path(checkpoint.source).is_dir():
        return
    for file in sorted(Path(checkpoint.source).glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"The weights file {file} is damaged: {reason(error)} Fetch it again.") from error


def dtype_of(config: PreTrainedConfig, dtype: str) -> torch.dtype:
    """The dtype that a name or "auto" means: the latter the checkpoint's own, or float32 if its config names none."""
    chosen: torch.dtype | None = config.dtype if dtype == "auto" else getattr(torch, dtype)
    return chosen or torch.float32


def item_size(config: PreTrainedConfig, dtype: str) -> int:
    """Bytes of a weight of a checkpoint in the dtype that a name or "auto" means."""
    return dtype_of(config, dtype).itemsize


def check_resident(model: PreTrainedModel, name: str) -> None:
    """Refuses a model some of whose weights accelerate loads only while they are used."""
    if missing := [weight for weight, value in model.named_parameters() if value.is_meta]:
        raise SurgeryError(
            f"{len(missing)} weights of {name}, such as {missing[0]}, are not in memory: its device_map leaves them on the CPU or on disk "
            f"until they are used. Load it onto devices that hold all of it, or give its folder and let optimum-prune --offload it."
        )


def check_rotary(model: PreTrainedModel, name: str) -> None:
    """Refuses a model whose rotary frequencies were rounded, since no checkpoint holds them and a reload has them exact."""
    for buffer, value in model.named_buffers():
        if buffer.endswith("inv_freq") and value.dtype in (torch.bfloat16, torch.float16):
            raise SurgeryError(
                f"The rotary frequencies of {name} are rounded to {value.dtype}, as `model.to(dtype)` does, so it computes something "
                f"else than what can be saved. Load it with from_pretrained(..., dtype=...) instead."
            )

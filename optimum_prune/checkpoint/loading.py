"""Checkpoints loaded: one function reads the weights and refuses those that do not fit their config, whoever asks for them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from optimum_prune.anatomy.counts import count_parameters
from optimum_prune.checkpoint.adapters import ADAPTERS, refuse_adapter, refuse_adapter_weights
from optimum_prune.checkpoint.boundary import check_folder
from optimum_prune.checkpoint.described import check_config_of
from optimum_prune.checkpoint.mapping import mapped
from optimum_prune.checkpoint.opening import Checkpoint, meta_model
from optimum_prune.checkpoint.quiet import quietly
from optimum_prune.checkpoint.soundness import check_sound, follow_ties, left_out_layer
from optimum_prune.checkpoint.stored import check_weight_files
from optimum_prune.errors import (
    CheckpointError,
    OptimumPruneError,
    SurgeryError,
    VerificationError,
    found_no_memory,
    reason,
)
from optimum_prune.machine.given_files import is_there, named
from optimum_prune.machine.isolation import FULL
from optimum_prune.machine.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from optimum_prune.machine.mapped_weights import MappedWeights

PROBLEMS = {"missing_keys": "missing", "unexpected_keys": "unexpected", "mismatched_keys": "of another shape"}
"""What transformers calls the weights that do not fit a config, and what we do."""

WHERE = ("revision", "subfolder", "token", "cache_dir", "gguf_file")
"""Arguments of `from_pretrained` that say which config is read."""
MUCH_MORE = 2
"""Times as many weights as there are in its files are described by a config that is not theirs."""


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
    """The model of a checkpoint, in evaluation mode; it was run once, and every weight looked at.

    Args:
        dtype: name of a torch dtype, or "auto" for the checkpoint's own.
        weights: where its weights stay on disk; in memory if not given.

    Raises:
        CheckpointError: weights that cannot be read, are missing or would be lost; or a config that they do not go with.
        NumericalError: weights that are not finite.
    """
    if Path(checkpoint.source).is_dir() and not checkpoint.gguf_file:
        check_weight_files(Path(checkpoint.source), checkpoint.config)
    refusal = Refusal(
        CheckpointError,
        f"The weights of {checkpoint.name} cannot be read",
        f"The checkpoint {checkpoint.name} does not fit its config",
        remedy=" Fetch it again, or mend its config.json.",
        tolerated=("unexpected_keys",),
    )
    checkpoint.check_there()
    arguments = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype), **checkpoint.arguments()}
    if checkpoint.gguf_file:
        arguments |= _dequantized()
    placed = weights is not None
    if weights is None and checkpoint.packed:
        arguments["device_map"], placed = device, True  # packed weights cannot be moved afterwards
    with progress.libraries(), quietly():
        model = _loaded(checkpoint.source, arguments, refusal, weights)
        model = model if placed else model.to(device)
        check_sound(model, checkpoint.name)
    return model


def check_fits(checkpoint: Checkpoint) -> None:
    """Refuses a folder whose files are damaged or hold much less than the config describes, of which random weights would be made.

    Raises:
        CheckpointError: they are, or do.
    """
    folder = Path(checkpoint.source)
    if checkpoint.gguf_file or not folder.is_dir():
        return
    stored = check_weight_files(folder, checkpoint.config)
    if not stored or checkpoint.packed:
        return
    described = count_parameters(meta_model(checkpoint.config, checkpoint.trust_remote_code)).total
    if described > MUCH_MORE * stored:
        raise CheckpointError(
            f"The config of {checkpoint.name} describes {described:,} weights, and its files hold {stored:,}. Fetch it again, or mend its "
            f"config.json."
        )


def load_model(model: str | Path, **arguments: Any) -> PreTrainedModel:
    """The model of a folder or Hub id, also one whose layers differ in shape, in evaluation mode and in its own dtype.

    Args:
        model: the folder, as a run of optimum-prune left it, or a Hub id.
        arguments: for `AutoModelForCausalLM.from_pretrained`; code that comes with the model is run only with `trust_remote_code=True`.

    Raises:
        CheckpointError: weights that cannot be read, or are missing; or files that lie outside of the folder.
    """
    folder = named(model, "model")
    refusal = Refusal(
        CheckpointError, f"The weights of {model} cannot be read", f"The checkpoint {model} does not fit its config"
    )
    arguments = {"dtype": "auto", "trust_remote_code": False, **arguments}
    trusted = bool(arguments["trust_remote_code"])
    if is_there(folder) and folder.is_dir():
        model = folder
        refuse_adapter([name for name in ADAPTERS if (folder / name).exists()], str(model))
        check_folder(folder, code=trusted)
    with quietly():
        check_config_of(str(model), trusted, **{name: arguments[name] for name in WHERE if name in arguments})
        return _loaded(model, arguments, refusal)


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
    with loading.progress.libraries(), quietly():
        model = _loaded(folder, arguments, refusal, loading.weights)
    return model if placed else model.to(loading.device)


def _dequantized() -> dict[str, Any]:
    """What `from_pretrained` takes to unpack the weights of a `.gguf` file; older transformers do so in any case."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _loaded(
    source: str | Path, arguments: Mapping[str, Any], refusal: Refusal, weights: MappedWeights | None = None
) -> PreTrainedModel:
    """The model of a folder or Hub id, in evaluation mode; weights that are missing would be random, and are refused.

    Args:
        arguments: for `from_pretrained`.
        weights: where its weights stay on disk, if the source is a folder; in memory if not given.
    """
    from transformers import AutoModelForCausalLM

    arguments = {"ignore_mismatched_sizes": True, **arguments}  # they are refused below, and named
    try:
        if weights is None:
            model, info = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **arguments)
        else:
            model, info = mapped(Path(source), weights, **arguments)
    except OptimumPruneError as error:
        if isinstance(error, refusal.error):
            raise
        raise refusal.error(f"{refusal.unreadable}: {error}") from error
    except Exception as error:  # transformers raises many kinds
        if found_no_memory(error) or getattr(error, "errno", None) in FULL:
            raise
        raise refusal.error(_why_unreadable(error, source, refusal)) from error
    if problems := _problems(info, refusal.tolerated):
        raise refusal.error(f"{refusal.unfit}: {problems}.{refusal.remedy}")
    refuse_adapter_weights(info["unexpected_keys"], str(source))
    if lost := left_out_layer(model, info["unexpected_keys"]):
        raise refusal.error(
            f"{refusal.unfit}: that has fewer layers than the weights, which would be lost, such as {lost}.{refusal.remedy}"
        )
    follow_ties(model)
    model.config.return_dict = True  # a config may ask for tuples, in which nobody finds the logits
    if weights is not None:
        weights.write_changes(model)  # what transformers made of what is stored
        weights.attach(model)
    loaded: PreTrainedModel = model.eval()
    return loaded


def _why_unreadable(error: Exception, source: str | Path, refusal: Refusal) -> str:
    """What is said of weights that transformers cannot read."""
    if "trust_remote_code" in str(error):
        return (
            f"{source} needs code that comes with it, which is not run unless that is asked for. Read the code, then give "
            f"--trust-remote-code (in Python, trust_remote_code=True)."
        )
    if "Repo id must" in str(error):  # it is the name of a folder that is not there, and of nothing on the Hub
        return f"{refusal.unreadable}: there is no folder of that name. Name one that is there, or put it back."
    if "above report" in str(error):  # which we keep to ourselves
        return f"{refusal.unfit}: some weights cannot be brought into the form that it describes.{refusal.remedy}"
    return f"{refusal.unreadable}: {reason(error)}"


def _problems(info: Mapping[str, Any], tolerated: Collection[str]) -> str:
    """Weights that a load found missing, unexpected or of another shape, in one phrase; empty if there are none."""
    found = []
    for key, kind in PROBLEMS.items():
        if info[key] and key not in tolerated:
            first = sorted(info[key], key=str)[0]
            name, *shapes = first if isinstance(first, tuple) else (first,)
            sizes = " instead of ".join(str(tuple(shape)) for shape in shapes)
            found.append(f"{len(info[key])} weights {kind}, such as {name}{f' ({sizes})' if sizes else ''}")
    return "; ".join(found)


def dtype_of(config: PreTrainedConfig, dtype: str) -> torch.dtype:
    """The dtype that a name or "auto" means: the latter the checkpoint's own, or float32 if its config names none; that may be a text."""
    chosen: torch.dtype | str = (config.dtype if dtype == "auto" else dtype) or torch.float32
    return cast(torch.dtype, getattr(torch, chosen) if isinstance(chosen, str) else chosen)


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

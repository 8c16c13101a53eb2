"""Checkpoints: open, load, save, and verify what was saved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from optimum_prune.errors import CheckpointError, FamilyError, OutputError, VerificationError, reason
from optimum_prune.offload import weight_files

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jaxtyping import Float, Int
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from optimum_prune.offload import Store
    from optimum_prune.progress import Progress

PROCESSORS = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
QUIETLY: dict[str, Any] = {
    "_raise_exceptions_for_gated_repo": False,
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
}
PROBE_WINDOWS, PROBE_TOKENS, PROBE_DECODED = 2, 32, 8
ROUNDING = 4
"""A reloaded model may differ by this many units in the last place of its largest logit; on most machines it does by none."""
CACHE_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.15}
"""How far logits computed with a cache may be from those without, relative to their spread."""


OLDER_NAMES = {
    "gpt_neox": {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"},
    "qwen3_moe": {"num_experts": "num_local_experts"},
}
"""Fields of a config that transformers 4 knows by other names, by model type: its name, and that of transformers 5."""


# Opening: all that can be known without reading a weight


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
        return {"gguf_file": self.gguf_file} if self.gguf_file else {"trust_remote_code": self.trust_remote_code}

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
    where: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {"trust_remote_code": trust_remote_code}
    try:
        plain, _ = PreTrainedConfig.get_config_dict(source, **where)
        if not gguf_file and not quantized:
            _refuse_quantized(plain, model)
        config = AutoConfig.from_pretrained(source, **where)
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


# Loading


def load(
    checkpoint: Checkpoint, dtype: str, device: str, progress: Progress, store: Store | None = None
) -> PreTrainedModel:
    """The model of a checkpoint, in evaluation mode.

    Args:
        dtype: name of a torch dtype, or "auto" for the checkpoint's own.
        store: where its weights stay on disk; in memory if not given.

    Raises:
        CheckpointError: weights that cannot be read, or are missing.
    """
    from transformers import AutoModelForCausalLM, GgufConfig

    _check_weight_files(checkpoint)
    if store is not None:
        return _mapped(Path(checkpoint.source), checkpoint.config, dtype, store, progress)
    arguments = checkpoint.arguments()
    if checkpoint.gguf_file:
        arguments["quantization_config"] = GgufConfig(dequantize=True)
    packed = getattr(checkpoint.config, "quantization_config", None) is not None
    if packed:  # packed weights cannot be moved afterwards
        arguments["device_map"] = device
    try:
        with progress.libraries():
            model, info = AutoModelForCausalLM.from_pretrained(
                checkpoint.source,
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                output_loading_info=True,
                **arguments,
            )
    except Exception as error:
        raise CheckpointError(f"The weights of {checkpoint.name} cannot be read: {reason(error)}") from error
    problems = _key_problems({**info, "unexpected_keys": ()})  # weights that the model has no use for do no harm here
    if problems:
        raise CheckpointError(
            f"The checkpoint {checkpoint.name} is incomplete: {problems}. Those weights would be random; fetch it again."
        )
    return (model if packed else model.to(device)).eval()


def _mapped(folder: Path, config: PreTrainedConfig, dtype: str, store: Store, progress: Progress) -> PreTrainedModel:
    """The model of a checkpoint's folder with its weights mapped from its files.

    Raises:
        CheckpointError: weights that cannot be read, or do not fit the config.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    tensors = {name: tensor for file in weight_files(folder) for name, tensor in store.map(file).items()}
    chosen = dtype_of(config, dtype)
    try:
        with progress.libraries(), torch.device("meta"):
            kind = type(AutoModelForCausalLM.from_config(config))
        with progress.libraries():
            model, info = kind.from_pretrained(
                None, config=config, state_dict=tensors, dtype=chosen, output_loading_info=True
            )
            if (folder / "generation_config.json").is_file():
                model.generation_config = GenerationConfig.from_pretrained(folder)
    except Exception as error:
        raise CheckpointError(f"The weights of {folder} cannot be read: {reason(error)}") from error
    if problems := _key_problems(info):
        raise CheckpointError(f"The checkpoint {folder} does not fit its config: {problems}.")
    model.name_or_path = str(folder)
    store.settle(model)  # what is stored in another dtype, or under older names
    store.attach(model)
    return model.eval()


def load_model(model: str | Path, **arguments: Any) -> PreTrainedModel:
    """The model of a folder or Hub id, also one whose layers differ in shape, in evaluation mode and in its own dtype.

    Args:
        model: the folder, as a run of optimum-prune left it, or a Hub id.
        arguments: for `AutoModelForCausalLM.from_pretrained`.

    Raises:
        CheckpointError: weights that cannot be read, or are missing.
    """
    from transformers import AutoModelForCausalLM

    arguments = {"dtype": "auto", **arguments}
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(model, output_loading_info=True, **arguments)
    except Exception as error:  # transformers raises many kinds
        raise CheckpointError(f"The weights of {model} cannot be read: {reason(error)}") from error
    if problems := _key_problems(info):
        raise CheckpointError(f"The checkpoint {model} does not fit its config: {problems}.")
    return loaded.eval()


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


def _key_problems(info: Mapping[str, Any]) -> str:
    """Weights that a load found missing, unexpected or of another shape, in one phrase; empty if there are none."""
    kinds = {"missing": "missing_keys", "unexpected": "unexpected_keys", "of another shape": "mismatched_keys"}
    found = [
        f"{len(info[key])} weights {kind}, such as {sorted(map(str, info[key]))[0]}"
        for kind, key in kinds.items()
        if info[key]
    ]
    return "; ".join(found)


def dtype_of(config: PreTrainedConfig, dtype: str) -> torch.dtype:
    """A dtype by name, or the checkpoint's own for "auto"."""
    chosen: torch.dtype | None = config.dtype if dtype == "auto" else getattr(torch, dtype)
    return chosen or torch.float32


def item_size(config: PreTrainedConfig, dtype: str) -> int:
    """Bytes of a weight in such a dtype."""
    return dtype_of(config, dtype).itemsize


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


# Saving


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    progress: Progress,
    store: Store | None = None,
) -> None:
    """Writes a checkpoint that stock transformers 5 reads, and 4.57 too.

    Args:
        store: where the weights are, if on disk.

    Raises:
        OutputError: it cannot be written, such as on a full disk.
    """
    try:
        with progress.libraries(), nullcontext() if store is None else store.saving():
            model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        add_older_fields(folder)
    except Exception as error:  # full disks, and configs that transformers refuses to write
        raise OutputError(
            f"The checkpoint cannot be written: {reason(error)} Make room, or name an --output elsewhere."
        ) from error


def add_older_fields(folder: Path) -> None:
    """Adds to the JSON files of a checkpoint what transformers 4 reads where transformers 5 writes something else."""
    _edit_json(folder / "config.json", _with_older_rope)
    if (folder / "tokenizer_config.json").is_file():
        _edit_json(folder / "tokenizer_config.json", _with_older_tokenizer_class)


def _edit_json(file: Path, edit: Any) -> None:
    plain = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(edit(plain), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _with_older_rope(config: dict[str, Any]) -> dict[str, Any]:
    """Adds the fields of transformers 4, which ignores `rope_parameters` and would take a default frequency instead."""
    for text in (config, config.get("text_config") or {}):
        rope = text.get("rope_parameters")
        if rope:
            plain = rope.get("full_attention", rope)
            text["rope_theta"] = plain.get("rope_theta")
            if "partial_rotary_factor" in plain:
                text["partial_rotary_factor"] = plain["partial_rotary_factor"]
            if plain.get("rope_type", "default") != "default":
                text["rope_scaling"] = _older_scaling(plain)
            if "sliding_attention" in rope:
                text["rope_local_base_freq"] = rope["sliding_attention"].get("rope_theta")
        for older, name in OLDER_NAMES.get(text.get("model_type", ""), {}).items():
            if name in text:
                text[older] = text[name]
    return config


def _older_scaling(rope: Mapping[str, Any]) -> dict[str, Any]:
    if rope["rope_type"] == "longrope":  # Phi-3 wants these and no others
        return {"type": "longrope", "short_factor": rope["short_factor"], "long_factor": rope["long_factor"]}
    apart = ("rope_theta", "partial_rotary_factor")
    return {"type": rope["rope_type"], **{name: value for name, value in rope.items() if name not in apart}}


def _with_older_tokenizer_class(config: dict[str, Any]) -> dict[str, Any]:
    if config.get("tokenizer_class") == "TokenizersBackend":  # transformers 5's name for what 4 knows as
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    return config


# Verifying


@dataclass(frozen=True)
class Probe:
    """What a model computes on a few tokens; what is reloaded must compute the same."""

    tokens: Int[Tensor, "windows length"]
    plain: Float[Tensor, "windows decoded vocabulary"]
    """Logits at the last positions, without a cache."""
    cached: Float[Tensor, "windows decoded vocabulary"]
    """The same, decoded token by token with a cache."""


@dataclass(frozen=True)
class Verification:
    """How far a reloaded model is from the one that was saved."""

    max_logit_difference: float
    max_logit_difference_with_cache: float
    cached_against_uncached: float
    """Distance of logits with a cache from those without, relative to the spread of the latter."""


@torch.no_grad()
def probe(model: PreTrainedModel, tokens: Int[Tensor, "windows length"]) -> Probe:
    """What a model computes on the beginning of a few windows, with and without a cache."""
    device = model.get_input_embeddings().weight.device
    few = tokens[:PROBE_WINDOWS, :PROBE_TOKENS].to(device)
    decoded = min(PROBE_DECODED, few.shape[1] - 1)
    plain = model(input_ids=few, use_cache=False).logits[:, -decoded:]
    return Probe(few.cpu(), plain.float().cpu(), torch.cat(list(_decode(model, few, decoded)), dim=1).float().cpu())


def _decode(model: PreTrainedModel, tokens: Tensor, decoded: int) -> Iterator[Tensor]:
    start = tokens.shape[1] - decoded
    cache = model(input_ids=tokens[:, :start], use_cache=True).past_key_values
    for position in range(start, tokens.shape[1]):
        output = model(input_ids=tokens[:, position : position + 1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        yield output.logits


def verify(
    folder: Path,
    expected: Probe,
    dtype: torch.dtype,
    device: str,
    trust_remote_code: bool,
    progress: Progress,
    store: Store | None = None,
) -> tuple[PreTrainedModel, Verification]:
    """Reloads a saved checkpoint with stock transformers and compares its logits with those of the model that was saved.

    Args:
        device: "auto" spreads it over all devices.
        store: where its weights stay on disk; in memory if not given.

    Returns:
        The reloaded model, and how far it is from the saved one.

    Raises:
        VerificationError: keys that are missing, unexpected or of another shape, or logits that differ.
    """
    if store is None:
        model = _reloaded(folder, dtype, device, trust_remote_code, progress)
    else:
        model = _remapped(folder, dtype, store, progress)
    found = probe(model, expected.tokens)
    verification = Verification(
        max_logit_difference=_difference(found.plain, expected.plain),
        max_logit_difference_with_cache=_difference(found.cached, expected.cached),
        cached_against_uncached=((found.cached - found.plain).std() / found.plain.std()).item(),
    )
    _judge(verification, expected, dtype)
    return model, verification


def _reloaded(
    folder: Path, dtype: torch.dtype, device: str, trust_remote_code: bool, progress: Progress
) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    spread = {"device_map": "auto"} if device == "auto" else {}
    try:
        with progress.libraries():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, output_loading_info=True, trust_remote_code=trust_remote_code, **spread
            )
    except Exception as error:
        raise VerificationError(f"The saved checkpoint cannot be loaded again: {reason(error)}") from error
    if problems := _key_problems(info):
        raise VerificationError(f"The saved checkpoint does not fit its config: {problems}.")
    found: PreTrainedModel = model if spread else model.to(device)
    return found.eval()


def _remapped(folder: Path, dtype: torch.dtype, store: Store, progress: Progress) -> PreTrainedModel:
    from transformers import AutoConfig

    try:
        return _mapped(folder, AutoConfig.from_pretrained(folder), str(dtype).removeprefix("torch."), store, progress)
    except CheckpointError as error:
        raise VerificationError(f"The saved checkpoint cannot be loaded again: {error}") from error


def _difference(found: Tensor, expected: Tensor) -> float:
    return (found - expected).abs().max().item()


def _judge(verification: Verification, expected: Probe, dtype: torch.dtype) -> None:
    allowed = ROUNDING * torch.finfo(dtype).eps * expected.plain.abs().max().item()
    worst = max(verification.max_logit_difference, verification.max_logit_difference_with_cache)
    if not worst <= allowed:
        raise VerificationError(
            f"The reloaded model's logits differ from the saved model's by up to {worst:.3g}; {allowed:.3g} would be rounding. This "
            f"architecture does not survive saving in this form; please report it."
        )
    if not verification.cached_against_uncached <= CACHE_TOLERANCE.get(dtype, CACHE_TOLERANCE[torch.bfloat16]):
        raise VerificationError(
            f"With a cache, the reloaded model's logits differ from those without by {verification.cached_against_uncached:.3g} of their "
            f"spread, so generation would go wrong. Please report it with the recipe and the architecture."
        )

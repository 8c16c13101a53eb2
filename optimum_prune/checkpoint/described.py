"""Configs that describe no model that works, as far as that can be known without a weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from optimum_prune.checkpoint.boundary import check_names
from optimum_prune.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST_LAYERS = 10_000
"""More than any model has; what makes one from such a config would not come to an end."""
IMPLEMENTATIONS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
"""Fields that say by what code attention and experts are computed."""


def check_plain(plain: Mapping[str, Any], model: str, trust_remote_code: bool) -> None:
    """Refuses a config by what its file says, before anything is made of it.

    Raises:
        CheckpointError: there is something in it that is not to be.
    """
    if not isinstance(plain, Mapping):
        raise CheckpointError(f"The config of {model} is no JSON object. Fetch it again.")
    check_names(plain, f"{model}'s config.json")
    check_depth(plain, model)
    if not trust_remote_code:
        check_implementations(plain, model)


def check_config_of(model: str, trust_remote_code: bool, **where: Any) -> None:
    """Refuses the config of a folder or Hub id by what its file says; one that cannot be read is for whoever loads it.

    Args:
        where: which of several versions of it, as `from_pretrained` takes it.

    Raises:
        CheckpointError: there is something in it that is not to be.
    """
    from transformers import PreTrainedConfig

    try:
        plain, _ = PreTrainedConfig.get_config_dict(model, **where)
    except Exception:  # transformers raises many kinds
        return
    check_plain(plain, model, trust_remote_code)


def refuse_quantized(config: Mapping[str, Any], model: str) -> None:
    """Refuses the config of packed weights, which cannot be cut.

    Raises:
        CheckpointError: it is one.
    """
    for quantization in (value for key, value in fields(config) if key == "quantization_config" and value is not None):
        method = (
            quantization.get("quant_method", "an unnamed method")
            if isinstance(quantization, Mapping)
            else quantization
        )
        raise CheckpointError(
            f"{model} is already quantized ({method}): its weights are packed, and nothing can be done with them exactly. Take the "
            f"unquantized checkpoint, and quantize last; or if they are not packed, take 'quantization_config' out of its config.json."
        )


def check_depth(plain: Mapping[str, Any], model: str) -> None:
    """Refuses a config that counts more layers than any model has.

    Raises:
        CheckpointError: it does.
    """
    for key, value in fields(plain):
        if "layer" in key and isinstance(value, int) and value > MOST_LAYERS:
            raise CheckpointError(
                f"The config of {model} has '{key}': {value:,}, and no model has so many. Mend its config.json."
            )


def check_implementations(plain: Mapping[str, Any], model: str) -> None:
    """Refuses a config that asks for code of the Hub by its name, which transformers would fetch and run.

    Raises:
        CheckpointError: it does.
    """
    for key, value in fields(plain):
        if key in IMPLEMENTATIONS and any(
            "/" in str(each) for each in (value.values() if isinstance(value, dict) else [value])
        ):
            raise CheckpointError(
                f"The config of {model} asks for '{value}' as its {key}, which is code of the Hub and is not run unless that is asked for. "
                f"Take it out, or give --trust-remote-code."
            )


def fields(plain: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """All fields of a config and of those within it."""
    for key, value in plain.items():
        yield str(key), value
        if isinstance(value, Mapping):
            yield from fields(value)


def check_described(model: PreTrainedModel) -> None:
    """Refuses a model without storage that has no layers, or a weight without values.

    Raises:
        ValueError: its config gives no layers, or a weight no values.
    """
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", 1)
    if layers < 1:
        raise ValueError(f"it has {layers} layers")
    for name, parameter in model.named_parameters():
        if parameter.numel() == 0:
            raise ValueError(f"the weight '{name}' would have the shape {tuple(parameter.shape)}")

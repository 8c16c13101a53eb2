"""Adapters: small changes to a model that are kept beside it. What is pruned would be the model without them."""

from __future__ import annotations

from collections.abc import Iterable

from optimum_prune.errors import CheckpointError, printable

ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
MERGE = "with peft, `AutoPeftModelForCausalLM.from_pretrained(adapter).merge_and_unload().save_pretrained(folder)`"

PARTS = ("lora_A", "lora_B", "lora_embedding_A", "lora_magnitude_vector", "ia3_l", "hada_w1_a", "lokr_w1", "oft_R")
"""Of the names that libraries give the weights of adapters."""


def refuse_adapter(names: Iterable[str], model: str) -> None:
    """Refuses a folder or a model on the Hub by the names of its files, if one is an adapter's, whether or not peft is installed.

    Raises:
        CheckpointError: one is.
    """
    if found := sorted(set(names) & set(ADAPTERS)):
        raise CheckpointError(
            f"{printable(model)} holds an adapter ({found[0]}), which changes a model and would be left out. Merge the two, {MERGE}, and give "
            f"that folder."
        )


def refuse_adapter_weights(names: Iterable[str], model: str) -> None:
    """Refuses weights for which a model has no place, if one is an adapter's.

    Raises:
        CheckpointError: one is.
    """
    if found := sorted(name for name in names if set(name.split(".")) & set(PARTS)):
        raise CheckpointError(
            f"The weights of {printable(model)} hold an adapter ({found[0]}), which changes the model and would be left out. Merge the two, "
            f"{MERGE}, and give that folder."
        )

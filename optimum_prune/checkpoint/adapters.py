"""Adapters: small changes to a model that are kept beside it. What is pruned would be the model without them."""

from __future__ import annotations

from collections.abc import Iterable

from optimum_prune.errors import CheckpointError, printable

ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
MERGE = "with peft, `AutoPeftModelForCausalLM.from_pretrained(adapter).merge_and_unload().save_pretrained(folder)`"


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

"""Models in memory, as a caller may hand them over: taken as they are, freed of what is wrapped around them, or refused with the remedy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from optimum_prune.checkpoint.adapters import MERGE
from optimum_prune.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COMPUTABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of weights with which everything can be computed."""
WRAPPERS = ("DataParallel", "DistributedDataParallel", "OptimizedModule")
"""Classes of torch around a model that has the same weights."""


def taken(model: Any) -> PreTrainedModel:
    """The model that is meant by what a caller hands over.

    Raises:
        CheckpointError: it is none, or none that can be pruned as it is.
    """
    from transformers import PreTrainedConfig, PreTrainedModel

    while type(model).__name__ in WRAPPERS and type(model).__module__.startswith("torch."):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    name = type(model).__name__
    _refuse_adapted(model, name)
    if not isinstance(model, PreTrainedModel):
        raise CheckpointError(
            f"What is given is of the class {name}, which is no model of transformers. Give one as AutoModelForCausalLM.from_pretrained returns it, or the "
            f"name of a folder."
        )
    if not isinstance(model.config, PreTrainedConfig):
        raise CheckpointError(f"{name} has no config, so it cannot be saved. Load it with from_pretrained.")
    _refuse_quantized(model, name)
    _refuse_compiled(model, name)
    _refuse_derived(model, name)
    if any(value.is_inference() for value in model.parameters()):
        raise CheckpointError(
            f"{name} was made within torch.inference_mode(), and its weights cannot be changed any more. Load it outside of that."
        )
    if model.get_output_embeddings() is None or not model.can_generate():
        raise CheckpointError(
            f"{name} predicts no tokens, so nothing says what pruning it would cost. Load it with AutoModelForCausalLM; what it has "
            f"instead of a language model's head can be trained again afterwards."
        )
    _refuse_shared(model, name)
    model.config.return_dict = True  # or what it puts out would be a tuple, in which nobody finds the logits
    return model


def _refuse_adapted(model: Any, name: str) -> None:
    module = isinstance(model, nn.Module)
    attached = bool(getattr(model, "_hf_peft_config_loaded", False)) or type(model).__module__.startswith("peft.")
    attached = attached or (module and "peft_config" in vars(model))
    if attached or (module and any(hasattr(each, "lora_A") for each in model.modules())):
        raise CheckpointError(
            f"{name} has an adapter attached, which is apart from its weights and would not be pruned with them. Merge the two, "
            f"`model = model.merge_and_unload()`, or {MERGE}."
        )


def _refuse_quantized(model: PreTrainedModel, name: str) -> None:
    """Refuses packed weights, whoever packed them, and such as are no tensors of this process alone."""
    settled = (
        getattr(model.config, "quantization_config", None) is not None
        or getattr(model, "hf_quantizer", None) is not None
    )
    packed = next((path for path, value in model.named_parameters() if value.dtype not in COMPUTABLE), "")
    other = next(
        (
            (path, type(value.data).__name__)
            for path, value in model.named_parameters()
            if type(value.data) is not torch.Tensor
        ),
        None,
    )
    swapped = next((path for path, module in model.named_modules() if "quantized" in type(module).__module__), "")
    packed = packed or (swapped and f"{swapped}.weight")
    if settled or packed:
        raise CheckpointError(
            f"{name} is quantized: its weights{f', such as {packed!r},' if packed else ''} are packed and cannot be cut exactly. Load it "
            f"unquantized in bfloat16 or float32, and quantize as a later pass of the recipe."
        )
    if other is not None:
        raise CheckpointError(
            f"The weights of {name}, such as '{other[0]}', are no plain tensors but of the class {other[1]}: quantized, or spread over "
            f"processes. Load it with AutoModelForCausalLM.from_pretrained, without either."
        )


def _refuse_compiled(model: nn.Module, name: str) -> None:
    for path, module in model.named_modules():
        forward = vars(module).get("forward")
        own = type(module).__name__ == "OptimizedModule" or hasattr(forward, "_torchdynamo_orig_callable")
        if own or module._compiled_call_impl is not None:
            raise CheckpointError(
                f"{name} is compiled{f' at {path}' if path else ''}, so it would go on computing what it was before. Prune it first, and "
                f"compile what comes of it."
            )


def _refuse_derived(model: nn.Module, name: str) -> None:
    """Refuses weights that are computed from others, which a cut of them would not change."""
    for path, module in model.named_modules():
        others = [each.rpartition("_")[0] for each in module._parameters if each.endswith(("_orig", "_g"))]
        kept = [each for each in others if hasattr(module, each) and each not in module._parameters]
        if kept or parametrize.is_parametrized(module):
            raise CheckpointError(
                f"The weights of {name} at {path} are computed from others, as weight_norm and the masks of torch.nn.utils.prune do. Make them "
                f"plain weights first, with torch.nn.utils.parametrize.remove_parametrizations or torch.nn.utils.prune.remove."
            )


def _refuse_shared(model: PreTrainedModel, name: str) -> None:
    """Refuses a weight that two modules share, but for embeddings: no checkpoint says that of another."""
    known = {
        id(value)
        for each in (model.get_input_embeddings(), model.get_output_embeddings())
        for value in each.parameters()
    }
    seen: dict[int, str] = {}
    for path, value in model.named_parameters(remove_duplicate=False):
        if id(value) in seen and id(value) not in known:
            raise CheckpointError(
                f"The weights '{seen[id(value)]}' and '{path}' of {name} are one and the same, which no checkpoint can say. Give each module its "
                f"own copy, such as with copy.deepcopy."
            )
        seen[id(value)] = path

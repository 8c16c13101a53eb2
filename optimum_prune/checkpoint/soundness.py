"""Soundness of a loaded model: nothing of its weights was lost, all of them are finite, what it says of ties holds, and it runs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from optimum_prune.checkpoint.caches import cache_of
from optimum_prune.errors import CheckpointError, NumericalError, found_no_memory, reason
from optimum_prune.machine.mapped_weights import ATTRIBUTE, held

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NUMBERED = re.compile(r"^(.*?)\.?(\d+)\.")
PREDICTING = ("num_nextn_predict_layers", "mtp_num_layers", "mtp_num_hidden_layers")
"""Fields that count further layers, behind the last, which guess tokens ahead and which transformers leaves out."""


def left_out_layer(model: PreTrainedModel, unexpected: Iterable[str]) -> str:
    """The first weight of a layer that the checkpoint has and the model has no place for; empty if there is none.

    Args:
        unexpected: the weights that the model has no place for, by their names in the checkpoint.
    """
    lists = {path: len(module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    text = model.config.get_text_config()
    ahead = max(getattr(text, name, None) or 0 for name in PREDICTING)
    for name in sorted(unexpected):
        match = NUMBERED.match(name)
        path = _alike(match[1], lists) if match else ""
        if match and path and int(match[2]) >= lists[path] + ahead:
            return name
    return ""


def _alike(path: str, paths: Iterable[str]) -> str:
    """Of several paths the one whose end is most like that of another; empty if none ends in the same name."""
    names = path.split(".")[::-1]

    def common(other: str) -> int:
        pairs = zip(names, other.split(".")[::-1], strict=False)
        return next((count for count, (mine, its) in enumerate(pairs) if mine != its), len(names))

    found = max(paths, key=common, default="")
    return found if found and common(found) else ""


def follow_ties(model: PreTrainedModel) -> None:
    """Makes the config say whether the output head is the embedding, as it is; where transformers ties nothing, it leaves that open."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    mine, its = getattr(embedding, "weight", None), getattr(head, "weight", None)
    if mine is None or its is None or mine.is_meta or its.is_meta:
        return
    for config in {id(each): each for each in (model.config, model.config.get_text_config())}.values():
        said = getattr(config, "tie_word_embeddings", None)
        if said is False and mine is its:
            config.tie_word_embeddings = True
        elif said and mine is not its and not (mine.shape == its.shape and torch.equal(mine.cpu(), its.cpu())):
            config.tie_word_embeddings = False


def check_finite(module: nn.Module, name: str, prefix: str = "", *, recurse: bool = True) -> None:
    """Refuses weights that are not finite; costs one look at each.

    Args:
        name: of the model.
        prefix: of the module's path in the model.

    Raises:
        NumericalError: one is not.
    """
    for path, value in _stored(module, recurse=recurse):
        if not is_finite(value):
            dtype = str(value.dtype).removeprefix("torch.")
            remedy = "Compute in bfloat16 or float32, or fetch" if dtype == "float16" else "Fetch"
            raise NumericalError(
                f"The weight '{prefix}{path}' of {name} has values in {dtype} that are no finite numbers. {remedy} the checkpoint again."
            )


def _stored(module: nn.Module, *, recurse: bool) -> Iterator[tuple[str, Tensor]]:
    """What a checkpoint holds of a module, by its path from there."""
    yield from module.named_parameters(recurse=recurse)
    for path, each in module.named_modules() if recurse else [("", module)]:
        for name, buffer in each.named_buffers(recurse=False):
            if name not in each._non_persistent_buffers_set:
                yield f"{path}.{name}".lstrip("."), buffer


def is_finite(value: Tensor) -> bool:
    """Whether a tensor of floating-point numbers has no NaN and no infinity; what is packed or lies nowhere is taken to have none."""
    data = value.detach()
    if not data.is_floating_point() or data.is_meta or data.numel() == 0 or type(data) is not Tensor:
        return True
    if data.dtype.itemsize == 1:
        data = data.float()
    return bool(torch.stack(data.aminmax()).isfinite().all())


@torch.no_grad()
def check_sound(model: PreTrainedModel, name: str) -> None:
    """Refuses a loaded model whose weights are not finite, or that cannot run on two tokens.

    The weights of a layer are looked at right before it runs, so that those that lie on disk are read once for both.

    Raises:
        NumericalError: a weight is not finite.
        CheckpointError: it does not run.
    """
    paths = {module: path for path, module in model.named_modules()}
    layers = {layer: paths[layer] for module in paths if isinstance(module, nn.ModuleList) for layer in module}
    inside = {id(module) for layer in layers for module in layer.modules()}
    for module, path in paths.items():
        if id(module) not in inside:
            check_finite(module, name, f"{path}." if path else "", recurse=False)

    def look(layer: nn.Module, *_: object) -> None:
        if layer in layers:
            check_finite(layer, name, f"{layers.pop(layer)}.")

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(look).remove)
        _run(model, name)
    for layer in list(layers):  # of what sees or hears
        with held(layer):
            look(layer)


def _run(model: PreTrainedModel, name: str) -> None:
    """Runs a model on two tokens and, if that reads no weights from disk again, on a third with a cache."""
    device = model.get_input_embeddings().weight.device
    tokens = torch.zeros((1, 2), dtype=torch.long, device=device)
    try:
        output = model(input_ids=tokens, use_cache=True)
        if not any(hasattr(module, ATTRIBUTE) for module in model.modules()):
            model(input_ids=tokens[:, :1], use_cache=True, **cache_of(output, model))
    except NumericalError:
        raise
    except Exception as error:  # whatever an architecture makes of sizes that do not go together
        if found_no_memory(error):
            raise
        raise CheckpointError(
            f"{name} does not run in {str(model.dtype).removeprefix('torch.')} on {device}: {type(error).__name__}: {reason(error)} Mend its "
            f"config.json, or choose another dtype or device."
        ) from error

"""Models whose weights stay in files, as transformers loads and saves them: what it converts is put in files too, one after the other.

Many checkpoints hold other tensors than the model does, such as one for each of many matrices that the model has in a single parameter.
transformers makes the one of the other, all of them before it is done, and so would hold a model in memory that is to stay on disk.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from optimum_prune.checkpoint.generation import generation_config_of
from optimum_prune.checkpoint.opening import meta_model
from optimum_prune.machine.isolation import environment_kept
from optimum_prune.machine.tensor_files import weight_files, write

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from optimum_prune.machine.mapped_weights import MappedWeights

AT_ONCE = 2**26
"""Bytes of converted parameters that are waited for, to be written to one file."""
ONE_BY_ONE = "HF_DEACTIVATE_ASYNC_LOAD"
"""The variable of the environment that lets transformers read and cast each tensor when its turn comes, instead of all ahead."""
LOADED = "_is_hf_initialized"
"""The attribute by which transformers marks a parameter that has its value from the checkpoint; what it makes itself, it fills later."""


def mapped(
    folder: Path, weights: MappedWeights, dtype: torch.dtype | str, trust_remote_code: bool, **arguments: Any
) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """The model of a folder with its weights mapped from its files, and what transformers says of their names and shapes.

    What it converts lies in files of `weights` instead, but for the last of it.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    files = weight_files(folder, getattr(config, "transformers_weights", None))
    tensors = {name: tensor for file in files for name, tensor in weights.map(file).items()}
    if dtype == "auto":
        first = next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), torch.float32)
        dtype = config.dtype or first
    kind = type(meta_model(config, trust_remote_code))
    with _moving_what_is_converted(weights):
        model, info = kind.from_pretrained(
            None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True, **arguments
        )
    if model.can_generate():
        model.generation_config = generation_config_of(folder)
    model.name_or_path = str(folder)
    return model, info


@contextmanager
def _moving_what_is_converted(weights: MappedWeights) -> Iterator[None]:
    """Moves parameters that transformers loads within a `with` to files, if they lie in memory, as soon as there are some of them."""
    waiting: dict[int, nn.Parameter] = {}

    def take(_: nn.Module, __: str, parameter: nn.Parameter | None) -> None:
        if parameter is None or not getattr(parameter, LOADED, False) or not weights.lies_in_memory(parameter):
            return
        waiting[id(parameter)] = parameter
        if sum(each.nbytes for each in waiting.values()) >= AT_ONCE:
            weights.move(list(waiting.values()))
            waiting.clear()

    hook = register_module_parameter_registration_hook(take)
    try:
        with environment_kept():
            os.environ[ONE_BY_ONE] = "1"
            yield
    finally:
        hook.remove()


@contextmanager
def saving_mapped(weights: MappedWeights) -> Iterator[None]:
    """Lets transformers save a mapped model tensor by tensor within a `with`, each given back when it is written."""
    from transformers import modeling_utils

    def save(tensors: Mapping[str, Tensor], file: Any, metadata: Mapping[str, str] | None = None) -> None:
        write(tensors, Path(file), metadata, lambda tensor: weights.check([tensor]), weights.let_go)

    with ExitStack() as stack:
        stack.enter_context(_replaced(modeling_utils, "safe_save_file", save))
        try:
            from transformers.core_model_loading import WeightConverter
        except ImportError:  # of a version that converts nothing, or elsewhere
            pass
        else:
            stack.enter_context(_replaced(WeightConverter, "convert", _in_files(WeightConverter.convert, weights)))
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


_Converted = dict[str, Tensor | list[Tensor]]
"""By names; a list holds one."""


def _in_files(convert: Callable[..., _Converted], weights: MappedWeights) -> Callable[..., _Converted]:
    """The method of transformers that makes of some of a model's weights what a checkpoint has, so that no result lies in memory."""

    def converting(converter: Any, *arguments: Any, **named: Any) -> _Converted:
        given = dict(converter.collected_tensors)
        try:
            with _Uncopied():
                made = convert(converter, *arguments, **named)
        except RuntimeError:  # it goes on with what it made contiguous
            converter.collected_tensors.update(given)
            made = convert(converter, *arguments, **named)
        found = {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
        copied = {
            name: value for name, value in found.items() if weights.lies_in_memory(value) or not value.is_contiguous()
        }
        kept = weights.keep(list(copied.values())) if copied else []
        return {**found, **dict(zip(copied, kept, strict=True))}

    return converting


class _Uncopied(TorchFunctionMode):
    """A `with` in which tensors are not copied to be contiguous: parts of a mapped tensor stay where it lies."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func is Tensor.contiguous else func(*args, **(kwargs or {}))

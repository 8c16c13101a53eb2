"""torchao: linear layers with weights in 8 bits, and if asked for activations in 8 bits too, in a stock checkpoint; or, on a GPU, 2:4
zeros that its sparse tensor cores pass over.

The weights of a row, or of a group in it, share one scale: the largest magnitude is 127. Activations are rounded when the model
runs, token by token, so nothing is calibrated. Embeddings and output stay as they are.

Of zeros nothing is saved: no checkpoint format holds torchao's packed weights. The checkpoint stays as it is, and `sparsify_` packs it
once it is loaded, as here before it is compared and measured.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from optimum_prune import (
    CheckpointSpec,
    FolderPass,
    Job,
    Runtime,
    Stage,
    hookimpl,
    load_model,
    open_in_transformers,
    option,
)
from optimum_prune.checkpoint.opening import length_limit
from optimum_prune.errors import PassError, RecipeError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn
    from transformers import PreTrainedModel

WEIGHT_ONLY, DYNAMIC, SPARSE = "int8_weight_only", "int8_dynamic_activation_int8_weight", "semi_sparse_weight"
SPARSE_CORES = (8, 0)
"""The compute capability from which NVIDIA's GPUs multiply 2:4 weights."""
TIMED, REPEATS = (8, 512), 10
"""Windows and tokens of each that a forward pass is timed on, and how often."""


@dataclass(frozen=True, kw_only=True)
class TorchAo(FolderPass):
    """Weights in 8 bits, and activations too if asked for, without text (torchao); 2:4 zeros on a GPU; reloads in stock transformers."""

    name: ClassVar[str] = "torchao"
    stage = Stage.QUANTIZE
    requires: ClassVar[Mapping[str, str]] = {"torchao": "torchao>=0.17"}
    takes_heterogeneous: ClassVar[bool] = True
    takes_experts: ClassVar[bool] = False
    usual_tolerance: ClassVar[float] = 0.25
    quant_type: Literal["int8_weight_only", "int8_dynamic_activation_int8_weight", "semi_sparse_weight"] = option(
        "Round weights only, or activations too when the model runs; or round nothing, and run 2:4 zeros on a GPU's sparse cores.",
        WEIGHT_ONLY,
    )
    group_size: int | None = option(
        "Weights of a row that share a scale, only with int8_weight_only; all of them if not given.", None, at_least=1
    )
    reduce_range: bool = option(
        "Use 7 of the 8 bits, only with dynamic activations, for processors without VNNI.", False
    )

    def __post_init__(self) -> None:
        """Refuses combinations that torchao does not have."""
        super().__post_init__()
        if self.group_size is not None and self.quant_type != WEIGHT_ONLY:
            has = "has one scale for each row" if self.quant_type == DYNAMIC else "rounds no weights"
            raise RecipeError(
                f"torchao has a group_size of {self.group_size}, but {self.quant_type} {has}. Leave group_size out, or "
                f"give quant_type {WEIGHT_ONLY}."
            )
        if self.reduce_range and self.quant_type != DYNAMIC:
            raise RecipeError(
                f"torchao has reduce_range, but {self.quant_type} rounds no activations, so nothing overflows. Leave reduce_range out, "
                f"or give quant_type {DYNAMIC}."
            )

    @property
    def unpacks(self) -> bool:
        """Activations that are rounded too are no matter of weights."""
        return self.quant_type != DYNAMIC

    def check(self, spec: CheckpointSpec) -> None:
        """Groups must divide the widths, and sparse cores must be there."""
        spec.check_groups(self.group_size or 0, self.name)
        if self.quant_type == SPARSE and not (
            torch.cuda.is_available() and torch.cuda.get_device_capability() >= SPARSE_CORES
        ):
            raise RecipeError(
                f"torchao's {SPARSE} needs an NVIDIA GPU of compute capability {'.'.join(map(str, SPARSE_CORES))} or newer, and torch sees "
                f"none here. Leave the pass out: a checkpoint with 2:4 zeros is complete without it, and can be packed where it runs."
            )

    def convert(self, job: Job) -> Mapping[str, Any]:
        """Quantizes each weight as it is read, and saves the model; or copies it, and measures its packed weights."""
        if self.quant_type == SPARSE:
            return self._measured(job)
        from transformers import TorchAoConfig

        with job.progress.libraries():
            model = load_model(
                job.source,
                device_map=job.device,
                quantization_config=TorchAoConfig(self._config()),
                trust_remote_code=job.trust_remote_code,
            )
            count = _quantized(model)
            if not count:
                raise PassError("The pass 'torchao' found no linear layer in the model. Use another quantizer.")
            model.save_pretrained(job.target)
        return {"quantized_layers": count}

    def _config(self) -> Any:
        """Inductor's settings, which belong to the process, are left alone."""
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, PerGroup, PerRow

        if self.quant_type == DYNAMIC:
            return Int8DynamicActivationInt8WeightConfig(reduce_range=self.reduce_range, set_inductor_config=False)
        granularity = PerRow() if self.group_size is None else PerGroup(self.group_size)
        return Int8WeightOnlyConfig(granularity=granularity, set_inductor_config=False)

    def _measured(self, job: Job) -> Mapping[str, Any]:
        """Of the checkpoint, which is copied as it is: what packed weights take and how fast they are, beside those with zeros."""
        if torch.device(job.device).type != "cuda":
            raise PassError(
                f"torchao's {SPARSE} runs on an NVIDIA GPU, and the run is on {job.device}. Give --device cuda, or leave the pass out."
            )
        runtime = open_in_transformers(job.source, job.device, trust_remote_code=job.trust_remote_code)
        before = _bytes(runtime.model), _tokens_per_second(runtime.model)
        layers = _pack(runtime.model)
        after = _bytes(runtime.model), _tokens_per_second(runtime.model)
        shutil.copytree(job.source, job.target, dirs_exist_ok=True)
        return {
            "layers_with_packed_zeros": layers,
            "bytes_on_the_gpu_with_zeros": before[0],
            "bytes_on_the_gpu_packed": after[0],
            "tokens_per_second_with_zeros": round(before[1]),
            "tokens_per_second_packed": round(after[1]),
        }

    def open(self, folder: Path, device: str) -> Runtime:
        """The checkpoint as stock transformers reads it; its 2:4 zeros packed if they are what is asked for."""
        runtime = open_in_transformers(folder, device)
        if self.quant_type == SPARSE:
            _pack(runtime.model)
        return runtime


def is_semi_structured(weight: Tensor) -> bool:
    """Whether of every four consecutive inputs of a row at least two have weight zero."""
    inputs = weight.shape[1]
    return inputs % 4 == 0 and bool(((weight.detach() != 0).view(-1, 4).sum(-1) <= 2).all())


def _pack(model: nn.Module) -> int:
    """Packs the weights of a model's linear layers that have 2:4 zeros, and returns how many.

    Raises:
        PassError: there is none.
    """
    from torchao.sparsity import semi_sparse_weight, sparsify_

    names = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and is_semi_structured(module.weight)
    }
    if not names:
        raise PassError(
            f"The pass 'torchao' with {SPARSE} found no linear layer with 2:4 zeros. Put wanda or sparsegpt with pattern: \"2:4\" in front."
        )
    sparsify_(model, semi_sparse_weight(), lambda _, name: name in names)
    return len(names)


def _bytes(model: nn.Module) -> int:
    """What the parameters take, those packed as they are packed."""
    from torch.sparse import SparseSemiStructuredTensor

    parts = [
        part
        for weight in model.parameters()
        for part in (
            (weight.packed, weight.meta, weight.packed_t, weight.meta_t)
            if isinstance(weight, SparseSemiStructuredTensor)
            else (weight,)
        )
        if part is not None
    ]
    storages = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts}
    return sum(storages.values())


@torch.no_grad()
def _tokens_per_second(model: PreTrainedModel) -> float:
    """Of forward passes over windows of any tokens, the first of which is not counted."""
    windows, length = TIMED
    length = min(length, length_limit(model.config.get_text_config()))
    tokens = (
        torch.arange(windows * length, device=model.device).view(windows, length)
        % model.get_input_embeddings().weight.shape[0]
    )
    model(input_ids=tokens, use_cache=False)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(REPEATS):
        model(input_ids=tokens, use_cache=False)
    torch.cuda.synchronize()
    return float(REPEATS * tokens.numel() / (time.perf_counter() - began))


def _quantized(model: Any) -> int:
    from torchao.utils import TorchAOBaseTensor

    return sum(isinstance(parameter, TorchAOBaseTensor) for parameter in model.parameters())


@hookimpl
def passes() -> Iterator[type[FolderPass]]:
    """What this plugin adds."""
    yield TorchAo

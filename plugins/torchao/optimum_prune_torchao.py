"""torchao: linear layers with weights in 8 bits, and if asked for activations in 8 bits too, in a stock checkpoint.

The weights of a row, or of a group in it, share one scale: the largest magnitude is 127. Activations are rounded when the model
runs, token by token, so nothing is calibrated. Embeddings and output stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

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
from optimum_prune.errors import PassError, RecipeError

if TYPE_CHECKING:
    from pathlib import Path

WEIGHT_ONLY, DYNAMIC = "int8_weight_only", "int8_dynamic_activation_int8_weight"


@dataclass(frozen=True, kw_only=True)
class TorchAo(FolderPass):
    """Weights in 8 bits, and activations too if asked for, without text (torchao); reloads in stock transformers."""

    name: ClassVar[str] = "torchao"
    stage = Stage.QUANTIZE
    requires: ClassVar[Mapping[str, str]] = {"torchao": "torchao>=0.17"}
    takes_heterogeneous: ClassVar[bool] = True
    takes_experts: ClassVar[bool] = False
    usual_tolerance: ClassVar[float] = 0.25
    quant_type: Literal["int8_weight_only", "int8_dynamic_activation_int8_weight"] = option(
        "Round weights only, or activations too when the model runs.", WEIGHT_ONLY
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
        if self.group_size is not None and self.quant_type == DYNAMIC:
            raise RecipeError(
                f"torchao has a group_size of {self.group_size}, but {DYNAMIC} has one scale for each row. Leave group_size out, or "
                f"give quant_type {WEIGHT_ONLY}."
            )
        if self.reduce_range and self.quant_type == WEIGHT_ONLY:
            raise RecipeError(
                f"torchao has reduce_range, but {WEIGHT_ONLY} rounds no activations, so nothing overflows. Leave reduce_range out, or "
                f"give quant_type {DYNAMIC}."
            )

    @property
    def unpacks(self) -> bool:
        """Activations that are rounded too are no matter of weights."""
        return self.quant_type == WEIGHT_ONLY

    def check(self, spec: CheckpointSpec) -> None:
        """Groups must divide the widths."""
        spec.check_groups(self.group_size or 0, self.name)

    def convert(self, job: Job) -> Mapping[str, Any]:
        """Quantizes each weight as it is read, and saves the model."""
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

    def open(self, folder: Path, device: str) -> Runtime:
        """The checkpoint as stock transformers reads it."""
        return open_in_transformers(folder, device)


def _quantized(model: Any) -> int:
    from torchao.utils import TorchAOBaseTensor

    return sum(isinstance(parameter, TorchAOBaseTensor) for parameter in model.parameters())


@hookimpl
def passes() -> Iterator[type[FolderPass]]:
    """What this plugin adds."""
    yield TorchAo

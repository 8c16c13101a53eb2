"""quanto, Optimum's own quantizer: linear layers with weights in 8 or 4 bits, whose activations are not rounded.

With 8 bits a row of weights shares a scale; with 4 bits a group of 128, 96, 64 or 32 does, the largest that divides the row.
The checkpoint is quanto's: `optimum.quanto.QuantizedModelForCausalLM.from_pretrained` reads it, and stock transformers does not.
`quanto_qmap.json` in its folder tells it from others.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from optimum_prune import (
    CheckpointSpec,
    FolderPass,
    Job,
    Runtime,
    Stage,
    TransformersRuntime,
    hookimpl,
    load_model,
    option,
)
from optimum_prune.errors import RecipeError

if TYPE_CHECKING:
    from pathlib import Path

SMALLEST_GROUP = 32
KERNEL = 16
"""Bytes at whose multiples a row of int8 weights must begin: torch's kernel for these and bfloat16 ends the process otherwise."""
ALIGNMENT = 64


@dataclass(frozen=True, kw_only=True)
class Quanto(FolderPass):
    """Weights in 8 or 4 bits, without text (Optimum's quanto); only quanto itself reads the checkpoint."""

    name: ClassVar[str] = "quanto"
    stage = Stage.QUANTIZE
    requires: ClassVar[Mapping[str, str]] = {"optimum.quanto": "optimum-quanto>=0.2.7"}
    takes_heterogeneous: ClassVar[bool] = True
    takes_experts: ClassVar[bool] = False
    weights: Literal["qint8", "qint4"] = option("What a weight is rounded to.", "qint8")
    exclude: tuple[str, ...] = option("Modules to leave as they are, as patterns of their names.", ("lm_head",))

    @property
    def usual_tolerance(self) -> float:
        """The tolerance by the bits of a weight: about twice what a small real model showed."""
        return 0.1 if self.weights == "qint8" else 0.8

    def check(self, spec: CheckpointSpec) -> None:
        """Rows must be of whole groups, or else quanto would give each a single scale; and kernels need aligned rows."""
        size, why = (
            (KERNEL, "torch's kernel needs") if self.weights == "qint8" else (SMALLEST_GROUP, "its groups need")
        )
        for what, width in spec.widths().items():
            if width % size:
                raise RecipeError(
                    f"quanto has weights {self.weights}, and the {what} of the model will be {width}, where {why} a multiple of {size}. "
                    f"Prune with `multiple_of: {size}`, or use another quantizer."
                )

    def convert(self, job: Job) -> Mapping[str, Any]:
        """Quantizes the model in place, layer by layer."""
        from optimum.quanto import QuantizedModelForCausalLM, quantization_map

        with job.progress.libraries():
            model = load_model(job.source, device_map=job.device, trust_remote_code=job.trust_remote_code)
            quantized = QuantizedModelForCausalLM.quantize(model, weights=self.weights, exclude=list(self.exclude))
            quantized.save_pretrained(job.target)
        (job.target / "README.md").unlink()  # of the Hub's library, with nothing in it
        for file in job.target.glob("*.safetensors"):
            align(file)
        return {"quantized_layers": len(quantization_map(model))}

    def open(self, folder: Path, device: str) -> Runtime:
        """The checkpoint as quanto reads it, but for how weights of 4 bits are unpacked."""
        from optimum.quanto import QuantizedModelForCausalLM

        unpack_in_torch()
        return TransformersRuntime(QuantizedModelForCausalLM.from_pretrained(folder).to(device))


def unpack_in_torch() -> None:
    """Lets quanto unpack weights of 4 bits by torch for the rest of the process, to the same values.

    It would compile an extension into its own package, which takes minutes and a compiler, and waits for ever on a lock that a
    process left behind which was ended meanwhile.
    """
    from optimum.quanto.library.extensions.cpp import ext

    if ext._lib is None:
        ext._lib = SimpleNamespace(unpack=_unpack)


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """The values in each byte, the lowest bits first, one after the other along the rows."""
    return torch.cat([packed >> shift & (2**bits - 1) for shift in range(0, 8, bits)])


def align(file: Path) -> None:
    """Moves the packed weights in a file to a multiple of 64 bytes, by spaces behind its header, as the format allows.

    They are used where the file is mapped into memory. Wherever they happened to begin, torch's kernel would end the process.
    """
    with file.open("rb") as source:
        length = int.from_bytes(source.read(8), "little")
        header = source.read(length)
        tensors = [tensor for name, tensor in json.loads(header).items() if name != "__metadata__"]
        packed = [tensor["data_offsets"][0] for tensor in tensors if tensor["dtype"] in ("I8", "U8")]
        spaces = -(8 + length + min(packed, default=0)) % ALIGNMENT
        moved = file.with_suffix(".moved")
        with moved.open("wb") as target:
            target.write((length + spaces).to_bytes(8, "little") + header + b" " * spaces)
            shutil.copyfileobj(source, target)
    moved.replace(file)


@hookimpl
def passes() -> Iterator[type[FolderPass]]:
    """What this plugin adds."""
    yield Quanto

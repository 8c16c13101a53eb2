"""bitsandbytes: LLM.int8 (Dettmers and others, 2022, arXiv 2208.07339) and nf4 or fp4 (2023, arXiv 2305.14314).

With 8 bits, a row of weights shares a scale, activations are rounded too, and channels whose activations exceed the threshold are
computed in 16 bits. With 4 bits, 64 weights share a scale, and activations are not rounded. Embeddings and output stay as they are.
"""

from __future__ import annotations

import logging
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


@dataclass(frozen=True, kw_only=True)
class BitsAndBytes(FolderPass):
    """LLM.int8, or weights in nf4 or fp4, without text (bitsandbytes); reloads in stock transformers."""

    name: ClassVar[str] = "bitsandbytes"
    stage = Stage.QUANTIZE
    requires: ClassVar[Mapping[str, str]] = {"bitsandbytes": "bitsandbytes>=0.49"}
    takes_heterogeneous: ClassVar[bool] = True
    takes_experts: ClassVar[bool] = False
    bits: int = option("Bits of a weight.", 8, one_of=(4, 8))
    quant_type: Literal["nf4", "fp4"] = option("Which 16 values a weight of 4 bits can have.", "nf4")
    use_double_quant: bool = option("With 4 bits: quantize the scales too.", False)
    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        "With 4 bits: what products are computed in; the checkpoint's dtype if not given.", None
    )
    threshold: float = option(
        "With 8 bits: channels with activations beyond this are not rounded; 0 rounds all.", 6.0, at_least=0
    )

    def __post_init__(self) -> None:
        """Refuses what bitsandbytes does not have."""
        super().__post_init__()
        if self.bits == 8 and (self.use_double_quant or self.compute_dtype or self.quant_type != "nf4"):
            raise RecipeError(
                "bitsandbytes has 8 bits, and use_double_quant, compute_dtype and quant_type are for 4. Give `bits: 4`, or leave them out."
            )

    @property
    def usual_tolerance(self) -> float:
        """The tolerance by the bits of a weight: about twice what a small real model showed."""
        return 0.2 if self.bits == 8 else 0.7

    def check(self, spec: CheckpointSpec) -> None:
        """It reads every shape: blocks of 64 weights run on from row to row."""

    def convert(self, job: Job) -> Mapping[str, Any]:
        """Quantizes each weight as it is read, and saves the model before it ever runs.

        On some processors the first run packs weights of 4 bits anew, for that processor. Saved after that, they would be read
        back in the wrong order.
        """
        from bitsandbytes.nn import Linear4bit, Linear8bitLt

        with job.progress.libraries():
            model = load_model(
                job.source,
                device_map=job.device,
                quantization_config=self._config(job.source, job.trust_remote_code),
                trust_remote_code=job.trust_remote_code,
            )
            count = sum(isinstance(module, (Linear4bit, Linear8bitLt)) for module in model.modules())
            if not count:
                raise PassError("The pass 'bitsandbytes' found no linear layer in the model. Use another quantizer.")
            model.save_pretrained(job.target)
        return {"quantized_layers": count}

    def _config(self, source: Path, trust_remote_code: bool) -> Any:
        from transformers import AutoConfig, BitsAndBytesConfig

        if self.bits == 8:
            return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=self.threshold)
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.quant_type,
            bnb_4bit_use_double_quant=self.use_double_quant,
            bnb_4bit_compute_dtype=self.compute_dtype or config.dtype,
        )

    def open(self, folder: Path, device: str) -> Runtime:
        """The checkpoint as stock transformers reads it.

        For the rest of the process, bitsandbytes no longer says at every product that it casts inputs to 16 bits.
        """
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return open_in_transformers(folder, device)


@hookimpl
def passes() -> Iterator[type[FolderPass]]:
    """What this plugin adds."""
    yield BitsAndBytes

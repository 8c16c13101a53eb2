"""GPTQ (Frantar and others, 2023, arXiv 2210.17323): weights in 2 to 8 bits, by gptqmodel through Optimum's quantizer.

The linear layers inside decoder layers are rounded one input channel at a time; the channels that are still to come make up for
the error, by the second moments of the layer's inputs on the recipe's windows. Embeddings and output stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

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
from optimum_prune.errors import RecipeError
from optimum_prune.machine.isolation import isolated
from optimum_prune.passes.folder import tolerance_by_bits

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

LIBRARY = "gptqmodel"
"""The library that quantizes. Importing it changes the process, and so do the libraries that it imports."""
PACKED = 32
"""Channels that are packed together."""


@dataclass(frozen=True, kw_only=True)
class Gptq(FolderPass):
    """GPTQ: weights of 2 to 8 bits whose errors make up for each other on the recipe's text (gptqmodel)."""

    name: ClassVar[str] = "gptq"
    stage = Stage.QUANTIZE
    requires: ClassVar[Mapping[str, str]] = {LIBRARY: "gptqmodel>=7.2"}
    takes_heterogeneous: ClassVar[bool] = True
    takes_experts: ClassVar[bool] = False
    bits: int = option("Bits of a weight.", 4, one_of=(2, 3, 4, 8))
    group_size: int = option(
        "Input channels that share a scale; -1 means all of them.", 64, one_of=(-1, 32, 64, 128, 256, 512, 1024)
    )
    sym: bool = option("Whether the range of a group is symmetric about zero; older runtimes read no other.", True)
    desc_act: bool = option(
        "Round the channels with the largest activations first; some runtimes are slower with it.", False
    )
    act_group_aware: bool = option("Do so group by group, which no runtime notices; not with desc_act.", True)
    damp_percent: float = option(
        "Damping of the second moments, relative to their mean diagonal.", 0.1, above=0, below=1
    )
    mse: float = option(
        "Shrink ranges to where the error to this power is least, such as 2.4; 0 takes them whole.", 0.0, at_least=0
    )
    true_sequential: bool = option(
        "Quantize each linear layer on inputs that the quantized ones before it give.", True
    )

    @property
    def usual_tolerance(self) -> float:
        """The tolerance by the bits of a weight."""
        return tolerance_by_bits(self.bits)

    def check(self, spec: CheckpointSpec) -> None:
        """Groups must divide the widths, and what is packed together, 32 channels, the widths and the keys."""
        if spec.config.model_type == "gpt2":
            raise RecipeError(
                "'gptq' was asked to quantize GPT-2, whose linear layers cannot be read again. Leave it out."
            )
        spec.check_groups(self.group_size, self.name)
        config, layer = spec.text_config, spec.shape.layers[0]
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = layer.units("heads") or getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        for what, width in {**spec.widths(), "width of keys": heads * size}.items():
            if width % PACKED:
                raise RecipeError(
                    f"'gptq' packs {PACKED} channels together, and the {what} of the model will be {width}, which is no multiple of that. "
                    f"Prune to multiples of {PACKED}, or leave 'gptq' out."
                )

    def convert(self, job: Job) -> Mapping[str, Any]:
        """Quantizes the model in place, one decoder layer after the other."""
        with isolated(LIBRARY), job.progress.libraries():
            model = load_model(job.source, device_map=job.device, trust_remote_code=job.trust_remote_code)
            quantizer = self._quantizer(model, job)
            with _bars(job.progress.visible):
                quantizer.quantize_model(model)
            quantizer.dataset = None  # it would be written into the config
            # What `save` makes of the weights, but does not say in the config.
            format = "gptq" if self.sym else "gptq_v2"
            model.config.quantization_config = {**quantizer.to_dict(), "format": format}
            quantizer.save(model, str(job.target))
        return {"windows": len(job.calibration.tokens), "tokens": int(job.calibration.mask.sum())}

    def _quantizer(self, model: PreTrainedModel, job: Job) -> Any:
        from optimum.gptq import GPTQQuantizer

        types = getattr(model.config.get_text_config(), "layer_types", None) or ["attention"]
        quantizer = GPTQQuantizer(
            bits=self.bits,
            dataset=list(job.examples()),
            group_size=self.group_size,
            damp_percent=self.damp_percent,
            desc_act=self.desc_act,
            act_group_aware=self.act_group_aware and not self.desc_act and self.group_size > 0,
            sym=self.sym,
            true_sequential=self.true_sequential,
            # Otherwise every layer would get the attention mask and the rotary embedding of the first.
            cache_block_outputs=len(set(types)) == 1,
        )
        quantizer.quantizeConfig.mse = self.mse
        return quantizer

    def open(self, folder: Path, device: str) -> Runtime:
        """The checkpoint as stock transformers reads it."""
        with isolated(LIBRARY):
            return open_in_transformers(folder, device)


@contextmanager
def _bars(visible: bool) -> Iterator[None]:
    """Optimum's bars have no switch of their own."""
    from optimum.gptq import quantizer

    shown = quantizer.tqdm
    quantizer.tqdm = partial(shown, disable=not visible, leave=False)
    try:
        yield
    finally:
        quantizer.tqdm = shown


@hookimpl
def passes() -> Iterator[type[FolderPass]]:
    """What this plugin adds."""
    yield Gptq

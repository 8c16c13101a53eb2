"""GPTQ (Frantar and others, 2023, arXiv 2210.17323): weights in 2 to 8 bits, by gptqmodel through Optimum's quantizer.

The linear layers inside decoder layers are rounded one input channel at a time; the channels that are still to come make up for
the error, by the second moments of the layer's inputs on the recipe's windows. Embeddings and output stay as they are.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from io import StringIO
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from optimum_prune import FolderPass, Job, Prospect, Runtime, Stage, hookimpl, load_model, open_in_transformers, option
from optimum_prune.checkpoint import add_older_fields
from optimum_prune.errors import RecipeError

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

TOLERANCES = {2: 1.2, 3: 0.9, 4: 0.6, 8: 0.2}
BITS = tuple(TOLERANCES)
GROUPS = (-1, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True, kw_only=True)
class Gptq(FolderPass):
    """GPTQ: weights of 2 to 8 bits whose errors make up for each other on the recipe's text (gptqmodel)."""

    name: ClassVar[str] = "gptq"
    stage = Stage.QUANTIZE
    requires: ClassVar[Mapping[str, str]] = {"gptqmodel": "gptqmodel>=7.2"}
    takes_odd: ClassVar[bool] = True
    takes_experts: ClassVar[bool] = False
    bits: int = option("Bits of a weight: 2, 3, 4 or 8.", 4)
    group_size: int = option("Input channels that share a scale; -1 means all of them.", 64)
    sym: bool = option("Whether the range of a group is symmetric about zero; older runtimes read no other.", True)
    desc_act: bool = option(
        "Round the channels with the largest activations first; some runtimes are slower with it.", False
    )
    act_group_aware: bool = option("Do so group by group, which no runtime notices; not with desc_act.", True)
    damp_percent: float = option("Damping of the second moments, relative to their mean diagonal.", 0.1)
    mse: float = option(
        "Shrink ranges to where the error to this power is least, such as 2.4; 0 takes them whole.", 0.0
    )
    true_sequential: bool = option(
        "Quantize each linear layer on inputs that the quantized ones before it give.", True
    )

    def __post_init__(self) -> None:
        """Refuses what gptqmodel cannot pack."""
        if self.bits not in BITS:
            raise RecipeError(f"gptq has bits {self.bits}, which it cannot pack. Give {', '.join(map(str, BITS))}.")
        if self.group_size not in GROUPS:
            raise RecipeError(
                f"gptq has a group_size of {self.group_size}, for which there is no kernel. Give {', '.join(map(str, GROUPS))}."
            )
        if not 0 < self.damp_percent < 1:
            raise RecipeError(
                f"gptq has a damp_percent of {self.damp_percent}. Give a number between 0 and 1, such as 0.1."
            )
        if self.mse < 0:
            raise RecipeError(f"gptq has mse {self.mse}. Give a power such as 2.4, or 0 to leave it out.")

    @property
    def usual_tolerance(self) -> float:
        """By the bits."""
        return TOLERANCES[self.bits]

    def check(self, prospect: Prospect) -> None:
        """Groups must divide the widths, and what is packed together, 32 channels, the widths and the keys."""
        if prospect.config.model_type == "gpt2":
            raise RecipeError(
                "'gptq' was asked to quantize GPT-2, whose linear layers cannot be read again. Leave it out."
            )
        prospect.check_groups(self.group_size, self.name)
        config, layer = prospect.text_config, prospect.shape.layers[0]
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = layer.heads or getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        for what, width in {**prospect.widths(), "width of keys": heads * size}.items():
            if width % 32:
                raise RecipeError(
                    f"'gptq' packs 32 channels together, and the {what} of the model will be {width}, which is no multiple of that. "
                    f"Prune to multiples of 32, or leave 'gptq' out."
                )

    def convert(self, job: Job) -> Mapping[str, Any]:
        """Quantizes the model in place, one decoder layer after the other."""
        from transformers import AutoTokenizer

        with _by_itself(), job.progress.libraries():
            model = load_model(job.source, device_map=job.device, trust_remote_code=job.trust_remote_code)
            quantizer = self._quantizer(model, job)
            with _bars(job.progress.visible):
                quantizer.quantize_model(model)
            quantizer.dataset = None  # it would be written into the config
            format = (
                "gptq" if self.sym else "gptq_v2"
            )  # what `save` makes of the weights, but does not say in the config
            model.config.quantization_config = {**quantizer.to_dict(), "format": format}
            quantizer.save(model, str(job.target))
            tokenizer = AutoTokenizer.from_pretrained(job.source, trust_remote_code=job.trust_remote_code)
            tokenizer.save_pretrained(job.target)
        add_older_fields(job.target)
        return {"windows": len(job.calibration.tokens), "tokens": int(job.calibration.mask.sum())}

    def _quantizer(self, model: PreTrainedModel, job: Job) -> Any:
        from optimum.gptq import GPTQQuantizer

        types = getattr(model.config.get_text_config(), "layer_types", None) or ["attention"]
        quantizer = GPTQQuantizer(
            bits=self.bits,
            dataset=[
                _example(tokens[mask])
                for tokens, mask in zip(job.calibration.tokens, job.calibration.mask, strict=True)
            ],
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
        with _by_itself():
            return open_in_transformers(folder, device)


def _example(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """A window without its padding, which gptqmodel would count."""
    return {"input_ids": tokens[None], "attention_mask": torch.ones_like(tokens)[None]}


@contextmanager
def _by_itself() -> Iterator[None]:
    """Keeps gptqmodel and its libraries from changing the environment, the root logger and warnings, and from printing."""
    environment, level, handlers = dict(os.environ), logging.root.level, list(logging.root.handlers)
    with redirect_stdout(StringIO()), warnings.catch_warnings():
        try:
            import gptqmodel  # noqa: F401 - which does most of it

            logging.root.setLevel(level)
            yield
        finally:
            logging.root.setLevel(level)
            logging.root.handlers[:] = handlers
            for name in set(os.environ) - set(environment):
                del os.environ[name]
            os.environ.update(environment)


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

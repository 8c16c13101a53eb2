"""GPTQ and round-to-nearest by llm-compressor, written in the compressed-tensors format that vLLM and transformers read.

GPTQ: Frantar et al. 2022, https://arxiv.org/abs/2210.17323. It wants versions of transformers of its own, so it usually runs in
another interpreter. The weights are packed there, layer by layer, with the recipe's own windows of text.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from optimum_prune import FolderPass, Job, Runtime, Stage, hookimpl, load_model, open_in_transformers, option
from optimum_prune.errors import RecipeError
from optimum_prune.machine.isolation import isolated

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from optimum_prune import CheckpointSpec, Pass, Progress

WITHOUT_LINEAR = ("gpt2",)
GROUPED = ("W3A16", "W4A16", "W4A8", "W8A16")
"""Schemes with a scale for each group of weights; the others have one for each row."""


@dataclass(frozen=True, kw_only=True)
class LlmCompressor(FolderPass):
    """Quantizes with llm-compressor (GPTQ or round-to-nearest) for vLLM and transformers."""

    name: ClassVar[str] = "llm-compressor"
    stage: ClassVar[Stage] = Stage.QUANTIZE
    requires: ClassVar[Mapping[str, str]] = {"llmcompressor": "llmcompressor>=0.14"}
    takes_heterogeneous: ClassVar[bool] = True
    takes_experts: ClassVar[bool] = False

    scheme: Literal["W3A16", "W4A16", "W4A8", "W8A16", "W8A8", "FP8_DYNAMIC"] = option(
        "Bits of weights (W) and activations (A), as compressed-tensors names them.", "W4A16"
    )
    algorithm: Literal["gptq", "round-to-nearest"] = option(
        "gptq mends each rounding in the weights that are yet to be rounded, by the text; round-to-nearest needs none.",
        "gptq",
    )
    group_size: int | None = option(
        "Weights that share a scale; -1 for one scale for each row. (64 if not given, in schemes with groups.)",
        None,
        at_least=1,
        or_else=-1,
    )
    ignore: tuple[str, ...] = option(
        "Linear modules to leave as they are, by name, class, or 're:' and a pattern.", ("lm_head",)
    )
    dampening_frac: float = option(
        "gptq: what is added to the Hessian's diagonal, as a fraction of its mean.", 0.01, above=0, below=1
    )
    actorder: Literal["static", "none"] = option(
        "gptq: static rounds the columns with the largest activations first; the format stays the same.", "static"
    )

    def __post_init__(self) -> None:
        """Refuses what no model could be quantized with."""
        super().__post_init__()
        if self.group_size is not None and self.scheme not in GROUPED:
            raise RecipeError(
                f"'{self.name}' is given a group_size of {self.group_size}, and its scheme {self.scheme} has one scale for each row. "
                f"Leave group_size out, or choose one of {', '.join(GROUPED)}."
            )

    @property
    def usual_tolerance(self) -> float:
        """The tolerance by the bits of a weight: about twice what a small real model showed."""
        return {"W3": 1.0, "W4": 0.7}.get(self.scheme[:2], 0.25)

    @property
    def weights_of_group(self) -> int:
        """How many weights share a scale; -1 for all of a row."""
        if self.scheme not in GROUPED:
            return -1
        return 64 if self.group_size is None else self.group_size

    def check(self, spec: CheckpointSpec) -> None:
        """Refuses widths that the groups do not divide, and a model without linear modules."""
        if spec.text_config.model_type in WITHOUT_LINEAR:
            raise RecipeError(
                f"'{self.name}' quantizes linear modules, and those of {spec.text_config.model_type} are transposed ones, which "
                f"llm-compressor leaves as they are. Choose another quantizer, such as torchao."
            )
        spec.check_groups(self.weights_of_group, self.name)

    def convert(self, job: Job) -> Mapping[str, Any]:
        """Calibrates and packs the weights of a checkpoint."""
        with isolated(), job.progress.libraries(), _quietly(job.progress):
            model = load_model(job.source, trust_remote_code=job.trust_remote_code)
            self._quantize(model, job)
            packed = sum(hasattr(module, "quantization_scheme") for module in model.modules())
            model.save_pretrained(job.target)
        return {"quantized_modules": packed}

    def _quantize(self, model: PreTrainedModel, job: Job) -> None:
        from llmcompressor import oneshot, reset_session
        from torch.utils.data import DataLoader

        windows: Any = list(job.examples())
        try:
            oneshot(
                model=model,
                processor=job.tokenizer(),
                recipe=self._modifier(),
                dataset=DataLoader(windows, batch_size=None) if self.algorithm == "gptq" else None,
            )
        finally:
            reset_session()

    def _modifier(self) -> Any:
        from compressed_tensors.quantization import preset_name_to_scheme
        from llmcompressor.modifiers.gptq import GPTQModifier
        from llmcompressor.modifiers.quantization import QuantizationModifier

        scheme = preset_name_to_scheme(self.scheme, ["Linear"])
        grouped = self.weights_of_group > 0
        changes = {
            "group_size": self.weights_of_group if grouped else None,
            "strategy": "group" if grouped else "channel",
        }
        weights = type(scheme.weights)(**{**scheme.weights.model_dump(), **changes})
        common = {
            "config_groups": {"group_0": scheme.model_copy(update={"weights": weights})},
            "ignore": list(self.ignore),
        }
        if self.algorithm == "round-to-nearest":
            return QuantizationModifier(**common)
        actorder = None if self.actorder == "none" else self.actorder
        return GPTQModifier(**common, dampening_frac=self.dampening_frac, actorder=actorder)

    def open(self, folder: Path, device: str) -> Runtime:
        """The checkpoint in transformers."""
        return open_in_transformers(folder, device)


@contextmanager
def _quietly(progress: Progress) -> Iterator[None]:
    """Stops the log that llm-compressor prints, and its bars unless somebody watches."""
    from llmcompressor.logger import configure_logger, logger

    configure_logger()
    libraries = ("llmcompressor", "compressed_tensors")
    for library in libraries:
        logger.disable(library)
    try:
        with nullcontext() if progress.visible or progress.output else redirect_stderr(io.StringIO()):
            yield
    finally:
        for library in libraries:
            logger.enable(library)


@hookimpl
def passes() -> Iterator[type[Pass]]:
    """What this plugin adds."""
    yield LlmCompressor

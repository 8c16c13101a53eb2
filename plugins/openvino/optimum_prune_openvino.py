"""OpenVINO: one graph that reads prompts and single tokens and keeps its cache inside, in float32, int8 or data-aware int4.

The exporter is that of transformers. Inputs are `input_ids`, `attention_mask`, `position_ids` and `beam_idx`, as optimum-intel names
them; the cache is the state of the inference request. Weights are stored in the precision chosen here; what they are computed in is
the choice of whoever compiles the graph, and OpenVINO's own is bfloat16 wherever the processor has it.

`quantize: int4` groups weights, and asks how much each activation weighs on the recipe's windows: AWQ scales channels, and scale
estimation or GPTQ round the weights (NNCF). Embeddings and output have 8 bits then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from optimum_prune import CheckpointSpec, FolderPass, Job, Runtime, Stage, hookimpl, option
from optimum_prune.conversion.exporting import (
    CachedRuntime,
    Trace,
    add_companions,
    arrays,
    export,
    first_inputs,
    open_to_export,
    trace,
)
from optimum_prune.errors import RecipeError, reason
from optimum_prune.machine.isolation import isolated

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

ONLY_INT4 = ("group_size", "ratio", "awq", "scale_estimation", "gptq", "subset_size")


@dataclass(frozen=True, kw_only=True)
class OpenVino(FolderPass):
    """One graph that keeps its cache, for OpenVINO, in float32, float16, int8 or data-aware int4 (transformers.exporters, NNCF)."""

    name: ClassVar[str] = "openvino"
    stage = Stage.EXPORT
    requires: ClassVar[Mapping[str, str]] = {
        "openvino": "openvino>=2026.1",
        "nncf": "nncf>=3.0",
        "openvino_tokenizers": "openvino-tokenizers>=2026.1",
    }
    takes_heterogeneous: ClassVar[bool] = True
    takes_quantized: ClassVar[bool] = True
    dtype: Literal["float32", "float16"] = option("What weights that are not quantized are stored in.", "float32")
    quantize: Literal["none", "int8", "int4"] = option(
        "int8: weights in 8 bits. int4: most in 4 bits, chosen by the recipe's text.", "none"
    )
    group_size: int = option("Weights of a row that share a scale; only with int4.", 64, at_least=1)
    ratio: float = option(
        "Share of the linear layers that get 4 bits, the least sensitive first; the others get 8. Only with int4.",
        1.0,
        at_least=0,
        at_most=1,
    )
    awq: bool = option("Scale channels by their activations first; only with int4.", True)
    scale_estimation: bool = option("Choose scales that change activations least; only with int4.", True)
    gptq: bool = option(
        "Round weights one after the other, each making up for those before; slower, and only with int4.", False
    )
    subset_size: int = option("How many of the recipe's windows int4 looks at.", 32, at_least=1)

    def __post_init__(self) -> None:
        """Refuses what NNCF does not do."""
        super().__post_init__()
        changed = [name for name in ONLY_INT4 if getattr(self, name) != type(self).__dataclass_fields__[name].default]
        if self.quantize != "int4" and changed:
            raise RecipeError(
                f"openvino has {changed[0]}, which is only for quantize int4, but quantize is {self.quantize}. Give `quantize: int4`, or "
                f"leave {changed[0]} out."
            )

    @property
    def usual_tolerance(self) -> float:
        """The tolerance by what weights are stored in: about twice what a small real model showed."""
        return {"none": 0.01, "int8": 0.15, "int4": 0.5}[self.quantize]

    def check(self, spec: CheckpointSpec) -> None:
        """Groups must divide the widths."""
        if self.quantize == "int4":
            spec.check_groups(self.group_size, self.name)

    def convert(self, job: Job) -> Mapping[str, Any]:
        """Exports through transformers."""
        with isolated(silent=True):
            from transformers.exporters import OpenVINOConfig, OpenVINOExporter

        traced = trace(open_to_export(job))
        quantizer = None if self.quantize == "none" else self._quantizer(job, traced)
        config = OpenVINOConfig(compress_to_fp16=self.dtype == "float16", quantizer=quantizer)
        export(OpenVINOExporter(), traced, config).save_pretrained(job.target)
        add_companions(job, EXAMPLE)
        return {**_add_tokenizers(job), "dtype": self.dtype, "quantize": self.quantize}

    def _quantizer(self, job: Job, traced: Trace) -> Any:
        with isolated(silent=True):
            import nncf
            from transformers.exporters import NNCFOpenVINOQuantizer, NNCFWeightCompressionConfig

        if self.quantize == "int8":
            return NNCFOpenVINOQuantizer(NNCFWeightCompressionConfig(mode=nncf.CompressWeightsMode.INT8_ASYM))
        chosen = {name: getattr(self, name) for name in ONLY_INT4}
        config = NNCFWeightCompressionConfig(mode=nncf.CompressWeightsMode.INT4_ASYM, **chosen)
        examples = islice(job.examples(), self.subset_size)
        samples = [first_inputs(traced, example["input_ids"]) for example in examples]
        return NNCFOpenVINOQuantizer(config, samples)

    def open(self, folder: Path, device: str) -> Runtime:
        """The graph in OpenVINO, computing in float32 as the checkpoint does that it is compared with."""
        return OpenVinoRuntime(folder, "GPU" if device.startswith("xpu") else "CPU")


class OpenVinoRuntime(CachedRuntime):
    """A graph in OpenVINO. Its cache is the state of the request, so there is one at a time."""

    def __init__(self, folder: Path, device: str) -> None:
        import openvino

        settings = {"INFERENCE_PRECISION_HINT": "f32"}
        compiled = openvino.Core().compile_model(folder / "openvino_model.xml", device, settings)
        self.names = [each.get_any_name() for each in compiled.inputs]
        self.request = compiled.create_infer_request()

    def start(self, windows: int) -> Any:
        """Forgets what the request read; which window of the state belongs to which."""
        import numpy

        self.request.reset_state()
        return numpy.arange(windows, dtype=numpy.int32)

    def step(self, tokens: Tensor, before: int, cache: Any) -> tuple[Tensor, Any]:
        """One inference."""
        import torch

        inputs = arrays(tokens, before, self.names) | {"beam_idx": cache}
        return torch.from_numpy(self.request.infer(inputs)["logits"].copy()), cache


def _add_tokenizers(job: Job) -> dict[str, Any]:
    """Writes the graphs that OpenVINO GenAI reads and writes text with, and says why where it cannot."""
    with isolated(silent=True):
        openvino: Any = import_module("openvino")
        convert: Any = import_module("openvino_tokenizers").convert_tokenizer
        try:
            made = convert(job.tokenizer(), with_detokenizer=True)
        except Exception as error:  # whatever a tokenizer has that it does not know
            return {"openvino_genai": False, "no_tokenizer": reason(error)}
    for name, graph in zip(("openvino_tokenizer", "openvino_detokenizer"), made, strict=True):
        openvino.save_model(graph, job.target / f"{name}.xml", compress_to_fp16=False)
    return {"openvino_genai": True}


EXAMPLE = '''"""Generates text with this model: python example.py "Once upon a time" """

import json
import sys
from pathlib import Path

import numpy as np
import openvino
from tokenizers import Tokenizer

folder = Path(__file__).parent
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
# Without the hint, OpenVINO computes in bfloat16 on processors that have it: faster, and less exact.
settings = {"INFERENCE_PRECISION_HINT": "f32"}
request = openvino.Core().compile_model(folder / "openvino_model.xml", "CPU", settings).create_infer_request()

prompt = sys.argv[1] if len(sys.argv) > 1 else "Once upon a time"
tokens = tokenizer.encode(prompt).ids
ahead, before = tokens, 0  # first the whole prompt, then one token at a time; the request keeps the cache
for _ in range(32):
    inputs = {
        "input_ids": np.array([ahead]),
        "attention_mask": np.ones((1, before + len(ahead)), np.int64),
        "position_ids": np.arange(before, before + len(ahead))[None],
        "beam_idx": np.zeros(1, np.int32),
    }
    logits = request.infer(inputs)["logits"]
    before += len(ahead)
    ahead = [int(logits[0, -1].argmax())]
    if ahead[0] in np.atleast_1d(ends):
        break
    tokens = tokens + ahead
print(tokenizer.decode(tokens))
'''


@hookimpl
def passes() -> Iterator[type[FolderPass]]:
    """What this plugin adds."""
    yield OpenVino

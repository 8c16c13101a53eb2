"""ONNX: one graph for ONNX Runtime that reads prompts and single tokens with a cache, in float32, float16 or dynamic int8.

The exporter is that of transformers. Inputs are `input_ids`, `attention_mask`, `position_ids` and the cache, a pair of
`input.cache.layers.N.keys` and `.values` for each layer with attention, which may have no tokens (`input.past_key_values.layers.N` if
transformers is older than 5.24); outputs are `logits` and the cache with the new tokens. Weights are in `model.onnx.data`, so that they
may be larger than 2 GB.

With `quantize: int8`, embeddings and matrix products have weights in 8 bits, one scale for each output channel, and activations are
rounded when the model runs, with one scale for all (ONNX Runtime's dynamic quantization). The products that read the inner channels of
an FFN stay in float32: a few of those channels are so large that all others would be rounded away.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from optimum_prune import CheckpointSpec, FolderPass, Job, Runtime, Stage, hookimpl, option
from optimum_prune.conversion.exporting import (
    CachedRuntime,
    add_companions,
    arrays,
    export,
    open_to_export,
    trace,
)
from optimum_prune.errors import RecipeError
from optimum_prune.machine.isolation import isolated

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Onnx(FolderPass):
    """One graph with a cache for ONNX Runtime, in float32, float16 or dynamic int8 (transformers.exporters)."""

    name: ClassVar[str] = "onnx"
    stage = Stage.EXPORT
    requires: ClassVar[Mapping[str, str]] = {
        "onnx": "onnx>=1.20",
        "onnxscript": "onnxscript>=0.7",
        "onnxruntime": "onnxruntime>=1.23",
    }
    takes_heterogeneous: ClassVar[bool] = True
    takes_quantized: ClassVar[bool] = True
    dtype: Literal["float32", "float16"] = option(
        "What weights are stored and computed in; float16 is slow on CPUs.", "float32"
    )
    quantize: Literal["none", "int8"] = option(
        "int8: weights in 8 bits, activations rounded when the model runs.", "none"
    )

    def __post_init__(self) -> None:
        """Refuses what ONNX Runtime does not quantize."""
        super().__post_init__()
        if self.quantize == "int8" and self.dtype != "float32":
            raise RecipeError(
                f"onnx has quantize int8 and dtype {self.dtype}, but quantizes float32 only. Leave dtype out."
            )

    @property
    def usual_tolerance(self) -> float:
        """The tolerance by what weights are stored in: about twice what a small real model showed."""
        return 0.35 if self.quantize == "int8" else 0.03

    def check(self, spec: CheckpointSpec) -> None:
        """Any decoder that transformers exports will do."""

    def convert(self, job: Job) -> Mapping[str, Any]:
        """Exports through transformers."""
        with isolated(silent=True):
            from transformers.exporters import OnnxConfig, OnnxExporter

            exporter = OnnxExporter()  # which says that it is experimental

        model = open_to_export(job, self.dtype)
        quantizer = _int8(model.config.get_text_config().hidden_size) if self.quantize == "int8" else None
        export(exporter, trace(model), OnnxConfig(quantizer=quantizer)).save_pretrained(job.target)
        graph = _without_traces(job.target / "model.onnx")
        add_companions(job, EXAMPLE)
        plain = _for_genai(job, model.config.get_text_config(), graph.input)
        if plain is not None:
            (job.target / "genai_config.json").write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
        return {"onnxruntime_genai": plain is not None, "dtype": self.dtype, "quantize": self.quantize}

    def open(self, folder: Path, device: str) -> Runtime:
        """The graph in ONNX Runtime."""
        return OnnxRuntime(folder, device, "int8" if self.quantize == "int8" else self.dtype)


def _for_genai(job: Job, config: Any, given: Sequence[Any]) -> dict[str, Any] | None:
    """How onnxruntime-genai runs a graph; None where it cannot: it gives every layer a cache, and all layers the same.

    Args:
        given: the graph's inputs.
    """
    cached = {each.name: each.type.tensor_type.shape.dim for each in given if ".layers." in each.name}
    shapes = {(axes[1].dim_value, axes[3].dim_value) for axes in cached.values()}
    if len(shapes) > 1 or len(cached) != 2 * config.num_hidden_layers:
        return None
    ((heads, size),) = shapes
    names = [re.sub(r"(?<=layers\.)\d+", "%d", name) for name in list(cached)[:2]]
    inputs = {each.name: each.name for each in given if each.name not in cached}
    present = [name.replace("input.", "output.", 1) for name in names]
    ends = json.loads((job.target / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
    end = ends[0] if isinstance(ends, list) else ends
    longest = int(config.max_position_embeddings)
    decoder = {
        "filename": "model.onnx",
        "session_options": {"provider_options": []},
        "head_size": size,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": heads,
        "inputs": {**inputs, "past_key_names": names[0], "past_value_names": names[1]},
        "outputs": {"logits": "logits", "present_key_names": present[0], "present_value_names": present[1]},
    }
    model = {
        "type": "decoder",
        "vocab_size": config.vocab_size,
        "context_length": longest,
        "bos_token_id": config.bos_token_id if isinstance(config.bos_token_id, int) else end,
        "eos_token_id": ends,
        "pad_token_id": config.pad_token_id if isinstance(config.pad_token_id, int) else end,
        "decoder": decoder,
    }
    return {"model": model, "search": {"do_sample": False, "max_length": longest, "past_present_share_buffer": False}}


def _without_traces(file: Path) -> Any:
    """Takes out of a graph where in whose Python files each of its nodes comes from; that is most of the file, and tells where they lie.

    Returns:
        What is left of it, without its weights.
    """
    onnx: Any = import_module("onnx")  # which says its types where it is installed only
    model = onnx.load(file, load_external_data=False)
    ahead = [model.graph, *model.functions]
    while ahead:
        part = ahead.pop()
        for each in (part, *part.node, *part.value_info):
            each.ClearField("metadata_props")
            each.ClearField("doc_string")
        held = [attribute for node in part.node for attribute in node.attribute]
        ahead += [graph for attribute in held for graph in (attribute.g, *attribute.graphs) if graph.node]
    file.write_bytes(model.SerializeToString())
    return model.graph


def _int8(hidden_size: int) -> Any:
    """ONNX Runtime's dynamic quantization of all matrix products but those that leave an FFN."""
    from transformers.exporters import OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer
    from transformers.exporters.configs import ExportFormat
    from transformers.exporters.quantizers import ExportQuantizer

    class Int8(ExportQuantizer):  # type: ignore[misc]  # transformers is not annotated
        supported_formats = (ExportFormat.ONNX,)
        required_packages = OnnxRuntimeQuantizer.required_packages

        def quantize(self, model: Any, sample_inputs: dict[str, Any], export_format: ExportFormat) -> Any:
            """Which products those are, is known only now."""
            weights = {node.name: node.inputs[1].const_value for node in model.graph if node.op_type == "MatMul"}
            leaving = [
                name for name, weight in weights.items() if weight is not None and weight.shape[0] != hidden_size
            ]
            config = OnnxRuntimeDynamicConfig(per_channel=True, nodes_to_exclude=leaving)
            return OnnxRuntimeQuantizer(config).quantize(model, sample_inputs, export_format)

    return Int8()


class OnnxRuntime(CachedRuntime):
    """A graph in ONNX Runtime, on as many threads as torch."""

    def __init__(self, folder: Path, device: str, dtype: str) -> None:
        import onnxruntime
        import torch

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        providers = ["CUDAExecutionProvider"] if device.startswith("cuda") else []
        self.session = onnxruntime.InferenceSession(
            folder / "model.onnx", options, providers=[*providers, "CPUExecutionProvider"]
        )
        self.names = [each.name for each in self.session.get_inputs()]
        self.cached = [each for each in self.session.get_inputs() if ".layers." in each.name]
        self.dtype = dtype

    def start(self, windows: int) -> dict[str, Any]:
        """No tokens for each layer with attention."""
        import numpy

        shapes = {each.name: (windows, int(each.shape[1]), 0, int(each.shape[3])) for each in self.cached}
        dtype = "float16" if self.dtype == "float16" else "float32"
        return {name: numpy.zeros(shape, dtype) for name, shape in shapes.items()}

    def step(self, tokens: Tensor, before: int, cache: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """One run."""
        import torch

        outputs = ["logits", *(name.replace("input.", "output.", 1) for name in cache)]
        logits, *grown = self.session.run(outputs, arrays(tokens, before, self.names) | cache)
        return torch.from_numpy(logits).float(), dict(zip(cache, grown, strict=True))


EXAMPLE = '''"""Generates text with this model: python example.py "Once upon a time" """

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

folder = Path(__file__).parent
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])

# The cache: none of the tokens has been read.
cache = {
    each.name: np.zeros((1, int(each.shape[1]), 0, int(each.shape[3])), "float16" if "float16" in each.type else "float32")
    for each in session.get_inputs()
    if ".layers." in each.name
}
outputs = ["logits", *(name.replace("input.", "output.", 1) for name in cache)]

prompt = sys.argv[1] if len(sys.argv) > 1 else "Once upon a time"
tokens = tokenizer.encode(prompt).ids
ahead, before = tokens, 0  # first the whole prompt, then one token at a time
for _ in range(32):
    inputs = {
        "input_ids": np.array([ahead]),
        "attention_mask": np.ones((1, before + len(ahead)), np.int64),
        "position_ids": np.arange(before, before + len(ahead))[None],
    }
    logits, *grown = session.run(outputs, inputs | cache)
    cache = dict(zip(cache, grown))
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
    yield Onnx

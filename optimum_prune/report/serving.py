"""Who can serve a model, by its architecture and by whether its layers are all alike: what was run, with which version, and how."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

LLAMA_LIKE = frozenset({"llama", "mistral", "phi3", "qwen2"})


@dataclass(frozen=True)
class Engine:
    """Something that runs models."""

    name: str
    version: str
    """With which it was run."""
    stock: str
    """How it reads a model whose layers are all alike."""
    differing: str
    """And one whose layers differ in shape or lack a block."""
    of_stock: frozenset[str] | None = None
    """The architectures that were run, by model type; None where any that transformers has will do."""
    of_differing: frozenset[str] | None = None
    otherwise: str = "not run with this architecture"
    """What is said of others whose layers are alike."""
    otherwise_differing: str = "the stock checkpoint that the pass `padded` writes"
    """And of others whose layers differ."""
    exporter: str | None = None
    """The pass that writes what it reads, if it reads no checkpoint."""

    def reads(self, model_type: str, *, stock: bool) -> bool:
        """Whether it was run with such models."""
        known = self.of_stock if stock else self.of_differing
        return known is None or model_type in known

    def how(self, model_type: str, *, stock: bool) -> str:
        """How it reads a model."""
        if self.reads(model_type, stock=stock):
            return self.stock if stock else self.differing
        return self.otherwise if stock else self.otherwise_differing


STOCK = "padded"
"""The pass that writes a stock checkpoint for whatever reads no other."""
VLLM = frozenset({"llama", "qwen3", "gemma3_text"})
ENGINES = (
    Engine("transformers", "5.23", "as it is", "with `trust_remote_code=True`, or after `import optimum_prune`"),
    Engine(
        *(
            "vLLM",
            "0.32",
            "`vllm serve FOLDER`",
            "`vllm serve FOLDER --trust-remote-code`, through its Transformers backend",
        ),
        *(VLLM, VLLM),
    ),
    Engine(
        *("llama.cpp", "llama-cpp-python 0.3.36", "a file by the pass `gguf`", "a file by the pass `gguf`"),
        *(LLAMA_LIKE | {"qwen3", "gemma2", "gemma3_text"}, LLAMA_LIKE),
        otherwise="the pass `gguf` has no form of this architecture",
        otherwise_differing="a file by the pass `gguf`, of the stock checkpoint that the pass `padded` writes, if it has a form of this architecture",
        exporter="gguf",
    ),
    Engine("ONNX Runtime", "1.31", "a graph by the pass `onnx`", "a graph by the pass `onnx`", exporter="onnx"),
    Engine(
        *("onnxruntime-genai", "0.18", "the folder that the pass `onnx` writes"),
        "the folder that the pass `onnx` writes, if all layers have as many key-value heads",
    ),
    Engine(
        "OpenVINO",
        "2026.4",
        "a graph by the pass `openvino`, with OpenVINO GenAI too",
        "a graph by the pass `openvino`, with OpenVINO GenAI too",
        exporter="openvino",
    ),
    Engine("lm-eval", "0.4.13", "as it is", "with `--model_args pretrained=FOLDER,trust_remote_code=True`"),
    Engine("trl", "1.16", "as it is", "with `trust_remote_code=True`, or after `import optimum_prune`"),
    Engine("PEFT", "0.21", "as it is", "with `target_modules`, unless PEFT is imported before the model is loaded"),
)


def who_serves(model_type: str, *, stock: bool) -> Iterator[tuple[str, str, str]]:
    """Of each engine its name, the version that was run, and how it reads such a model before anything is quantized.

    Args:
        model_type: of the stock architecture.
        stock: whether all layers are alike.
    """
    for engine in ENGINES:
        yield engine.name, engine.version, engine.how(model_type, stock=stock)


def exporters(model_type: str, *, stock: bool) -> list[str]:
    """The passes that write, of such a model as it is, what an engine reads; with the one for stock checkpoints if an engine reads no other.

    Args:
        model_type: of the stock architecture.
        stock: whether all layers are alike.
    """
    found = [each.exporter for each in ENGINES if each.exporter and each.reads(model_type, stock=stock)]
    some_do_not = not all(each.reads(model_type, stock=stock) for each in ENGINES)
    return [*found, *([STOCK] if some_do_not and not stock else [])]

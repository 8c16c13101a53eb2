"""ExecuTorch: one program for phones and small devices that reads prompts and single tokens with a cache, in float32.

The exporter is that of transformers; XNNPACK computes what it can. Inputs, in this order, are the tokens, their positions, and keys
and values of each layer with attention, which may have no tokens; outputs are the logits, and the cache with the new tokens. Sizes may
vary up to the limits that the options name, for which memory is planned when the program is written.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from optimum_prune import CheckpointSpec, FolderPass, Job, Runtime, Stage, hookimpl, option
from optimum_prune.conversion.exporting import (
    CachedRuntime,
    Limits,
    add_companions,
    export,
    open_to_export,
    trace,
)
from optimum_prune.errors import PassError, RecipeError
from optimum_prune.machine.isolation import isolated

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

LIMITS = "limits.json"


@dataclass(frozen=True, kw_only=True)
class ExecuTorch(FolderPass):
    """One program with a cache for the ExecuTorch runtime, in float32 with XNNPACK (transformers.exporters)."""

    name: ClassVar[str] = "executorch"
    stage = Stage.EXPORT
    requires: ClassVar[Mapping[str, str]] = {"executorch": "executorch>=1.4"}
    takes_heterogeneous: ClassVar[bool] = True
    takes_quantized: ClassVar[bool] = True
    usual_tolerance: ClassVar[float] = 0.01
    max_length: int | None = option(
        "How many tokens the cache can hold; if not given 2048, or what the model knows if less.", None, at_least=16
    )
    max_tokens: int = option(
        "How many tokens are read at a time; a longer prompt is read in several steps.", 128, at_least=2
    )
    max_batch: int = option("How many texts are read at a time.", 1, at_least=1)

    def check(self, spec: CheckpointSpec) -> None:
        """Positions that the model does not know are of no use."""
        known = _positions(spec.text_config)
        if self.max_length is not None and known < self.max_length:
            raise RecipeError(
                f"executorch has max_length {self.max_length}, and the model knows {known} positions. Give a max_length of at most {known}."
            )

    def convert(self, job: Job) -> Mapping[str, Any]:
        """Exports through transformers."""
        with isolated(silent=True):
            from transformers.exporters import ExecutorchConfig, ExecutorchExporter

        model = open_to_export(job)
        length = self.max_length or min(2048, _positions(model.config.get_text_config()))
        limits = Limits(self.max_batch, self.max_tokens, length)
        export(ExecutorchExporter(), trace(model, masked=False, limits=limits), ExecutorchConfig()).save_pretrained(
            job.target
        )
        plain = {"max_batch": self.max_batch, "max_tokens": self.max_tokens, "max_length": length}
        (job.target / LIMITS).write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
        add_companions(job, EXAMPLE)
        return plain

    def open(self, folder: Path, device: str) -> Runtime:  # noqa: ARG002 - it was lowered for the processor
        """The program in the ExecuTorch runtime."""
        return ExecuTorchRuntime(folder)


def _positions(config: Any) -> int:
    return getattr(config, "max_position_embeddings", None) or sys.maxsize


class ExecuTorchRuntime(CachedRuntime):
    """A program in the ExecuTorch runtime."""

    def __init__(self, folder: Path) -> None:
        with isolated(silent=True):
            from executorch.runtime import Runtime

        plain = json.loads((folder / LIMITS).read_text(encoding="utf-8"))
        self.limits = Limits(plain["max_batch"], plain["max_tokens"], plain["max_length"])
        self.program = Runtime.get().load_program(folder / "model.pte")
        self.method = self.program.load_method("forward")
        inputs = self.method.metadata
        self.cached = [inputs.input_tensor_meta(index).sizes() for index in range(2, inputs.num_inputs())]

    def start(self, windows: int) -> list[Tensor]:
        """No tokens for each layer with attention."""
        import torch

        return [torch.zeros(windows, heads, 0, size) for _, heads, _, size in self.cached]

    def step(self, tokens: Tensor, before: int, cache: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """One execution."""
        import torch

        if self.limits.before is not None and before > self.limits.before:
            raise PassError(
                f"The program's cache holds {self.limits.before} tokens, and there are {before}. Give executorch a larger max_length, or read "
                f"shorter texts."
            )
        windows, length = tokens.shape
        positions = torch.arange(before, before + length).repeat(windows, 1)
        logits, *grown = self.method.execute([tokens.contiguous(), positions, *cache])
        return logits, grown


EXAMPLE = '''"""Generates text with this model: python example.py "Once upon a time" """

import json
import sys
from pathlib import Path

import torch
from executorch.runtime import Runtime
from tokenizers import Tokenizer

folder = Path(__file__).parent
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
limits = json.loads((folder / "limits.json").read_text())
program = Runtime.get().load_program(folder / "model.pte")
method = program.load_method("forward")
inputs = method.metadata

# The cache, behind tokens and positions: none of the tokens has been read.
shapes = [inputs.input_tensor_meta(index).sizes() for index in range(2, inputs.num_inputs())]
cache = [torch.zeros(1, heads, 0, size) for _, heads, _, size in shapes]

prompt = sys.argv[1] if len(sys.argv) > 1 else "Once upon a time"
tokens = tokenizer.encode(prompt).ids
before = 0
for _ in range(32):
    while before < len(tokens):  # first the whole prompt, as much as it takes at a time, then one token at a time
        ahead = torch.tensor([tokens[before : before + limits["max_tokens"]]])
        positions = torch.arange(before, before + ahead.shape[1])[None]
        logits, *cache = method.execute([ahead, positions, *cache])
        before += ahead.shape[1]
    token = int(logits[0, -1].argmax())
    if token in (ends if isinstance(ends, list) else [ends]) or len(tokens) == limits["max_length"]:
        break
    tokens = [*tokens, token]
print(tokenizer.decode(tokens))
'''


@hookimpl
def passes() -> Iterator[type[FolderPass]]:
    """What this plugin adds."""
    yield ExecuTorch

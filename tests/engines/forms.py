"""Small models of every form that is written, as engines and other people's tools are given them."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import tiny
import torch
import transformers
from transformers import PreTrainedModel

from optimum_prune import Cuts, Decoder, Progress
from optimum_prune import testing as conformance
from optimum_prune.checkpoint import saving
from optimum_prune.hooks.plugins import load

SIZES = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "initializer_range": 0.06,
}
MIXED = ["sliding_attention", "full_attention"] * 3
MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES)),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**SIZES, query_pre_attn_scalar=64, sliding_window=16, layer_types=MIXED)
    ),
}
CUTS = {
    "depth": Cuts(layers=(0, 1, 4, 5)),
    "alike": Cuts.along("channels", {index: tuple(range(256)) for index in range(6)}),
    "widths": Cuts.along("channels", {1: tuple(range(256)), 3: tuple(range(384))}),
    "heads": Cuts.along("heads", {1: (0,), 4: (1,)}),
    "blocks": Cuts(blocks={0: ("feed_forward",), 2: ("attention",), 3: ("feed_forward",)}),
}


def save(name: str, kind: str, folder: Path) -> PreTrainedModel:
    """A model of a form, with a tokenizer, in a folder; and in memory."""
    torch.manual_seed(0)
    decoder = Decoder.of(MODELS[name]().eval(), load().families)
    conformance.cut(decoder, CUTS[kind])
    saving.save(decoder.model, tiny.tokenizer(), folder, Progress())
    return decoder.model


def told_by(python: str | None, script: str, folder: Path, *arguments: Path, **environment: str) -> Any:
    """What a script beside this file, run in another environment, writes to its first argument.

    Args:
        folder: for that file, and for the code that comes with models.
        arguments: of the script, behind it.
    """
    result = folder / "result.json"
    there = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), **environment}
    command = [str(python), Path(__file__).parent / script, result, *arguments]
    subprocess.run(command, check=True, timeout=600, capture_output=True, env=there)
    return json.loads(result.read_text())

"""vLLM serves every form that is written, in the environment that OPTIMUM_PRUNE_PYTHON_VLLM names; `make test-engines` makes one."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import tiny
import torch
import transformers

from optimum_prune import Cuts, Decoder, Progress
from optimum_prune import testing as conformance
from optimum_prune.checkpoint import saving

PYTHON = os.environ.get("OPTIMUM_PRUNE_PYTHON_VLLM")
pytestmark = [
    pytest.mark.engines,
    pytest.mark.skipif(not PYTHON, reason="OPTIMUM_PRUNE_PYTHON_VLLM does not name where vLLM is"),
]
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
DIRTY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_PERTURB_": "60"}
"""Memory that nobody wrote to holds no zeros: weights that an engine believes to have loaded would show."""


@pytest.mark.parametrize("kind", list(CUTS))
@pytest.mark.parametrize("name", list(MODELS))
def test_it_writes_what_transformers_writes(name, kind, plugins, tmp_path):
    torch.manual_seed(0)
    decoder = Decoder.of(MODELS[name]().eval(), plugins.families)
    conformance.cut(decoder, CUTS[kind])
    saving.save(decoder.model, None, tmp_path / "model", Progress())
    prompts = tiny.windows(6, 8).tokens
    (tmp_path / "prompts.json").write_text(json.dumps(prompts.tolist()))
    script = Path(__file__).parent / "served_by_vllm.py"
    subprocess.run(
        [str(PYTHON), script, tmp_path / "model", tmp_path / "prompts.json", tmp_path / "result.json"],
        check=True,
        timeout=600,
        capture_output=True,
        env={**os.environ, **DIRTY, "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    for prompt, (tokens, told) in zip(prompts, json.loads((tmp_path / "result.json").read_text()), strict=True):
        whole = torch.cat([prompt, torch.tensor(tokens)])
        scores = decoder.model(input_ids=whole[None]).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
        assert scores.argmax(-1).tolist() == tokens
        torch.testing.assert_close(scores.amax(-1), torch.tensor(told), rtol=1e-4, atol=1e-4)

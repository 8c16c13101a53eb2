"""vLLM serves every form that is written, in the environment that OPTIMUM_PRUNE_PYTHON_VLLM names; `make test-engines` makes one."""

from __future__ import annotations

import json
import os

import pytest
import tiny
import torch
from forms import CUTS, MODELS, save, told_by

PYTHON = os.environ.get("OPTIMUM_PRUNE_PYTHON_VLLM")
pytestmark = [
    pytest.mark.engines,
    pytest.mark.skipif(not PYTHON, reason="OPTIMUM_PRUNE_PYTHON_VLLM does not name where vLLM is"),
]
DIRTY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_PERTURB_": "60"}
"""Memory that nobody wrote to holds no zeros: weights that an engine believes to have loaded would show."""


@pytest.mark.parametrize("kind", list(CUTS))
@pytest.mark.parametrize("name", list(MODELS))
def test_it_writes_what_transformers_writes(name, kind, tmp_path):
    model = save(name, kind, tmp_path / "model")
    prompts = tiny.windows(6, 8).tokens
    (tmp_path / "prompts.json").write_text(json.dumps(prompts.tolist()))
    found = told_by(PYTHON, "served_by_vllm.py", tmp_path, tmp_path / "model", tmp_path / "prompts.json", **DIRTY)
    for prompt, (tokens, told) in zip(prompts, found, strict=True):
        whole = torch.cat([prompt, torch.tensor(tokens)])
        scores = model(input_ids=whole[None]).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
        assert scores.argmax(-1).tolist() == tokens
        torch.testing.assert_close(scores.amax(-1), torch.tensor(told), rtol=1e-4, atol=1e-4)

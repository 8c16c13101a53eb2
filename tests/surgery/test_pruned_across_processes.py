"""Models whose layers differ, trained by several processes, and spread over devices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from optimum_prune import Cuts
from optimum_prune import testing as conformance

TESTS = Path(__file__).parent.parent
GONE = Cuts(blocks={0: ("feed_forward",), 2: ("attention",), 4: ("feed_forward",)})
UNEVEN = Cuts.along("channels", {1: tuple(range(24))}).merge(Cuts.along("heads", {3: (1,)})).merge(GONE)


@pytest.fixture
def folder(decoder, tmp_path):
    conformance.cut(decoder, UNEVEN)
    decoder.model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("name", ["llama"])
def test_two_processes_train_it_and_every_parameter_has_the_mean_gradient(folder, tmp_path):
    """Without being told to look for parameters that have none."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = [TESTS / "surgery" / "distributed_run.py", folder, tmp_path / "gradients.safetensors"]
    place = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"}
    command = [*launcher, *map(str, script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=place, timeout=300)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "gradients.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder).train()
    for row in tiny.windows(2).tokens:
        (model(input_ids=row[None], labels=row[None]).loss / 2).backward()
    expected = {name: each.grad for name, each in model.named_parameters()}
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_layers_that_lie_on_disk_compute_the_same(folder, tmp_path):
    """As `device_map="auto"` spreads a model over what there is: here the CPU, and files."""
    whole = AutoModelForCausalLM.from_pretrained(folder)
    listed = [f"model.layers.{index}" for index in range(tiny.LAYERS)]
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {name: "disk" if index % 2 else "cpu" for index, name in enumerate(listed)}
    spread = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "files")
    assert set(spread.hf_device_map.values()) == {"cpu", "disk"}
    windows = tiny.windows(2)
    assert_close(conformance.logits(spread, windows), conformance.logits(whole, windows))
    asked = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(windows.tokens)}
    assert torch.equal(spread.generate(windows.tokens, **asked), whole.generate(windows.tokens, **asked))

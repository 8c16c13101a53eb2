"""The export pass `padded`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from optimum_prune import CheckpointSpec, Depth, Osscar, Recipe, Settings, Text, compress
from optimum_prune.builtin.export.padded import Padded
from optimum_prune.builtin.prune.block_pruner import BlockPruner
from optimum_prune.builtin.prune.experts import ExpertPruner
from optimum_prune.errors import RecipeError
from optimum_prune.selection.mixtures import AXIS

UNEVEN = Osscar(ratio=0.5, head_ratio=0.5, protect=(0, 3))


@pytest.fixture
def padded(checkpoints, text_file, tmp_path):
    """Pruning passes -> the folder of a run that ends with `padded`, and what the report says of it."""

    def run(*steps, name="llama", model=None):
        recipe = Recipe(
            passes=(*steps, Padded()),
            calibration=Text(text=str(text_file), samples=8, length=32),
            evaluation=Text(samples=2),
            settings=Settings(model=str(model or checkpoints(name)), device="cpu"),
        )
        compress(recipe, tmp_path / "out")
        report = json.loads((tmp_path / "out" / "compression" / "report.json").read_text())
        return tmp_path / "out", report["passes"][-1]

    return run


@pytest.mark.parametrize("steps", [[UNEVEN], [BlockPruner(blocks=3)]], ids=["sizes", "blocks"])
def test_beside_the_model_lies_a_stock_one_that_computes_the_same(padded, steps):
    folder, told = padded(*steps)
    small, whole = (AutoModelForCausalLM.from_pretrained(each) for each in (folder, folder / "padded"))
    assert json.loads((folder / "padded" / "config.json").read_text())["model_type"] == "llama"
    assert not (folder / "padded" / "modeling_pruned.py").exists()
    tokens = torch.arange(24).view(2, 12)
    torch.testing.assert_close(whole(tokens).logits, small(tokens).logits, rtol=1e-5, atol=1e-5)
    counts = [sum(weight.numel() for weight in each.parameters()) for each in (small, whole)]
    (evidence,) = told["decisions"] if isinstance(told["decisions"], list) else [told["decisions"]]
    assert evidence["parameters"] == counts[1] > counts[0]
    assert evidence["times_the_parameters"] == pytest.approx(counts[1] / counts[0])
    assert set(evidence["times_as_long"]) == {"prefill", "decode"}


def test_what_lies_beside_the_weights_comes_along(checkpoints, padded, tmp_path):
    source = shutil.copytree(checkpoints("llama"), tmp_path / "source")
    (source / "LICENSE").write_text("As you like.")
    folder, _ = padded(UNEVEN, model=source)
    assert (folder / "padded" / "LICENSE").read_text() == "As you like."
    assert "rope_theta" in json.loads((folder / "padded" / "config.json").read_text()), "transformers 4 reads it there"


def test_its_example_runs_without_this_package(padded):
    folder, _ = padded(UNEVEN)
    code = f"import runpy, sys; sys.modules['optimum_prune'] = None; runpy.run_path({str(folder / 'padded' / 'example.py')!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ})
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("Once upon a time")


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_layers_that_are_as_their_config_says_need_no_zeros(padded, name):
    with pytest.raises(RecipeError, match="it is a stock checkpoint already"):
        padded(Depth(drop=(3,)), name=name)


@pytest.mark.parametrize("name", ["gpt2", "opt", "phi3"])
def test_models_that_take_few_tokens_are_filled_up_as_well(padded, name):
    folder, _ = padded(Osscar(ratio=0.5, protect=(0, 3)), name=name)
    small, whole = (AutoModelForCausalLM.from_pretrained(each) for each in (folder, folder / "padded"))
    tokens = torch.arange(24).view(2, 12)
    torch.testing.assert_close(whole(tokens).logits, small(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["mixtral"])
def test_a_router_would_choose_experts_of_zeros(name, decoder):
    shape = decoder.shape()
    uneven = replace(shape, layers=(shape.layers[0].narrowed({AXIS: 2}), *shape.layers[1:]))
    with pytest.raises(RecipeError, match="router would choose those of zeros"):
        Padded().check(CheckpointSpec(decoder.config, decoder.family, uneven))


def test_experts_of_which_a_search_decides_are_known_beforehand_to_differ(padded):
    with pytest.raises(RecipeError, match="router would choose those of zeros"):
        padded(ExpertPruner(ratio=0.25, allocation="global"), name="mixtral")

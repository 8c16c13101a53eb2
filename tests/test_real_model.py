"""The main job on a real model and real text, from the packages that `make demo` uses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_prune.cli.main import main

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    subprocess.run([sys.executable, EXAMPLES / "fetch_model_and_text.py", folder], check=True, capture_output=True)
    return folder


def test_the_demo_recipe_leaves_a_model_that_still_reads_and_writes(demo, capsys):
    model = next((demo / "model").glob("*.gguf"))
    texts = ["--text", demo / "calibration.txt", "--samples", 4, "--length", 256]
    texts += ["--eval-text", demo / "evaluation.txt", "--eval-samples", 4, "--eval-length", 256]
    recipe, out = EXAMPLES / "recipes" / "depth-osscar.yaml", demo / "pruned"
    assert main(["compress", "run", *map(str, [recipe, "--model", model, *texts, "--output", out])]) == 0
    assert "Perplexity" in capsys.readouterr().out

    report = json.loads((out / "compression" / "report.json").read_text())
    assert report["parameters"]["before"] == 134_515_008
    assert report["parameters"]["after"] / report["parameters"]["before"] < 0.9
    depth = report["passes"][0]["decisions"][-1]
    assert max(depth["dropped"]) < 29, "the last layer is dear"
    assert 15 < report["perplexity"]["before"] < 40
    assert report["perplexity"]["before"] < report["perplexity"]["after"] < 3 * report["perplexity"]["before"]
    assert report["verified"]["max_logit_difference"] == 0

    stock = AutoModelForCausalLM.from_pretrained(out)
    tokens = AutoTokenizer.from_pretrained(out)("The capital of France is", return_tensors="pt")
    assert stock.dtype == torch.bfloat16
    assert stock.config.num_hidden_layers == 28
    assert stock.generate(**tokens, max_new_tokens=5, do_sample=False).shape[1] == tokens["input_ids"].shape[1] + 5

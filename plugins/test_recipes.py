"""Whole recipes with all plugins in one environment: what the README and the examples promise."""

import json
import os
from pathlib import Path

import pytest
import tiny
import yaml

from optimum_prune import Recipe, Settings, Text, compress
from optimum_prune.cli.main import main
from optimum_prune.cli.readme import extras_missing, passes_table
from optimum_prune.errors import RecipeError, VerificationError

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the libraries behind the plugins
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
RECIPES = sorted((ROOT / "examples/recipes").glob("*.yaml"))


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "text.txt"
    file.write_text(tiny.text(3000), encoding="utf-8")
    return file


@pytest.fixture
def run(small, text, plugins):
    def run(output, *steps, **options):
        recipe = Recipe.from_dict({"passes": list(steps)}, plugins)
        texts = Text(text=str(text), samples=8, length=32), Text(samples=4)
        settings = Settings(model=str(small), device="cpu")
        whole = Recipe(passes=recipe.passes, calibration=texts[0], evaluation=texts[1], settings=settings)
        compress(whole, output, **options)
        report = json.loads((output / "compression/report.json").read_text())
        return {step["name"]: step["artefact"] for step in report["passes"] if "artefact" in step}

    return run


def test_every_extra_brings_its_pass(plugins):
    assert extras_missing(plugins) == []


def test_the_readme_lists_what_the_extras_bring(plugins):
    assert passes_table(plugins, of_extras=True) in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_the_examples_can_be_carried_out(recipe, plugins):
    steps = yaml.safe_load(recipe.read_text())["passes"]
    if any("llm-compressor" in step for step in steps) and "OPTIMUM_PRUNE_PYTHON_LLM_COMPRESSOR" not in os.environ:
        pytest.skip("OPTIMUM_PRUNE_PYTHON_LLM_COMPRESSOR does not name where llm-compressor is")
    assert len(Recipe.from_yaml(recipe, plugins).passes) == len(steps)


def test_pruned_quantized_and_evaluated_again(run, text, tmp_path, capsys):
    found = run(tmp_path / "out", {"osscar": {"ratio": 0.25, "multiple_of": 64}}, {"gptq": {"bits": 4}})
    assert found["gptq"]["difference"] < found["gptq"]["tolerance"]
    again = [
        "compress",
        "evaluate",
        str(tmp_path / "out"),
        "--text",
        str(text),
        "--samples",
        "4",
        "--length",
        "32",
        "--json",
    ]
    assert main(again) == 0
    assert json.loads(capsys.readouterr().out)["perplexity"] > 1


def test_one_heterogeneous_model_for_every_runtime(run, text, tmp_path, capsys):
    steps = [{"osscar": {"params": 0.85, "allocation": "global", "multiple_of": 32}}, "onnx", "openvino", "gguf"]
    found = run(tmp_path / "out", *steps)
    assert {name for name in found if (tmp_path / "out" / name / "example.py").is_file()} == {
        "onnx",
        "openvino",
        "gguf",
    }
    for artefact in found.values():
        assert artefact["difference"] < 0.01
    perplexities = [artefact["perplexity"] for artefact in found.values()]
    assert max(perplexities) == pytest.approx(min(perplexities), rel=0.01)
    again = [
        "compress",
        "evaluate",
        str(tmp_path / "out/onnx"),
        "--text",
        str(text),
        "--samples",
        "4",
        "--length",
        "32",
    ]
    assert main([*again, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == found["onnx"]["bytes"]


def test_groups_are_checked_before_anything_runs(run, tmp_path):
    with pytest.raises(RecipeError, match=r"'gptq' has groups of 64 .*multiple_of: 64"):
        run(tmp_path / "out", {"osscar": {"ratio": 0.3, "multiple_of": 16}}, {"gptq": {"group_size": 64}})


def test_a_late_failure_is_mended_and_gone_on_from(run, tmp_path):
    with pytest.raises(VerificationError, match=r"tolerated.*The checkpoint after osscar is kept"):
        run(tmp_path / "out", {"osscar": {"ratio": 0.25}}, {"onnx": {"quantize": "int8", "tolerance": 1e-9}})
    found = run(tmp_path / "out", {"osscar": {"ratio": 0.25}}, {"onnx": {"quantize": "int8"}}, resume=True)
    assert found["onnx"]["difference"] > 1e-9

from __future__ import annotations

import json
import re
import shutil
import sys

import pytest
import tiny
from command_line import MODULE, OPTIMUM_CLI, common, names, one_sentence, process, recipe_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from optimum_prune import Osscar, Pruner, Text


def test_depth_by_the_module_in_a_process_of_its_own(llama, text_file, work):
    done = process(*MODULE, "prune", "depth", "--layers", 2, "--output", work / "out", *common(llama, text_file))
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^Perplexity +[\d,.]+ +[\d,.]+ +[+-][\d.]+ %$", done.stdout, re.MULTILINE)
    assert f"Saved to {work / 'out'}" in done.stdout
    assert AutoModelForCausalLM.from_pretrained(work / "out").config.num_hidden_layers == tiny.LAYERS - 2


def test_osscar_by_optimum_cli(llama, text_file, work):
    done = process(
        OPTIMUM_CLI, "prune", "osscar", "--ratio", 0.25, "--output", work / "out", *common(llama, text_file)
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert AutoModelForCausalLM.from_pretrained(work / "out").config.intermediate_size == 48


def test_optimum_cli_hands_on_flags_and_exit_codes(work):
    done = process(OPTIMUM_CLI, "compress", "run", work / "no.yaml", "--output", work / "out")
    assert done.returncode == 1
    assert "cannot be read" in done.stderr
    assert "Traceback" not in done.stderr
    helped = process(OPTIMUM_CLI, "prune", "osscar", "--help")
    assert helped.returncode == 0
    assert "--ratio" in helped.stdout


def test_the_command_line_and_the_recipe_and_python_make_the_same_model(cli, llama, text_file, work, monkeypatch):
    monkeypatch.chdir(llama.parents[1])
    code, _, error = cli("prune", "osscar", "--ratio", 0.25, "--output", work / "a", *common(llama, text_file))
    assert (code, error) == (0, "")
    code, _, error = cli("compress", "run", work / "a" / "compression" / "recipe.yaml", "--output", work / "b")
    assert (code, error) == (0, "")
    text = Text(text=str(text_file), samples=6, length=32)
    pruner = Pruner.from_pretrained(llama, device="cpu")
    pruner.prune(Osscar(ratio=0.25), calibration=text, evaluation=Text(samples=3), save_dir=work / "c")
    weights = [(work / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] == weights[2]


def test_flags_override_the_recipe(cli, llama, text_file, other_text_file, work):
    recipe = recipe_file(
        work,
        "model: /nowhere\nseed: 1\ndtype: float32\ncalibration: {dataset: no/where, samples: 2, length: 20}\n"
        "evaluation: {samples: 2}\npasses: [depth: {drop: [1]}]",
    )
    arguments = [
        *common(llama, text_file),
        "--seed",
        5,
        "--dtype",
        "bfloat16",
        "--eval-text",
        other_text_file,
        "--eval-length",
        24,
    ]
    code, _, error = cli("compress", "run", recipe, "--output", work / "out", *arguments)
    assert (code, error) == (0, "")
    report = json.loads((work / "out" / "compression" / "report.json").read_text())
    assert report["calibration"] == {"text": "invented.txt", "windows": 6, "length": 32, "bos": True, "seed": 5}
    protocol = report["perplexity"]["protocol"]
    assert (protocol["text"], protocol["windows"], protocol["length"], protocol["dtype"]) == (
        "other.txt",
        3,
        24,
        "bfloat16",
    )


def test_several_values_of_one_flag(cli, llama, text_file, work):
    code, _, _ = cli("prune", "depth", "--drop", 0, 5, "--output", work / "out", *common(llama, text_file))
    assert code == 0
    cuts = json.loads((work / "out" / "compression" / "cuts.json").read_text())
    assert cuts == [{"pass": "depth", "layers": "1-4"}]


def test_quiet_is_quiet(cli, llama, text_file, work):
    code, out, error = cli(
        "prune", "depth", "--drop", 0, "--quiet", "--output", work / "out", *common(llama, text_file)
    )
    assert (code, out, error) == (0, "", "")


def test_overwrite_replaces(cli, llama, text_file, work):
    shutil.copytree(llama, work / "out")
    arguments = ["prune", "depth", "--drop", 0, "--output", work / "out", *common(llama, text_file)]
    code, _, error = cli(*arguments)
    assert code == 1
    assert "exists already" in one_sentence(error)
    assert AutoModelForCausalLM.from_pretrained(work / "out").config.num_hidden_layers == tiny.LAYERS
    assert cli(*arguments, "--overwrite")[0] == 0
    assert AutoModelForCausalLM.from_pretrained(work / "out").config.num_hidden_layers == tiny.LAYERS - 1
    assert names(work) == ["out"]


def test_plan_tells_shapes_and_sizes_and_writes_nothing(cli, llama, work):
    recipe = recipe_file(work, "passes: [osscar: {ratio: 0.25}, depth: {layers: 2}]")
    (work / "model").mkdir()
    shutil.copy(llama / "config.json", work / "model")
    code, out, error = cli("compress", "plan", recipe, "--model", work / "model")
    assert (code, error) == (0, "")
    rows = {line.split()[0]: line.split() for line in out.splitlines()[1:]}
    assert rows["loading"][1:4] == ["6", "2", "64"]
    assert rows["osscar"][1:5] == ["PRUNE", "6", "2", "48"]
    assert rows["depth"][1:5] == ["PRUNE", "4", "2", "48"]
    assert {"evaluation", "saving", "verification"} <= rows.keys()
    assert re.search(r"In all about [\d.]+ GB of memory, at most about .+, and [\d.]+ GB on disk\.", out)
    assert names(work) == ["model", "recipe.yaml"]


@pytest.fixture
def mixture(checkpoints):
    return checkpoints("qwen3_moe")


def test_plan_tells_the_range_where_layers_differ(llama, mixture, cli, work):
    recipe = recipe_file(work, "passes: [osscar: {ratio: 0.5, head_ratio: 0.5, protect: [0, 5]}]")
    code, out, error = cli("compress", "plan", recipe, "--model", llama)
    assert (code, error) == (0, "")
    assert "1-2 (1.333 on average)" in out
    assert "32-64 (42.67 on average)" in out
    recipe = recipe_file(work, "passes: [osscar: {ratio: 0.5}]")
    code, out, error = cli("compress", "plan", recipe, "--model", mixture)
    assert (code, error) == (0, "")
    before, after = (line for line in out.splitlines() if line.startswith(("loading", "osscar")))
    assert "64, experts 24" in before
    assert re.search(r"32, experts (8|16) ", after)


def test_a_model_whose_layers_differ_is_pruned_and_evaluated(cli, llama, text_file, work):
    flags = ["--ratio", 0.5, "--head-ratio", 0.5, "--protect", 0, 5]
    code, _, error = cli("prune", "osscar", *flags, "--output", work / "out", *common(llama, text_file))
    assert (code, error) == (0, "")
    report = json.loads((work / "out" / "compression" / "report.json").read_text())
    code, out, error = cli(
        "compress", "evaluate", work / "out", "--text", text_file, "--samples", 3, "--length", 32, "--json"
    )
    assert (code, error) == (0, "")
    assert json.loads(out)["parameters"] == report["parameters"]["after"]


def test_plan_refuses_what_run_would_refuse(cli, llama, work):
    code, _, error = cli("compress", "plan", recipe_file(work, "passes: [depth: {layers: 6}]"), "--model", llama)
    assert code == 1
    assert "6 layers of 6" in one_sentence(error)


def test_evaluate_measures_any_checkpoint(cli, llama, text_file):
    arguments = ["compress", "evaluate", llama, "--text", text_file, "--samples", 5, "--length", 32]
    code, out, error = cli(*arguments, "--json")
    assert (code, error) == (0, "")
    found = json.loads(out)
    assert found["protocol"]["windows"] == 5
    assert found["parameters"] == tiny.model("llama").num_parameters()
    assert found["bytes"] == (llama / "model.safetensors").stat().st_size
    code, out, _ = cli(*arguments)
    assert code == 0
    assert f"Perplexity {found['perplexity']:,.3f} on invented.txt: 5 windows of 32 tokens" in out
    assert json.loads(
        cli(
            "compress", "evaluate", llama, "--eval-text", text_file, "--eval-samples", 5, "--eval-length", 32, "--json"
        )[1]
    )["perplexity"] == pytest.approx(found["perplexity"])


def test_evaluate_agrees_with_the_report(cli, llama, text_file, other_text_file, work):
    arguments = common(llama, text_file)
    cli("prune", "osscar", "--ratio", 0.25, "--output", work / "out", *arguments, "--eval-text", other_text_file)
    report = json.loads((work / "out" / "compression" / "report.json").read_text())["perplexity"]
    for when, folder in (("before", llama), ("after", work / "out")):
        _, out, _ = cli(
            "compress", "evaluate", folder, "--text", other_text_file, "--samples", 3, "--length", 32, "--json"
        )
        found = json.loads(out)
        assert found["perplexity"] == pytest.approx(report[when], rel=1e-9)
        assert found["protocol"] == report["protocol"]


def test_passes_and_families_are_listed(cli):
    code, out, error = cli("compress", "passes")
    assert (code, error) == (0, "")
    assert re.search(r"^depth +PRUNE +optimum-prune [\d.]+ ", out, re.MULTILINE)
    assert re.search(r"^osscar +PRUNE +optimum-prune [\d.]+ ", out, re.MULTILINE)
    code, out, error = cli("compress", "families")
    assert (code, error) == (0, "")
    for model_type in ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "gemma3", "opt"):
        assert re.search(rf"\b{model_type}\b", out)


@pytest.mark.parametrize(
    "command",
    [
        *("prune", "prune depth", "prune osscar", "compress", "compress run", "compress plan", "compress evaluate"),
        *("compress quantize", "compress export", "compress export padded"),
    ],
)
def test_help_helps(command, cli):
    code, out, error = cli(*command.split(), "--help")
    assert (code, error) == (0, "")
    assert "usage:" in out
    if command in ("prune depth", "compress run"):
        for flag in [
            "model",
            "output",
            "text",
            "dataset",
            "samples",
            "length",
            "seed",
            "dtype",
            "device",
            "eval-text",
            "eval-samples",
            "eval-length",
            "overwrite",
            "quiet",
        ]:
            assert f"--{flag} " in out or f"--{flag}\n" in out, flag


def test_help_imports_no_model_library():
    code = "import sys; from optimum_prune.cli.main import main\ntry:\n    main(['prune', 'osscar', '--help'])\nexcept SystemExit:\n    pass\n"
    done = process(
        sys.executable, "-c", code + "print([m for m in ('transformers', 'datasets', 'optimum') if m in sys.modules])"
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def test_a_checkpoint_whose_layers_differ_is_exported_by_a_command(cli, llama, text_file, work):
    flags = ["--ratio", 0.25, "--protect", 0, "--multiple-of", 8]
    code, _, error = cli("prune", "osscar", *flags, "--output", work / "uneven", *common(llama, text_file))
    assert (code, error) == (0, "")
    code, out, error = cli(
        "compress",
        "export",
        "padded",
        "--tolerance",
        1e-5,
        "--output",
        work / "out",
        *common(work / "uneven", text_file),
    )
    assert (code, error) == (0, "")
    assert "in padded/" in out
    stock = AutoModelForCausalLM.from_pretrained(work / "out" / "padded")
    assert type(stock).__name__ == "LlamaForCausalLM"
    uneven = AutoModelForCausalLM.from_pretrained(work / "uneven")
    windows = tiny.windows(2)
    assert_close(stock(windows.tokens).logits, uneven(windows.tokens).logits)


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (["export", "paded"], "No method is called 'paded'. Did you mean 'padded'?"),
        (["quantize", "padded"], "'padded' is no method of compress quantize. Use compress export."),
    ],
    ids=str,
)
def test_a_method_of_another_stage_or_of_none_is_no_method(command, why, cli, llama, text_file, work):
    code, _, error = cli("compress", *command, "--output", work / "out", *common(llama, text_file))
    assert code == 1
    assert why in error
    one_sentence(error)

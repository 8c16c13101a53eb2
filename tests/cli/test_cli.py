from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from optimum_prune.cli.main import main

OPTIMUM_CLI = Path(sys.executable).parent / "optimum-cli"
MODULE = (sys.executable, "-m", "optimum_prune")


@pytest.fixture(autouse=True)
def _signals():
    """`main` listens for SIGTERM; the tests' own process should not go on doing so."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def cli(capsys):
    """Runs a command in this process: exit code, stdout, stderr."""

    def run(*arguments):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit:
            code = exit.code
        captured = capsys.readouterr()
        return code or 0, captured.out, captured.err

    return run


@pytest.fixture
def work(tmp_path):
    """An empty folder to write to."""
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def recipe_file(folder, text):
    file = folder / "recipe.yaml"
    file.write_text(text)
    return file


def common(model, text):
    return ["--model", model, "--text", text, "--samples", 6, "--length", 32, "--eval-samples", 3, "--device", "cpu"]


def process(*command, **options):
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, timeout=120, **options
    )


def one_sentence(error):
    lines = error.strip().splitlines()
    assert len(lines) == 1, error
    assert "Traceback" not in error
    assert re.search(r"error: \S|interrupted", lines[0])
    return lines[0]


# What works


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


def test_the_command_line_and_the_recipe_and_python_make_the_same_model(cli, llama, text_file, work):
    code, _, error = cli("prune", "osscar", "--ratio", 0.25, "--output", work / "a", *common(llama, text_file))
    assert (code, error) == (0, "")
    code, _, error = cli("compress", "run", work / "a" / "compression" / "recipe.yaml", "--output", work / "b")
    assert (code, error) == (0, "")
    assert (work / "a" / "model.safetensors").read_bytes() == (work / "b" / "model.safetensors").read_bytes()


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
    ["prune", "prune depth", "prune osscar", "compress", "compress run", "compress plan", "compress evaluate"],
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


# What is refused: one sentence, and nothing is left behind


def weights_cut_short(model):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-500])


def weights_scrambled(model):
    (model / "model.safetensors").write_bytes(b"\xff" * 1000)


def config_removed(model):
    (model / "config.json").unlink()


def config_scrambled(model):
    (model / "config.json").write_text("{")


def config_unheard_of(model):
    plain = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**plain, "model_type": "never_heard_of"}))


def tokenizer_removed(model):
    for file in model.glob("token*"):
        file.unlink()


def quantized(model):
    plain = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**plain, "quantization_config": {"quant_method": "awq"}}))


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (weights_cut_short, "damaged"),
        (weights_scrambled, "damaged"),
        (config_removed, "no config.json"),
        (config_scrambled, "cannot be opened as a model"),
        (config_unheard_of, "never_heard_of"),
        (tokenizer_removed, "tokenizer"),
        (quantized, "already quantized"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_broken_model_is_refused(harm, why, cli, llama, text_file, tmp_path, work):
    model = shutil.copytree(llama, tmp_path / "model")
    harm(model)
    code, out, error = cli("prune", "depth", "--layers", 2, "--output", work / "out", *common(model, text_file))
    assert (code, out) == (1, "")
    assert why in one_sentence(error)
    assert names(work) == []


def test_an_architecture_without_a_family_is_refused_with_a_plugin_for_it(cli, llama, text_file, tmp_path, work):
    model = shutil.copytree(llama, tmp_path / "model")
    plain = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**plain, "model_type": "bloom"}))
    code, _, error = cli("prune", "depth", "--layers", 2, "--output", work / "out", *common(model, text_file))
    assert code == 1
    assert "No family describes the architecture 'bloom'" in error.splitlines()[0]
    assert "Traceback" not in error
    assert "def families():" in error
    assert names(work) == []


@pytest.mark.parametrize(
    ("content", "arguments", "why"),
    [
        (None, [], "does not exist"),
        ("", [], "is empty"),
        ("Gou fanfan.", [], "too few"),
        (tiny.text(40), ["--eval-samples", 50], "too few"),
        (tiny.text(300), ["--length", 129], "at most 128"),
        (tiny.text(300), ["--length", 1], "at least 2"),
        (tiny.text(300), ["--samples", 0], "0 calibration windows"),
        (tiny.text(300), ["--samples", -1], "-1 windows"),
    ],
    ids=["missing", "empty", "short", "short for both", "too long windows", "length 1", "samples 0", "samples -1"],
)
def test_a_text_that_cannot_be_used_is_refused(content, arguments, why, cli, llama, tmp_path, work):
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_text(content)
    code, out, error = cli(
        "prune", "osscar", "--ratio", 0.2, "--output", work / "out", *common(llama, text), *arguments
    )
    assert (code, out) == (1, "")
    assert why in one_sentence(error)
    assert names(work) == []


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["prune", "oscar", "--ratio", 0.1], "No method is called 'oscar'. Did you mean 'osscar'?"),
        (["prune", "osscar", "--ratio", 1.5], "ratio 1.5"),
        (["prune", "osscar", "--ratio", 0], "ratio 0"),
        (["prune", "osscar", "--ratio", "nan"], ""),
        (["prune", "osscar", "--ratio", "much"], "ratio"),
        (["prune", "osscar"], "ratio"),
        (["prune", "osscar", "--ration", 0.1], "ratio"),
        (["prune", "osscar", "--ratio", 0.1, "--damping", "nan"], ""),
        (["prune", "osscar", "--ratio", 0.1, "--multiple-of", 64], "multiple_of"),
        (["prune", "depth"], "exactly one"),
        (["prune", "depth", "--layers", 6], "6 layers of 6"),
        (["prune", "depth", "--layers", 0], "0 layers"),
        (["prune", "depth", "--drop", 6], "only 0 to 5"),
        (["prune", "depth", "--drop", 1, 1], "each layer once"),
        (["prune", "depth", "--layers", 1, "--device", "cuda:77"], "cuda:77"),
        (["prune", "depth", "--layers", 1, "--device", "abacus"], "abacus"),
        (["prune", "depth", "--layers", 1, "--dtype", "float8"], "float8"),
        (["prune", "depth", "--layers", 1, "--model", "/nowhere"], "does not exist"),
        (["prune", "depth", "--layers", 1, "--model", ""], "Name a folder"),
        (["prune", "depth", "--layers", 1, "--dataset", "a/b"], "Name one of them"),
        (["prune", "depth", "--layers", 1, "stray"], "stray"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_a_command_that_cannot_be_carried_out_is_refused(arguments, why, cli, llama, text_file, work):
    method, options = arguments[:2], arguments[2:]
    code, out, error = cli(*method, *common(llama, text_file), "--output", work / "out", *options)
    assert code in (1, 2)
    assert out == ""
    assert why in one_sentence(error)
    assert names(work) == []


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["prune"],
        ["compress"],
        ["compress", "everything"],
        ["compress", "run"],
        ["prune", "depth", "--layers", 1],
        ["prune", "depth", "--layers", 1, "--output", "out"],
        ["compress", "evaluate"],
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_a_command_that_is_not_whole_is_refused(arguments, cli, work, monkeypatch):
    monkeypatch.chdir(work)
    code, out, error = cli(*arguments)
    assert code in (1, 2)
    assert out == ""
    one_sentence(error)
    assert names(work) == []


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        ("passes: [{oscar: {ratio: 0.1}}]", "Did you mean 'osscar'?"),
        ("passes: [{osscar: {ration: 0.1}}]", "Did you mean 'ratio'?"),
        ("passes: [{osscar: {ratio: 1.5}}]", "ratio 1.5"),
        ("passes: [{depth: {layers: 60}}]", "60 layers of 6"),
        ("passes: [{depth: {layers: 3}}, {depth: {layers: 3}}]", "3 layers of 3"),
        ("passes: [", "not plain YAML"),
        ("passes: !!python/object/apply:os.system ['touch made']", "not plain YAML"),
        ("", "empty"),
        ("passes: [{depth: {layers: 1}}]\ncalibration: {text: nowhere.txt}", "does not exist"),
    ],
    ids=lambda value: value,
)
def test_a_wrong_recipe_is_refused(recipe, why, cli, llama, text_file, tmp_path, work, monkeypatch):
    monkeypatch.chdir(work)
    file = recipe_file(tmp_path, recipe)
    code, out, error = cli("compress", "run", file, "--output", work / "out", *common(llama, text_file))
    assert (code, out) == (1, "")
    assert why in one_sentence(error)
    assert names(work) == []


PLUGIN = """
from dataclasses import dataclass
from typing import ClassVar
from optimum_prune import FolderPass, Stage, hookimpl

@dataclass(frozen=True, kw_only=True)
class Pack(FolderPass):
    \"\"\"Packs weights.\"\"\"

    name: ClassVar[str] = "pack"
    stage: ClassVar[Stage] = Stage.QUANTIZE
    requires: ClassVar[dict[str, str]] = {{{requires}}}

    def check(self, prospect): ...
    def convert(self, job): ...
    def open(self, folder, device): ...

@hookimpl
def passes():
    yield Pack
"""


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """Installs a plugin with a quantizer."""

    def install(requires="", source=PLUGIN):
        site = tmp_path / "site"
        (site / "stranger-0.3.dist-info").mkdir(parents=True)
        (site / "stranger-0.3.dist-info" / "METADATA").write_text(
            "Metadata-Version: 2.1\nName: stranger\nVersion: 0.3\n"
        )
        (site / "stranger-0.3.dist-info" / "entry_points.txt").write_text(
            "[optimum_prune]\nstranger = stranger_plugin\n"
        )
        (site / "stranger_plugin.py").write_text(source.format(requires=requires))
        monkeypatch.syspath_prepend(site)
        monkeypatch.delitem(sys.modules, "stranger_plugin", raising=False)

    yield install
    sys.modules.pop("stranger_plugin", None)


def test_stages_out_of_order_are_refused(stranger, cli, llama, text_file, tmp_path, work):
    stranger()
    file = recipe_file(tmp_path, "passes: [pack, {depth: {layers: 1}}]")
    code, _, error = cli("compress", "run", file, "--output", work / "out", *common(llama, text_file))
    assert code == 1
    assert "'depth' (PRUNE) comes after 'pack' (QUANTIZE)" in one_sentence(error)
    assert names(work) == []


def test_a_pass_whose_libraries_are_missing_is_listed_and_refused(stranger, cli, llama, text_file, tmp_path, work):
    stranger(requires="'no_such_module_anywhere': 'no-such-module'")
    assert re.search(
        r"^pack +QUANTIZE +stranger 0\.3 +no_such_module_anywhere +Packs weights\.$",
        cli("compress", "passes")[1],
        re.MULTILINE,
    )
    file = recipe_file(tmp_path, "passes: [{depth: {layers: 1}}, pack]")
    code, _, error = cli("compress", "run", file, "--output", work / "out", *common(llama, text_file))
    assert code == 1
    assert "no_such_module_anywhere" in one_sentence(error)
    assert names(work) == []


def test_a_broken_plugin_is_named(stranger, cli):
    stranger(source="1 / 0")
    code, _, error = cli("compress", "passes")
    assert code == 1
    assert "stranger (stranger)" in one_sentence(error)


def test_an_output_that_cannot_be_is_refused(cli, llama, text_file, work):
    (work / "file").write_text("")
    arguments = ["prune", "depth", "--layers", 1, *common(llama, text_file), "--output"]
    for output, more in [
        (work / "file", []),
        (work / "file", ["--overwrite"]),
        (work / "file" / "out", []),
        (llama, ["--overwrite"]),
    ]:
        code, out, error = cli(*arguments, output, *more)
        assert (code, out) == (1, "")
        one_sentence(error)
    assert names(work) == ["file"]
    assert (llama / "model.safetensors").is_file()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(dtype, llama, text_file, work):
    done = process(
        *(
            *MODULE,
            "prune",
            "depth",
            "--layers",
            1,
            "--dtype",
            dtype,
            "--output",
            work / "out",
            *common(llama, text_file),
        ),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)),
    )
    assert done.returncode == 1, done.stderr
    assert "cannot be written" in one_sentence(done.stderr)
    assert names(work) == ["out.unfinished"]


@pytest.fixture
def started(llama, text_file, work):
    """A run that takes long enough to be stopped, stopped when it has begun to write."""
    text = work.parent / "long.txt"
    text.write_text(tiny.text(30_000))
    command = [*MODULE, "prune", "depth", "--layers", "1", "--output", str(work / "out"), "--model", str(llama)]
    command += ["--text", str(text), "--samples", "600", "--length", "100", "--eval-samples", "2", "--device", "cpu"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not names(work) and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.5)
    yield run
    with contextlib.suppress(ProcessLookupError):
        run.kill()
    run.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_stopped_says_so_and_leaves_no_output(number, started, work):
    assert started.poll() is None
    started.send_signal(number)
    out, error = started.communicate(timeout=30)
    # Python ends itself by SIGINT, 130 to a shell, if the interrupt passed through an `exec` of a string, as in an import.
    assert started.returncode in (130, -signal.SIGINT)
    assert out == ""
    assert "interrupted" in one_sentence(error)
    assert names(work) == (["out.unfinished"] if "kept in" in error else [])


def test_what_a_killed_run_leaves_is_no_output_and_is_cleaned_up(started, cli, llama, text_file, work):
    assert started.poll() is None
    started.kill()
    started.communicate()
    assert not (work / "out").exists()
    assert len([name for name in names(work) if name != "out.unfinished"]) == 1
    code, _, error = cli("prune", "depth", "--drop", 1, "--output", work / "out", *common(llama, text_file))
    assert (code, error) == (0, "")
    assert names(work) == ["out"]


def test_the_reader_of_the_output_may_go_away():
    done = process(
        "bash", "-c", f"{sys.executable} -m optimum_prune compress families | head -c 1; exit ${{PIPESTATUS[0]}}"
    )
    assert "Traceback" not in done.stderr


def test_the_environment_of_a_run_is_left_alone(cli, llama, text_file, work):
    before, state = dict(os.environ), torch.get_default_dtype()
    cli("prune", "depth", "--drop", 1, "--output", work / "out", *common(llama, text_file))
    assert dict(os.environ) == before
    assert torch.get_default_dtype() == state
    assert set(load_file(work / "out" / "model.safetensors"))


def test_an_unknown_architecture_is_named_before_anything_else_is_missing(cli, text_file, work):
    """Even where there is neither a tokenizer nor a weight."""
    (work / "model").mkdir()
    (work / "model" / "config.json").write_text(json.dumps({"model_type": "bloom"}))
    code, _, error = cli("prune", "depth", "--layers", 1, *common(work / "model", text_file), "--output", work / "out")
    assert code == 1
    assert "No family describes the architecture 'bloom'" in error
    assert "@hookimpl" in error
    assert names(work) == ["model"]

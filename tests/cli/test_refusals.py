"""What is refused: one sentence, and nothing is left behind."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny
from command_line import common, names, one_sentence, recipe_file


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
        "prune", "osscar", "--ratio", 0.2, "--output", work / "out", *common(llama, text, *arguments)
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
        (["prune", "osscar", "--ration", 0.1], "No flag is called '--ration'. Did you mean '--ratio'?"),
        (
            ["prune", "depth", "--layers", 1, "--overwrit"],
            "No flag is called '--overwrit'. Did you mean '--overwrite'?",
        ),
        (["prune", "depth", "--layer", 1], "No flag is called '--layer'. Did you mean '--layers'?"),
        (["prune", "depth", "--layer=1"], "No flag is called '--layer'. Did you mean '--layers'?"),
        (["prune", "depth", "--layers", 1, "--zzzz"], "No flag is called '--zzzz'. See"),
        (["prune", "osscar", "--ratio", 0.1, "--damping", "nan"], ""),
        (["prune", "osscar", "--ratio", 0.1, "--multiple-of", 64], "multiple_of"),
        (["prune", "depth"], "exactly one"),
        (["prune", "depth", "--layers", 6], "6 layers of 6"),
        (["prune", "depth", "--layers", 0], "layers 0. Give a whole number of at least 1"),
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
    code, out, error = cli(*method, "--output", work / "out", *common(llama, text_file, *options))
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
    ("arguments", "meant"),
    [
        (["--hel"], "--help"),
        (["prune", "depth", "--outpu", "x"], "--output"),
        (["compress", "--hel"], "--help"),
        (["compress", "run", "recipe.yaml", "--outpu", "x"], "--output"),
        (["compress", "plan", "recipe.yaml", "--jso"], "--json"),
        (["compress", "evaluate", "model", "--quie"], "--quiet"),
        (["compress", "passes", "--debu"], "--debug"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_flag_is_written_out(arguments, meant, cli, work, monkeypatch):
    """A part of its name would mean another flag, or several, as soon as a version or a plugin has one more."""
    monkeypatch.chdir(work)
    code, out, error = cli(*arguments)
    assert (code, out) == (2, "")
    assert f"Did you mean '{meant}'? See " in one_sentence(error)
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
        ("passes: [{depth: {layers: 1}}]\nevaluation: {text: nowhere.txt}", "does not exist"),
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


def test_an_unknown_architecture_is_named_before_anything_else_is_missing(cli, text_file, work):
    """Even where there is neither a tokenizer nor a weight."""
    (work / "model").mkdir()
    (work / "model" / "config.json").write_text(json.dumps({"model_type": "bloom"}))
    code, _, error = cli("prune", "depth", "--layers", 1, *common(work / "model", text_file), "--output", work / "out")
    assert code == 1
    assert "No family describes the architecture 'bloom'" in error
    assert "@hookimpl" in error
    assert names(work) == ["model"]

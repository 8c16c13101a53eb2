"""What the library's functions are given by mistake: one sentence says what it is, and nothing is written."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil

import numpy as np
import pytest
import tiny
import torch
from torch.nn.utils import prune

from optimum_prune import Depth, Osscar, Pruner, Recipe, Report, Settings, Text, Windows, compress, load_model
from optimum_prune.errors import CheckpointError, OptimumPruneError, RecipeError, TextError
from optimum_prune.hooks.plugins import load
from optimum_prune.report.written import writer_of
from optimum_prune.testing.passes import check_pass
from optimum_prune.text.windows import Texts

ODD = [None, 1, 1.5, True, b"x", {}, object(), np.array([1, 2]), torch.tensor(1), int]
WINDOWS = tiny.windows(3, 16)


@pytest.fixture
def recipe(llama, text_file):
    return Recipe(
        passes=(Depth(drop=(1,)),),
        calibration=Text(text=str(text_file), samples=2, length=16),
        evaluation=Text(samples=0),
        settings=Settings(model=str(llama), device="cpu"),
    )


def refused(call, *arguments, **options):
    with pytest.raises(OptimumPruneError) as caught:
        call(*arguments, **options)
    assert str(caught.value).isprintable()
    return str(caught.value)


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: type(odd).__name__)
def test_what_is_no_name_of_a_folder_is_said(odd, recipe):
    for call in (load_model, Report.read, lambda output: compress(recipe, output)):
        assert "is given as" in refused(call, odd)


@pytest.mark.parametrize("odd", ["", *ODD], ids=lambda odd: type(odd).__name__)
def test_arguments_of_another_class_are_said(odd, recipe, tmp_path):
    assert "where a Recipe should be" in refused(compress, odd, tmp_path / "out")
    for name in ("source", "texts", "progress"):
        if odd is not None:
            assert "should be" in refused(compress, recipe, tmp_path / "out", **{name: odd})
    assert "pass should be" in refused(check_pass, odd, tiny.model("llama"), tmp_path / "out")
    assert "no model of transformers" in refused(check_pass, Depth(layers=1), odd, tmp_path / "out")
    if not isinstance(odd, torch.Tensor):
        assert "no tensor" in refused(Windows.from_tokens, odd)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("odd", [None, 1, object(), torch.tensor(1)], ids=lambda odd: type(odd).__name__)
def test_hooks_and_passes_that_are_no_lists_are_said(odd, recipe, tmp_path):
    assert "hooks are given as" in refused(compress, recipe, tmp_path / "out", hooks=odd)
    assert "where a Pass should be" in refused(Recipe, passes=odd)


def test_names_in_a_sentence_break_no_line(tmp_path):
    assert r"a\nb" in refused(Depth, layers=1, search="a\nb")
    assert r"a\nb" in refused(Text, text="a\nb")
    assert r"a\nb" in refused(Report.read, tmp_path / "a\nb")


@pytest.mark.parametrize(
    "windows",
    [
        3,
        Windows(torch.rand(2, 8), torch.ones(2, 8, dtype=torch.bool), "x"),
        Windows(torch.ones(8, dtype=torch.long), torch.ones(8, dtype=torch.bool), "x"),
        Windows(WINDOWS.tokens, ~WINDOWS.mask, "x"),
        Windows(WINDOWS.tokens, WINDOWS.mask, None),
        Windows.from_tokens(-torch.ones(2, 8, dtype=torch.long)),
        Windows.from_tokens(torch.ones(0, 8, dtype=torch.long)),
        Windows.from_tokens(torch.ones(2, 1, dtype=torch.long)),
        Windows.from_tokens(torch.ones(2, 8, dtype=torch.long, device="meta")),
        Windows.from_tokens(torch.ones(1, 4000, dtype=torch.long)),
    ],
    ids=["none", "numbers", "row", "padding", "nowhere", "negative", "empty", "one token", "meta", "long"],
)
def test_windows_that_no_model_takes_are_said_before_the_run(windows, recipe, tmp_path):
    for texts in (Texts(windows, None), Texts(WINDOWS, windows)):
        with pytest.raises(TextError, match=r"[Ww]indows of tokens"):
            compress(recipe, tmp_path / "out", texts=texts)
    assert list(tmp_path.iterdir()) == []


def test_a_config_that_names_code_of_the_hub_is_not_loaded(llama, tmp_path):
    model = shutil.copytree(llama, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "attn_implementation": "somebody/kernel"}))
    with pytest.raises(CheckpointError, match=r"'somebody/kernel'.*code of the Hub"):
        load_model(model)


@pytest.mark.parametrize(
    "recipe",
    ["[" * 50_000, "passes: 3", "passes:", "passes: [[1], null, {a: 1, b: 2}, depth]", "!!set {a}", "a: &a [*a]"],
)
def test_a_recipe_of_any_content_beside_a_model_is_nobodys(recipe, tmp_path):
    place = tmp_path / "compression" / "recipe.yaml"
    place.parent.mkdir()
    place.write_text(recipe)
    assert writer_of(tmp_path, load()) is None
    assert writer_of(tmp_path / "onnx", load()) is None


def test_a_recipe_that_never_ends_is_not_read(tmp_path):
    (tmp_path / "compression").mkdir()
    os.mkfifo(tmp_path / "compression" / "recipe.yaml")
    assert writer_of(tmp_path, load()) is None


def test_a_report_of_any_content_is_refused(tmp_path):
    (tmp_path / "compression").mkdir()
    (tmp_path / "compression" / "cuts.json").write_text("[]")
    for report in ("[" * 100_000, "null", "{}", "NaN", '{"passes": 3}'):
        (tmp_path / "compression" / "report.json").write_text(report)
        refused(Report.read, tmp_path)


@pytest.mark.parametrize("device", ["meta", "x", "a\nb", ""])
def test_a_device_that_computes_nothing_is_said(device, recipe, tmp_path):
    settings = dataclasses.replace(recipe.settings, device=device)
    assert "cannot be used" in refused(compress, dataclasses.replace(recipe, settings=settings), tmp_path / "out")


# Models in memory


def under(model, path, change):
    change(model.get_submodule(path))
    return model


def shared(model):
    model.model.layers[3].mlp.up_proj.weight = model.model.layers[2].mlp.up_proj.weight
    return model


def without_config(model):
    model.config = None
    return model


UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda m: under(m, UP, torch.nn.utils.parametrizations.weight_norm), f"at {UP} are computed from others"),
        (lambda m: under(m, UP, lambda it: prune.random_unstructured(it, "weight", 0.5)), "masks of"),
        (shared, "are one and the same"),
        (without_config, "has no config"),
    ],
    ids=["parametrized", "masked", "shared", "no config"],
)
def test_a_model_that_cannot_be_cut_or_saved_is_said_before_it_is_changed(change, why):
    model = change(tiny.model("llama"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=why):
        Pruner.from_pretrained(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_autocast_of_the_process_changes_nothing(tmp_path):
    def pruned(name):
        folder = Pruner.from_pretrained(tiny.model("llama")).prune(
            Depth(drop=(1,)), calibration=WINDOWS, save_dir=tmp_path / name
        )
        return (folder / "model.safetensors").read_bytes()

    expected = pruned("plain")
    with torch.autocast("cpu"):
        assert pruned("within") == expected


def test_settings_are_checked_in_python():
    with pytest.raises(RecipeError, match="'seed'"):
        Settings(seed="x")


@pytest.mark.parametrize("step", [Depth(layers=1), Depth(drop=(1,)), Osscar(ratio=0.25)], ids=str)
@pytest.mark.parametrize(
    ("left", "why"),
    [
        (0, "has no decoder layers, so there is nothing to prune"),
        (4, "has 4 layers, .* its config describes 6 layers, .* Write into model.config what it has"),
    ],
)
def test_a_model_in_memory_that_lost_layers_by_hand_is_named_and_no_pass(left, why, step, tmp_path):
    model = tiny.model("llama")
    del model.model.layers[left:]
    refusal = refused(Pruner.from_pretrained(model).prune, step, calibration=WINDOWS, save_dir=tmp_path / "out")
    assert re.search(f"^LlamaForCausalLM {why}", refusal)
    assert list(tmp_path.iterdir()) == []


def test_a_model_in_memory_that_lost_layers_by_hand_is_pruned_when_its_config_says_so(tmp_path):
    model = tiny.model("llama")
    del model.model.layers[4:]
    model.config.num_hidden_layers = 4
    Pruner.from_pretrained(model).prune(Depth(layers=1), calibration=WINDOWS, save_dir=tmp_path / "out")
    assert load_model(tmp_path / "out").config.num_hidden_layers == 3

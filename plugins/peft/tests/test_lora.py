"""Adapters: they are trained, merged, and gone from what is saved; a model never ends worse, and a killed run goes on."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import tiny
import torch
from optimum_prune_peft import Lora
from safetensors.torch import load_file
from torch import nn
from trained import digests, recipe_on, trained

from optimum_prune import Depth, Osscar, Windows, compress
from optimum_prune.anatomy.decoder import Decoder
from optimum_prune.builtin.prune.block_pruner import BlockPruner
from optimum_prune.errors import RecipeError
from optimum_prune.hooks.plugins import load
from optimum_prune.passes.recover import Recovery
from optimum_prune.text.windows import Domain
from optimum_prune.training.lesson import Lesson
from optimum_prune.training.watch import Watch

DEPTH = Depth(drop=(2, 3))
SHORT = {"steps": 12, "batch": 256, "learning_rate": 1e-2, "patience": 100, "r": 4}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "chosen.txt").write_text(tiny.text(3000))
    (folder / "taught.txt").write_text(tiny.text(1500, seed=1))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    made = {}

    def checkpoint(family):
        if family not in made:
            made[family] = tiny.save(family, tmp_path_factory.mktemp("checkpoints") / family)
        return made[family]

    return checkpoint


@pytest.fixture
def recipe(checkpoint, texts):
    """A recipe on a tiny model."""

    def recipe(*passes, name="llama", **settings):
        return recipe_on(checkpoint(name), texts / "chosen.txt", texts / "taught.txt", *passes, **settings)

    return recipe


def changed(folder, other):
    """The names of the weights in which two checkpoints differ; they have the same."""
    mine, its = load_file(folder / "model.safetensors"), load_file(other / "model.safetensors")
    assert mine.keys() == its.keys()
    assert all(mine[name].dtype is its[name].dtype for name in mine)
    return {name for name in mine if not torch.equal(mine[name], its[name])}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss": "pretrain"},
        {"precompute": True, "top": 50},
        {"use_dora": True},
        {"use_rslora": True, "lora_dropout": 0.1},
    ],
    ids=["distill", "pretrain", "kept", "dora", "dropout"],
)
@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_adapters_of_all_linear_layers_are_trained_and_merged(name, options, recipe, tmp_path):
    compress(recipe(DEPTH, name=name), tmp_path / "pruned")
    report = compress(recipe(DEPTH, Lora(**SHORT, **options), name=name), tmp_path / "out")
    found = trained(report)
    assert found["held_out"]["after"] < found["held_out"]["before"]
    assert report.stock
    assert report.verified.max_logit_difference < 1e-4
    adapted = changed(tmp_path / "pruned", tmp_path / "out")
    every = load_file(tmp_path / "pruned/model.safetensors")
    linear = {key for key, value in every.items() if value.ndim == 2 and (".layers." in key or ".h." in key)}
    assert adapted == linear


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_merged_weights_keep_their_dtype(dtype, recipe, tmp_path):
    compress(recipe(DEPTH, Lora(**SHORT), dtype=dtype), tmp_path / "out")
    weights = load_file(tmp_path / "out/model.safetensors")
    assert {value.dtype for value in weights.values()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_are_adapted_too(name, recipe, tmp_path):
    compress(recipe(DEPTH, name=name), tmp_path / "pruned")
    report = compress(recipe(DEPTH, Lora(**SHORT), name=name), tmp_path / "out")
    assert trained(report)["held_out"]["after"] < trained(report)["held_out"]["before"]
    assert any("experts" in key for key in changed(tmp_path / "pruned", tmp_path / "out"))
    assert not any("experts" in key for key in _changed_without(recipe, tmp_path, name))


def _changed_without(recipe, tmp_path, name):
    compress(recipe(DEPTH, Lora(**SHORT, experts=False), name=name), tmp_path / "without")
    return changed(tmp_path / "pruned", tmp_path / "without")


@pytest.mark.parametrize(
    "prune", [BlockPruner(blocks=2), Osscar(ratio=0.25, allocation="global")], ids=["blocks", "widths"]
)
def test_a_model_whose_layers_differ_is_adapted(prune, recipe, tmp_path):
    report = compress(recipe(prune, Lora(**SHORT)), tmp_path / "out")
    assert trained(report)["held_out"]["after"] < trained(report)["held_out"]["before"]
    assert not report.stock


def test_only_the_layers_that_are_named_are_adapted(recipe, tmp_path):
    compress(recipe(DEPTH), tmp_path / "pruned")
    compress(recipe(DEPTH, Lora(**SHORT, target_modules=("q_proj", "down_proj"))), tmp_path / "out")
    found = changed(tmp_path / "pruned", tmp_path / "out")
    assert {name.split(".")[-2] for name in found} == {"q_proj", "down_proj"}


def test_training_that_makes_it_worse_gives_the_model_back_as_it_was(recipe, tmp_path, monkeypatch):
    compress(recipe(DEPTH), tmp_path / "pruned")
    perplexities = itertools.count(1.0)
    monkeypatch.setattr(Watch, "_measured", lambda *_: next(perplexities))
    report = compress(recipe(DEPTH, Lora(**SHORT)), tmp_path / "out")
    assert digests(tmp_path / "out") == digests(tmp_path / "pruned")
    assert any("so the model is as it was" in note for note in report.notes())


def test_a_run_that_was_killed_while_it_trained_goes_on(recipe, tmp_path, monkeypatch):
    wanted = recipe(DEPTH, Lora(**SHORT, checkpoint_minutes=0))
    whole = compress(wanted, tmp_path / "whole")
    seen = Watch.on_step_end

    def die(self, args, state, control, **rest):
        if state.global_step == 7:
            raise KeyboardInterrupt
        return seen(self, args, state, control, **rest)

    monkeypatch.setattr(Watch, "on_step_end", die)
    with pytest.raises(KeyboardInterrupt):
        compress(wanted, tmp_path / "out")
    monkeypatch.setattr(Watch, "on_step_end", seen)
    report = compress(wanted, tmp_path / "out")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert trained(report)["losses"] == trained(whole)["losses"]


# Inside the pass


def recovery(model, folder):
    """What the pass is given for a model that is its own teacher, to be trained on text."""
    starts = torch.randint(0, 200, (48, 1), generator=torch.Generator().manual_seed(0))
    windows = Windows.from_tokens(starts + torch.arange(16))  # numbers that go up by one can be learned
    lesson = Lesson((Domain("text", windows.part(slice(40)), windows.part(slice(40, 48))),), folder)
    decoder = Decoder.of(model, load().families)
    return Recovery(decoder, lambda: decoder, tuple(range(len(decoder))), None, lesson)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("stay", [True, False])
def test_zeros_of_a_mask_stay_zero(stay, name, tmp_path):
    model = tiny.model(name)
    matrix = next(value for key, value in model.named_parameters() if value.ndim == 2 and ".1." in key)
    matrix.data[:, ::2] = 0
    step = Lora(**{**SHORT, "loss": "pretrain", "keep_zeros": stay})
    found = step.recover(recovery(model, tmp_path))["trained"]
    assert found["held_out"]["after"] < found["held_out"]["before"]
    assert bool((matrix[:, ::2] == 0).all()) is stay
    assert bool((matrix[:, 1::2] != 0).all())
    assert not any("lora" in key for key in model.state_dict())


def test_what_is_lost_when_adapters_are_merged_is_not_accepted(tmp_path, monkeypatch):
    """The merged model is measured, and where rounding made it worse than it was, it is as it was."""
    model = tiny.model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measured, count = Watch._measured, []

    def worse(self, windows=None):
        count.append(1)
        merged = not any("lora" in key for key in model.state_dict())
        return measured(self, windows) * (1e6 if merged else 1)

    monkeypatch.setattr(Watch, "_measured", worse)
    found = Lora(**{**SHORT, "loss": "pretrain"}).recover(recovery(model, tmp_path))["trained"]
    assert len(count) > 2
    assert found["kept"] == "the weights as they were"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_failure_leaves_the_model_as_it_was(tmp_path, monkeypatch):
    model = tiny.model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def fail(self, *_, **__):
        raise RuntimeError

    monkeypatch.setattr(Watch, "on_step_end", fail)
    with pytest.raises(RuntimeError):
        Lora(**{**SHORT, "loss": "pretrain"}).recover(recovery(model, tmp_path))
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(isinstance(module, nn.ModuleDict) for module in model.modules())


# What cannot be


def refused(step, name, tmp_path, zeros=""):
    model = tiny.model(name)
    for key, value in model.named_parameters():
        if zeros and zeros in key:
            value.data.zero_()
    with pytest.raises(RecipeError) as error:
        step.recover(recovery(model, tmp_path))
    return str(error.value)


@pytest.mark.parametrize(
    ("options", "name", "zeros", "why"),
    [
        (
            {"target_modules": ("q_proj", "query")},
            "llama",
            "",
            "called 'query', and the model's are called down_proj, gate_proj, k_proj, o_proj, q_proj, ",
        ),
        ({"lora_dropout": 0.1}, "mixtral", "", "has lora_dropout, which peft does not have for experts"),
        ({"use_dora": True}, "mixtral", "", "has use_dora, which peft does not have for experts"),
        ({"use_dora": True}, "llama", "up_proj", "leave out use_dora"),
        ({}, "mixtral", "experts", "give experts false"),
    ],
)
def test_what_adapters_cannot_be_is_said(options, name, zeros, why, tmp_path):
    assert why in refused(Lora(**SHORT, loss="pretrain", **options), name, tmp_path, zeros)


@pytest.mark.parametrize(
    ("options", "name", "why"),
    [({"target_modules": ("query",)}, "llama", "called 'query'"), ({"lora_dropout": 0.1}, "mixtral", "lora_dropout")],
)
def test_that_is_said_before_anything_runs(options, name, why, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("optimum_prune.checkpoint.loading.load", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(RecipeError, match=why):
        compress(recipe(DEPTH, Lora(**SHORT, **options), name=name), tmp_path / "out")


@pytest.mark.parametrize("options", [{"r": 0}, {"lora_alpha": 0}, {"lora_dropout": 1.0}, {"loss": "both"}])
def test_values_that_no_option_has_are_refused(options):
    with pytest.raises(RecipeError):
        Lora(**options)


def test_only_the_dense_models_predictions_need_it():
    assert Lora().needs_teacher
    assert not Lora(loss="pretrain").needs_teacher
    assert replace(Lora(), loss="pretrain") == Lora(loss="pretrain")

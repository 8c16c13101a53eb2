"""An axis that a plugin brings, of which no module of the package knows: all that is done along axes is done along it."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import own_axis
import pytest
import tiny
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM

from optimum_prune import Cuts, Decoder, Depth, Osscar, Recipe, Report, Settings, Text, compress
from optimum_prune import testing as conformance
from optimum_prune.anatomy.counts import count_parameters
from optimum_prune.checkpoint.opening import meta_model
from optimum_prune.errors import SurgeryError
from optimum_prune.hooks.plugins import load
from optimum_prune.plan.forecast import forecast

WINDOWS = tiny.windows(3)
EVEN, UNEVEN = own_axis.NarrowLatents(keep=6), own_axis.NarrowLatents(keep=6, more=4)
both = pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])


@pytest.fixture(scope="module")
def plugins():
    return load([own_axis])


def latents(decoder: Decoder) -> list[int]:
    return [layer.axes["latents"].units for layer in decoder.layers]


# Cut and counted


@both
def test_it_is_cut_and_counted(name, decoder, tmp_path):
    before, cuts = decoder.shape(), conformance.cuts_to(decoder, conformance.at_random(0), {"latents": 5})
    assert before.parameters == count_parameters(decoder.model).total
    assert before.layers[0].per_unit("latents") == 32 + 1 + 4 * (8 + 4)
    conformance.cut(decoder, cuts)
    shape = decoder.shape()
    assert (
        shape == before.narrowed({"latents": 5}) == Decoder(meta_model(decoder.model.config), decoder.family).shape()
    )
    assert shape.parameters == count_parameters(decoder.model).total
    assert before.parameters - shape.parameters == tiny.LAYERS * 11 * (32 + 1 + 48)
    assert decoder.config.q_lora_rank == 5
    found = conformance.reloads_exactly(decoder.model, tmp_path, WINDOWS)
    assert type(found) is type(tiny.model(name))
    conformance.generates_as_it_scores(found, WINDOWS)


@both
def test_what_is_cut_is_what_is_zero(name, decoder):
    """The norm behind the latent divides by the root mean square over as many features as there are."""
    tiny.in_double(decoder.model)
    cuts = conformance.cuts_to(decoder, conformance.at_random(0), {"latents": 5})
    narrow = Decoder(copy.deepcopy(decoder.model), decoder.family)
    conformance.cut(narrow, cuts)
    for layer in narrow.layers:
        norm = layer.part(own_axis.NORM)
        norm.weight.data *= (16 / 5) ** 0.5
        norm.variance_epsilon *= 16 / 5
    for layer in decoder.layers:
        gone = sorted(set(range(16)) - set(cuts.kept(layer.index, "latents")))
        for member in layer.axes["latents"].members:
            layer.module.get_parameter(member.path).data.index_fill_(member.dim, torch.tensor(gone), 0)
    expected = conformance.logits(decoder.model, WINDOWS)
    assert_close(conformance.logits(narrow.model, WINDOWS), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["deepseek_v3"])
@pytest.mark.parametrize(
    ("cuts", "why"),
    [
        (Cuts.along("latents", {2: ()}), "No features of the query latent would be left"),
        (Cuts.along("latents", {2: (0, 16)}), "within 0 to 15"),
        (Cuts.along("latents", {6: (0,)}), "Latents of layer 6 .* layers 0 to 5"),
        (Cuts.along("latents", {None: (0,)}), "latents of the model"),
    ],
)
def test_cuts_that_cannot_be_are_refused(name, decoder, cuts, why):
    with pytest.raises(SurgeryError, match=why):
        conformance.cut(decoder, cuts)


@both
def test_layers_may_differ_along_it(name, decoder, tmp_path):
    before = decoder.shape()
    cuts = Cuts.along("latents", {1: tuple(range(7)), 4: (0, 2, 15)})
    conformance.cut(decoder, cuts)
    assert latents(decoder) == [16, 7, 16, 16, 3, 16]
    assert [layer.parameters for layer in before.layers][1] - decoder.shape().layers[1].parameters == 9 * 81
    assert not decoder.shape().even
    found = conformance.reloads_exactly(decoder.model, tmp_path, WINDOWS)
    assert Decoder(found, decoder.family).shape() == decoder.shape()
    conformance.generates_as_it_scores(found, WINDOWS)


def test_layers_without_it_have_none(plugins):
    for name in ("llama", "qwen3_moe", "gpt2"):
        decoder = Decoder.of(tiny.model(name), plugins.families)
        assert all("latents" not in layer.axes for layer in decoder.layers)
        assert "query latent" not in decoder.shape().columns()
        with pytest.raises(SurgeryError, match=r"latents of layer 0 .* there are none"):
            conformance.cut(decoder, Cuts.along("latents", {0: (0,)}))


def test_where_the_plugin_is_not_there_nothing_knows_of_it():
    decoder = Decoder.of(tiny.model("deepseek_v3"), load().families)
    assert all("latents" not in layer.axes for layer in decoder.layers)


@both
def test_a_layer_without_the_block_that_it_belongs_to_has_none(name, decoder):
    conformance.cut(decoder, Cuts(blocks={2: ("feed_forward",)}))
    assert ["latents" in layer.axes for layer in decoder.layers] == [True, True, False, True, True, True]


# Chosen by a pass


@both
def test_it_is_observed_in_front_of_its_output(name, decoder, plugins):
    reached = []
    handle = decoder.layer(0).part(own_axis.BEHIND).register_forward_pre_hook(lambda _, args: reached.append(args[0]))
    conformance.logits(decoder.model, WINDOWS)
    handle.remove()
    rows = reached[0].flatten(0, -2).double()
    weight = decoder.layer(0).part(own_axis.BEHIND).weight.double()
    expected = (rows.square().sum(0) * weight.square().sum(0)).tolist()
    outcome = conformance.pruned(EVEN, decoder, WINDOWS, plugins)
    assert outcome.evidence[0]["importance"] == pytest.approx(expected, rel=1e-4)
    best = torch.tensor(expected).topk(6).indices.sort().values.tolist()
    assert list(outcome.cuts.kept(0, "latents")) == best
    assert latents(decoder) == [6] * tiny.LAYERS


@both
@pytest.mark.parametrize("step", [EVEN, UNEVEN], ids=["even", "uneven"])
def test_a_pass_that_decides_on_it_leaves_what_it_foresees_and_goes_with_others(
    name, decoder, step, plugins, tmp_path
):
    for each in (step, Osscar(ratio=0.3), Depth(layers=1)):
        foreseen = each.foresee(decoder.shape())
        conformance.pruned(each, decoder, WINDOWS, plugins)
        if each is step:
            assert decoder.shape() == foreseen
            assert latents(decoder) == [step.kept_by(index) for index in range(tiny.LAYERS)]
    conformance.generates_as_it_scores(conformance.reloads_exactly(decoder.model, tmp_path, WINDOWS), WINDOWS)


# Planned, carried out, reported


@pytest.fixture(scope="module")
def recipe_for(checkpoints, text_file):
    text, reported = Text(text=str(text_file), samples=4, length=24), Text(samples=2)
    settings = Settings(model=str(checkpoints("deepseek_v3")), device="cpu")
    return lambda *passes: Recipe(passes=passes, calibration=text, evaluation=reported, settings=settings)


def test_a_plan_shows_it_in_a_column_and_as_data(recipe_for, plugins):
    found = forecast(recipe_for(EVEN, UNEVEN, Osscar(ratio=0.25)), plugins)
    head, *rows = found.rows()
    column = head.index("query latent")
    by_name = {row[0]: row for row in rows}
    assert by_name["loading"][column] == "16"
    assert by_name["narrow-latents"][column] == "6-10 (8 on average)"
    assert by_name["osscar"][column] == "6-10 (8 on average)"
    steps = [step for step in json.loads(found.to_json())["steps"] if "latent_width" in step]
    assert [step["latent_width"] for step in steps][:4] == [[16] * 6, [6] * 6, [6, 10] * 3, [6, 10] * 3]
    sizes = [step["parameters"] for step in steps]
    assert sizes[0] - sizes[1] == 6 * 10 * 81


def test_a_plan_in_which_it_does_not_change_does_not_speak_of_it(recipe_for, plugins):
    found = forecast(recipe_for(Osscar(ratio=0.25)), plugins)
    assert "query latent" not in found.rows()[0]
    assert "latent_width" not in found.to_json()


@pytest.mark.parametrize("step", [EVEN, UNEVEN], ids=["even", "uneven"])
def test_a_run_reports_it_and_its_model_loads(step, recipe_for, tmp_path):
    out = tmp_path / "out"
    report = compress(recipe_for(step, Osscar(ratio=0.25)), out, hooks=[own_axis])
    (cuts, _) = json.loads((out / "compression/cuts.json").read_text())
    assert cuts.keys() == {"pass", "latents"}
    assert cuts["pass"] == "narrow-latents"
    kept = Cuts.from_json({"latents": cuts["latents"]})
    assert [len(kept.kept(index, "latents")) for index in range(6)] == [step.kept_by(index) for index in range(6)]
    plain = json.loads((out / "compression/report.json").read_text())
    assert [set(decision) for decision in plain["passes"][0]["decisions"]] == [{"layer", "importance"}] * 6
    assert Report.read(out) == report
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert isinstance(model, DeepseekV3ForCausalLM)
    assert (type(model) is DeepseekV3ForCausalLM) == (step is EVEN)
    widths = [layer.self_attn.q_a_proj.out_features for layer in model.model.layers]
    assert widths == [step.kept_by(index) for index in range(6)]
    assert plain["parameters"]["after"] == count_parameters(model).total


# Installed, and killed


@pytest.fixture(scope="module")
def command(tmp_path_factory, checkpoints, text_file):
    """Runs the command line in a process where the plugin is installed."""
    site = tmp_path_factory.mktemp("site")
    shutil.copy(Path(own_axis.__file__), site)
    info = site / "own_axis-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-axis\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[optimum_prune]\nown_axis = own_axis\n")
    text = ["--text", text_file, "--samples", 4, "--length", 24, "--eval-samples", 2]

    def run(*arguments, killed_after=None):
        place = {**os.environ, "PYTHONPATH": str(site)}
        if killed_after is not None:
            place[own_axis.KILLED_AFTER] = str(killed_after)
        command = [sys.executable, "-m", "optimum_prune", *arguments, "--model", checkpoints("deepseek_v3"), *text]
        return subprocess.run(
            list(map(str, [*command, "--device", "cpu"])),
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env=place,
        )

    return run


def test_a_run_that_was_killed_goes_on_and_ends_with_the_same_bits(command, tmp_path):
    arguments = ["prune", "narrow-latents", "--keep", 6, "--more", 4, "--output"]
    whole = command(*arguments, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    killed = command(*arguments, tmp_path / "out", killed_after=3)
    assert killed.returncode == -9
    pieces = [file.stat().st_mtime_ns for file in sorted((tmp_path / "out.unfinished/journal").glob("0*.safetensors"))]
    assert len(pieces) >= 3, "three layers were decided"
    again = command(*arguments, tmp_path / "out", killed_after=5)
    assert again.returncode == -9
    kept = [file.stat().st_mtime_ns for file in sorted((tmp_path / "out.unfinished/journal").glob("0*.safetensors"))]
    assert kept[: len(pieces)] == pieces, "they were not decided anew"
    assert len(kept) == len(pieces) + 2
    resumed = command(*arguments, tmp_path / "out", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    for name in ("model.safetensors", "config.json", "compression/cuts.json", "compression/recipe.yaml"):
        digests = {hashlib.sha256((tmp_path / of / name).read_bytes()).hexdigest() for of in ("whole", "out")}
        assert len(digests) == 1, name
    reports = [json.loads((tmp_path / of / "compression/report.json").read_text()) for of in ("whole", "out")]
    assert reports[0]["passes"][0]["decisions"] == reports[1]["passes"][0]["decisions"]
    for when in ("before", "after"):
        assert reports[0]["perplexity"][when] == reports[1]["perplexity"][when]


def test_the_command_line_plans_it(command, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("passes: [narrow-latents: {keep: 6}]")
    planned = command("compress", "plan", recipe, "--json")
    assert planned.returncode == 0, planned.stderr
    steps = {step["name"]: step for step in json.loads(planned.stdout)["steps"]}
    assert steps["loading"]["latent_width"] == [16] * 6
    assert steps["narrow-latents"]["latent_width"] == [6] * 6
    shown = command("compress", "plan", recipe)
    assert "query latent" in shown.stdout

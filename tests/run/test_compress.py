from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from importlib.metadata import version

import pytest
import tiny
import torch
from folder_passes import Archive, Halve
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_prune import (
    Cuts,
    Depth,
    OptimumPruneError,
    Osscar,
    Progress,
    Pruner,
    Recipe,
    Settings,
    Stage,
    Text,
    Windows,
    compress,
    hookimpl,
    load_model,
    testing,
)
from optimum_prune.anatomy.decoder import Decoder
from optimum_prune.calibration.calibration import Calibration
from optimum_prune.errors import CheckpointError, NumericalError, RecipeError
from optimum_prune.options import as_plain
from optimum_prune.text.drawing import Reader, draw

PASSES = (Osscar(ratio=0.25), Depth(layers=2))


def recipe_for(folder, text, *passes, evaluation=None, **settings):
    return Recipe(
        passes=passes or PASSES,
        calibration=Text(text=str(text), samples=8, length=32),
        evaluation=evaluation or Text(samples=4),
        settings=Settings(model=str(folder), device="cpu", **settings),
    )


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def digests(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("*.safetensors")}


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


def report_of(folder):
    return json.loads((folder / "compression" / "report.json").read_text(), parse_constant=refuse)


@torch.no_grad()
def independent_perplexity(folder, windows):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    losses = [model(input_ids=tokens[None], labels=tokens[None]).loss.item() for tokens in windows.tokens]
    return math.exp(sum(losses) / len(losses))


@pytest.fixture(scope="module")
def recipe(llama, text_file):
    return recipe_for(llama, text_file)


@pytest.fixture(scope="module")
def done(recipe, tmp_path_factory):
    output = tmp_path_factory.mktemp("compressed") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.getbasetemp())
        return output, compress(recipe, output)


def test_the_output_is_one_whole_folder(done):
    output, _ = done
    assert names(output.parent) == ["out"]
    expected = {
        "README.md",
        "compression",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert expected | {"tokenizer_config.json"} == set(names(output))
    assert {"cuts.json", "recipe.yaml", "report.json"} <= set(names(output / "compression"))


def test_the_report_tells_the_truth_about_sizes(done, llama):
    output, report = done
    plain = report_of(output)
    assert plain["model"] == f"./{llama.parent.name}/llama"
    for when, folder in (("before", llama), ("after", output)):
        model = AutoModelForCausalLM.from_pretrained(folder)
        tables = model.get_input_embeddings().weight.numel() + model.get_output_embeddings().weight.numel()
        assert plain["parameters"][when] == sum(parameter.numel() for parameter in model.parameters())
        assert plain["non_embedding_parameters"][when] == plain["parameters"][when] - tables
    assert plain["bytes"] == {
        "before": 4 * plain["parameters"]["before"],
        "after": (output / "model.safetensors").stat().st_size,
    }
    assert json.loads(json.dumps(report.to_dict())) == plain


def test_the_report_tells_the_truth_about_perplexities(done, recipe, llama, plugins):
    output, _ = done
    plain = report_of(output)["perplexity"]
    tokenizer = AutoTokenizer.from_pretrained(llama)
    reader = Reader(tokenizer, plugins.sources, limit=128)
    windows = draw(recipe.calibration, recipe.evaluation, reader, seed=0).evaluation
    assert plain["before"] == pytest.approx(independent_perplexity(llama, windows), rel=1e-5)
    assert plain["after"] == pytest.approx(independent_perplexity(output, windows), rel=1e-5)
    assert plain["protocol"] == {
        "text": "the end of invented.txt",
        "windows": 4,
        "length": 32,
        "tokens": 4 * 31,
        "bos": True,
        "dtype": "float32",
    }


def test_the_report_tells_what_the_passes_did(done, recipe):
    output, _ = done
    plain = report_of(output)
    assert [(step["name"], step["stage"]) for step in plain["passes"]] == [("osscar", "PRUNE"), ("depth", "PRUNE")]
    assert plain["passes"][0]["options"]["ratio"] == 0.25
    assert plain["passes"][0]["options"] == as_plain(PASSES[0])
    assert [decision["layer"] for decision in plain["passes"][0]["decisions"]] == list(range(tiny.LAYERS))
    assert len(plain["passes"][1]["decisions"][-1]["perplexity_without_window_from"]) == 5
    assert all(step["seconds"] > 0 and step["peak_memory"] > 10**7 for step in plain["passes"])
    assert plain["seconds"] > sum(step["seconds"] for step in plain["passes"])
    assert plain["calibration"] == {"text": "invented.txt", "windows": 8, "length": 32, "bos": True, "seed": 0}
    assert plain["verified"]["max_logit_difference"] == plain["verified"]["max_logit_difference_with_cache"] == 0
    assert plain["versions"]["transformers"] == version("transformers")
    assert plain["versions"]["optimum-prune"] == version("optimum-prune")


def test_the_cuts_replay_to_the_same_structure(done, llama, plugins):
    output, _ = done
    model = AutoModelForCausalLM.from_pretrained(llama)
    decoder = Decoder.of(model, plugins.families)
    dense = model.state_dict()
    osscar, depth = json.loads((output / "compression" / "cuts.json").read_text())
    assert (osscar.pop("pass"), depth.pop("pass")) == ("osscar", "depth")
    for cuts in (osscar, depth):
        testing.cut(decoder, Cuts.from_json(cuts))
    saved = AutoModelForCausalLM.from_pretrained(output)
    assert decoder.shape() == Decoder.of(saved, plugins.families).shape()
    for name, weight in saved.state_dict().items():
        if "down_proj" not in name:
            assert torch.equal(weight, model.state_dict()[name])
    dropped = set(range(tiny.LAYERS)) - set(Cuts.from_json(depth).layers)
    assert sorted(dropped) == report_of(output)["passes"][1]["decisions"][0]["dropped"]
    assert all(torch.equal(weight, dense[name]) for name, weight in saved.state_dict().items() if "embed" in name)


def test_the_written_recipe_makes_the_same_model_again(done, plugins, tmp_path, llama, monkeypatch):
    output, _ = done
    monkeypatch.chdir(llama.parents[1])
    compress(Recipe.from_yaml(output / "compression" / "recipe.yaml", plugins), tmp_path / "again")
    assert digests(tmp_path / "again") == digests(output)


def test_two_runs_write_the_same_bytes(recipe, done, tmp_path):
    torch.manual_seed(1234)
    compress(recipe, tmp_path / "again")
    assert digests(tmp_path / "again") == digests(done[0])


def test_the_model_card_tells_the_figures_and_the_recipe(done):
    output, report = done
    card = (output / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert f"{report.perplexity.after.value:,.2f}" in card
    assert (output / "compression" / "recipe.yaml").read_text().strip() in card
    assert "AutoModelForCausalLM.from_pretrained" in card


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_every_family_is_compressed_verified_and_generates(name, checkpoints, text_file, tmp_path):
    report = compress(recipe_for(checkpoints(name), text_file), tmp_path / "out")
    assert report.verified.max_logit_difference == 0
    testing.generates_as_it_scores(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), tiny.windows(2))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer("Gou fanfan ki.")["input_ids"], skip_special_tokens=True) == "Gou fanfan ki."


def test_a_tied_model_is_saved_tied(checkpoints, text_file, tmp_path):
    report = compress(recipe_for(checkpoints("qwen2"), text_file), tmp_path / "out")
    testing.stays_tied(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), tmp_path / "out")
    assert report.bytes.after == pytest.approx(4 * report.parameters.after, abs=20_000)


def test_a_run_in_half_precision_is_saved_in_it(llama, text_file, tmp_path):
    report = compress(recipe_for(llama, text_file, dtype="bfloat16"), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert report.perplexity.after.dtype == "bfloat16"
    assert report.bytes.after == pytest.approx(2 * report.parameters.after, abs=20_000)


def test_nothing_is_measured_if_nothing_is_asked_for(llama, text_file, tmp_path):
    report = compress(recipe_for(llama, text_file, evaluation=Text(samples=0)), tmp_path / "out")
    assert report.perplexity is None
    assert report_of(tmp_path / "out")["perplexity"] is None


def test_a_report_is_json_even_if_a_candidate_is_infinitely_bad(llama, text_file, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight.mul_(1e30)
        model.model.layers[3].mlp.down_proj.weight.mul_(1e30)
    model.save_pretrained(folder)
    compress(recipe_for(folder, text_file, Depth(layers=1), evaluation=Text(samples=0)), tmp_path / "out")
    assert report_of(tmp_path / "out")["passes"][0]["decisions"][-1]["dropped"] == [3]


class Heard:
    def __init__(self):
        self.events = []

    @hookimpl
    def before_pass(self, step, model):
        self.events.append(("before", step.name, None if model is None else len(model.model.layers)))

    @hookimpl
    def pass_finished(self, outcome):
        self.events.append(("after", outcome.name, outcome.stage))


def test_passes_from_folder_to_folder_follow_in_order(llama, text_file, tmp_path, plugins):
    heard = Heard()
    recipe = recipe_for(llama, text_file, *PASSES, Halve(), Archive())
    report = compress(recipe, tmp_path / "out", hooks=[heard])
    assert heard.events == [
        ("before", "osscar", 6),
        ("after", "osscar", Stage.PRUNE),
        ("before", "depth", 6),
        ("after", "depth", Stage.PRUNE),
        ("before", "halve", None),
        ("after", "halve", Stage.QUANTIZE),
        ("before", "archive", None),
        ("after", "archive", Stage.EXPORT),
    ]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert load_model(tmp_path / "out" / "archive").dtype == torch.float32
    assert report_of(tmp_path / "out")["passes"][2]["decisions"] == [
        {"layers": 4, "windows": 8, "process": os.getpid()}
    ]
    assert report.parameters.after == model.num_parameters()
    tokenizer = AutoTokenizer.from_pretrained(llama)
    reader = Reader(tokenizer, plugins.sources, limit=128)
    windows = draw(recipe.calibration, recipe.evaluation, reader, seed=0).evaluation
    assert report.perplexity.after.value == pytest.approx(independent_perplexity(tmp_path / "out", windows), rel=1e-3)
    assert names(tmp_path) == ["out"]


def test_an_output_is_replaced_as_a_whole(recipe, tmp_path, done):
    shutil.copytree(done[0], tmp_path / "out")
    shutil.copy(tmp_path / "out" / "model.safetensors", tmp_path / "out" / "model-00001-of-00002.safetensors")
    compress(recipe, tmp_path / "out", overwrite=True)
    assert names(tmp_path / "out") == names(done[0])
    assert digests(tmp_path / "out") == digests(done[0])


def test_a_compressed_model_can_be_compressed_again(done, text_file, tmp_path):
    report = compress(recipe_for(done[0], text_file), tmp_path / "out")
    assert report.parameters.before == done[1].parameters.after
    assert report.parameters.after < report.parameters.before


def test_a_list_of_layers_that_is_unusual_for_a_family_is_cut_or_refused(llama, text_file, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "model")
    plain = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**plain, "layer_types": ["full_attention"] * tiny.LAYERS}))
    try:
        compress(recipe_for(folder, text_file), tmp_path / "out")
    except OptimumPruneError:
        assert names(tmp_path) == ["model"]
    else:
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert len(found.config.layer_types) == tiny.LAYERS - 2


def broken_weights(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight[0, 0] = torch.nan
    model.save_pretrained(folder)
    return NumericalError


def small_vocabulary(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(200)
    model.save_pretrained(folder)
    return RecipeError


def no_tokenizer(folder):
    for file in folder.glob("token*"):
        file.unlink()
    return CheckpointError


@pytest.mark.parametrize("harm", [broken_weights, small_vocabulary, no_tokenizer])
def test_a_model_that_cannot_be_compressed_leaves_no_folder(harm, llama, text_file, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "model")
    with pytest.raises(harm(folder)):
        compress(recipe_for(folder, text_file), tmp_path / "out")
    assert names(tmp_path) == ["model"]


class TestPruner:
    def test_a_model_in_memory_is_pruned_in_place_and_saved(self, tmp_path):
        model = tiny.model("llama")
        windows = tiny.windows(10, length=32)
        output = Pruner.from_pretrained(model).prune(*PASSES, calibration=windows, save_dir=tmp_path / "out")
        assert output == tmp_path / "out"
        found = AutoModelForCausalLM.from_pretrained(output)
        assert torch.equal(testing.logits(found, windows), testing.logits(model, windows))
        assert found.config.num_hidden_layers == len(model.model.layers) == 4
        assert report_of(output)["perplexity"] is None

    def test_a_calibration_is_pruned_by_its_windows(self, tmp_path):
        windows = tiny.windows(10, length=32)
        for calibration, folder in ((windows, "windows"), (Calibration(windows), "calibration")):
            pruner = Pruner.from_pretrained(tiny.model("llama"))
            pruner.prune(*PASSES, calibration=calibration, save_dir=tmp_path / folder)
        assert digests(tmp_path / "calibration") == digests(tmp_path / "windows")

    def test_a_folder_is_pruned_as_by_a_recipe(self, llama, text_file, done, tmp_path):
        pruner = Pruner.from_pretrained(llama, device="cpu")
        text = Text(text=str(text_file), samples=8, length=32)
        pruner.prune(*PASSES, calibration=text, evaluation=Text(samples=4), save_dir=tmp_path / "out")
        assert digests(tmp_path / "out") == digests(done[0])

    def test_a_tokenizer_is_used_and_saved_with_a_model_in_memory(self, text_file, other_text_file, tmp_path):
        tokenizer = tiny.tokenizer(bos=False)
        pruner = Pruner.from_pretrained(tiny.model("opt"), tokenizer=tokenizer)
        pruner.prune(
            Osscar(ratio=0.5), calibration=text_file, evaluation=str(other_text_file), save_dir=tmp_path / "out"
        )
        plain = report_of(tmp_path / "out")
        assert plain["perplexity"]["protocol"]["text"] == "other.txt"
        assert plain["perplexity"]["protocol"]["bos"] is False
        assert AutoTokenizer.from_pretrained(tmp_path / "out")("abc")["input_ids"] == tokenizer("abc")["input_ids"]

    def test_windows_given_as_tokens_are_reported_on(self, tmp_path):
        pruner = Pruner.from_pretrained(tiny.model("llama"))
        windows, other = tiny.windows(4), Windows.from_tokens(tiny.windows(3, seed=1).tokens)
        pruner.prune(Depth(drop=(2,)), calibration=windows, evaluation=other, save_dir=tmp_path / "out")
        plain = report_of(tmp_path / "out")["perplexity"]
        assert plain["after"] == pytest.approx(independent_perplexity(tmp_path / "out", other), rel=1e-5)

    def test_a_text_without_a_tokenizer_is_refused(self, text_file, tmp_path):
        with pytest.raises(RecipeError, match="has no tokenizer"):
            Pruner.from_pretrained(tiny.model("llama")).prune(
                Depth(layers=1), calibration=text_file, save_dir=tmp_path / "out"
            )
        assert names(tmp_path) == []

    @pytest.mark.parametrize("swapped", [False, True])
    def test_windows_and_a_text_do_not_mix(self, swapped, llama, text_file, tmp_path):
        texts = [tiny.windows(3), text_file][:: -1 if swapped else 1]
        with pytest.raises(RecipeError, match="Give both as windows"):
            Pruner.from_pretrained(llama).prune(
                Depth(layers=1), calibration=texts[0], evaluation=texts[1], save_dir=tmp_path / "out"
            )

    def test_the_model_in_memory_and_the_saved_one_train_on(self, tmp_path):
        model = tiny.model("llama")
        Pruner.from_pretrained(model).prune(Osscar(ratio=0.5), calibration=tiny.windows(4), save_dir=tmp_path / "out")
        tokens = tiny.windows(2).tokens
        model(input_ids=tokens, labels=tokens).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())

    def test_a_masked_window_is_counted_without_its_padding(self, tmp_path):
        padded = tiny.windows(5, padded=True)
        pruner = Pruner.from_pretrained(tiny.model("llama"))
        pruner.prune(
            Depth(drop=(2,)), calibration=padded, evaluation=padded, save_dir=tmp_path / "out", progress=Progress()
        )
        protocol = report_of(tmp_path / "out")["perplexity"]["protocol"]
        assert protocol["tokens"] == int(padded.mask[:, 1:].sum())


def test_perplexity_of_unpruned_and_reloaded_models_agree_when_nothing_changes(llama, text_file, tmp_path):
    report = compress(recipe_for(llama, text_file, Archive()), tmp_path / "out")
    assert_close(report.perplexity.before.value, report.perplexity.after.value, rtol=1e-12, atol=0)


def test_a_model_whose_rotary_frequencies_were_rounded_is_refused(tmp_path):
    model = tiny.model("llama").to(torch.bfloat16)
    with pytest.raises(OptimumPruneError, match=r"rounded to torch.bfloat16.*from_pretrained"):
        Pruner.from_pretrained(model).prune(Depth(drop=(1,)), calibration=tiny.windows(2), save_dir=tmp_path / "out")
    assert names(tmp_path) == []


def test_the_processor_of_a_model_that_sees_goes_along(llama, text_file, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "model")
    (folder / "preprocessor_config.json").write_text("{}")
    compress(recipe_for(folder, text_file, evaluation=Text(samples=0)), tmp_path / "out")
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == "{}"


@pytest.fixture(scope="module", params=["llama", "deepseek_v3"])
def heterogeneous(request, checkpoints, text_file, tmp_path_factory):
    """A dense model, the folder of one whose layers differ in shape, and the report."""
    heads = None if request.param in tiny.WITHOUT_HEADS else 0.5
    step = Osscar(ratio=0.5, head_ratio=heads, protect=(0, 3))
    output = tmp_path_factory.mktemp("heterogeneous") / "out"
    return (
        checkpoints(request.param),
        output,
        compress(recipe_for(checkpoints(request.param), text_file, step), output),
    )


def test_a_model_whose_layers_differ_is_compressed_reported_and_verified(heterogeneous):
    dense, output, _ = heterogeneous
    plain = report_of(output)
    found = AutoModelForCausalLM.from_pretrained(output)
    assert plain["parameters"]["after"] == sum(parameter.numel() for parameter in found.parameters())
    assert plain["parameters"]["after"] < plain["parameters"]["before"]
    assert plain["verified"]["max_logit_difference"] == 0
    assert (output / "modeling_pruned.py").is_file()
    (step,) = plain["passes"]
    assert list(step["options"]["protect"]) == [0, 3]
    assert {decision["layer"] for decision in step["decisions"]} == {1, 2, 4, 5}
    assert AutoTokenizer.from_pretrained(output)("a").input_ids == AutoTokenizer.from_pretrained(dense)("a").input_ids


def test_cuts_of_every_part_replay_to_the_same_structure(heterogeneous, plugins):
    dense, output, _ = heterogeneous
    (plain,) = json.loads((output / "compression" / "cuts.json").read_text())
    plain.pop("pass")
    cuts = Cuts.from_json(plain)
    assert cuts.to_json() == plain
    assert {"experts", "shared"} <= set(plain) if "deepseek" in str(dense) else {"heads", "channels"} <= set(plain)
    model, saved = AutoModelForCausalLM.from_pretrained(dense), AutoModelForCausalLM.from_pretrained(output)
    decoder = Decoder.of(model, plugins.families)
    testing.cut(decoder, cuts)
    assert decoder.shape() == Decoder.of(saved, plugins.families).shape()
    assert type(model) is type(saved)
    refitted = ("down_proj", "o_proj")
    for name, weight in saved.state_dict().items():
        if not any(part in name for part in refitted):
            assert torch.equal(weight, model.state_dict()[name]), name


def test_a_model_whose_layers_differ_is_compressed_again(heterogeneous, text_file, tmp_path):
    _, output, report = heterogeneous
    again = compress(recipe_for(output, text_file, Osscar(ratio=0.4), Depth(layers=1)), tmp_path / "again")
    assert again.parameters.before == report.parameters.after
    assert again.parameters.after < again.parameters.before
    assert again.verified.max_logit_difference == 0

"""Models whose layers differ in shape: how they are saved, and how they load."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers
from huggingface_hub import ModelCard
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

from optimum_prune import Cuts, Decoder, Depth, Osscar, Progress
from optimum_prune import testing as conformance
from optimum_prune.anatomy.counts import count_parameters
from optimum_prune.anatomy.family import find_family
from optimum_prune.checkpoint import opening, saving
from optimum_prune.checkpoint.opening import meta_model
from optimum_prune.errors import CheckpointError, SurgeryError
from optimum_prune.surgery.registration import check_heterogeneous

HETEROGENEOUS = {
    "channels": Osscar(ratio=0.5, protect=(0, 3)),
    "both": Osscar(ratio=0.5, head_ratio=0.5, protect=(0, 5)),
}
SOME = (
    "llama",
    "llama-tied",
    "qwen2",
    "gemma3-vision",
    "phi3",
    "gpt2",
    "gpt2-wide",
    "opt",
    "qwen3_moe",
    "deepseek_v3",
)
WINDOWS = tiny.windows(2)


def uneven_model(name, plugins, kind="channels"):
    decoder = Decoder.of(tiny.model(name), plugins.families)
    conformance.pruned(HETEROGENEOUS[kind], decoder, WINDOWS, plugins)
    return decoder


@pytest.fixture(scope="session")
def uneven(tmp_path_factory, plugins):
    """Family and kind of cut -> the model, and its folder, which is not to be written to."""
    made = {}

    def folder_of(name, kind="channels"):
        if (name, kind) not in made:
            decoder = uneven_model(name, plugins, kind)
            folder = tmp_path_factory.mktemp("uneven") / name
            saving.save(decoder.model, None, folder, Progress())
            made[name, kind] = decoder, folder
        return made[name, kind]

    return folder_of


def kinds_of(names):
    return [(name, "channels") for name in names] + [
        (name, "both") for name in names if name not in tiny.WITHOUT_HEADS
    ]


@pytest.mark.parametrize(("name", "kind"), kinds_of(tiny.FAMILIES))
def test_a_model_of_layers_that_differ_reloads_exactly_and_generates(name, kind, plugins, tmp_path):
    decoder = uneven_model(name, plugins, kind)
    model, shape = decoder.model, decoder.shape()
    assert not shape.even
    found = conformance.reloads_exactly(model, tmp_path, WINDOWS)
    described = meta_model(AutoConfig.from_pretrained(tmp_path))
    assert Decoder(found, decoder.family).shape() == shape == Decoder(described, decoder.family).shape()
    conformance.generates_as_it_scores(found, WINDOWS)
    conformance.generates_as_it_scores(model, WINDOWS)
    conformance.layers_are_numbered(Decoder(found, decoder.family))
    if name in tiny.TIED:
        conformance.stays_tied(model, tmp_path)
        conformance.stays_tied(found, tmp_path)


@pytest.mark.parametrize("name", [*SOME, "mixtral", "deepseek_v2"])
def test_a_model_that_came_from_a_checkpoint_is_saved_as_well_as_one_made_in_memory(
    name, checkpoints, plugins, tmp_path
):
    model = AutoModelForCausalLM.from_pretrained(checkpoints(name)).eval()
    conformance.pruned(HETEROGENEOUS["channels"], Decoder.of(model, plugins.families), WINDOWS, plugins)
    found = conformance.reloads_exactly(model, tmp_path / "first", WINDOWS)
    conformance.reloads_exactly(found, tmp_path / "second", WINDOWS)


@pytest.mark.parametrize("name", SOME)
def test_the_folder_says_what_it_is(name, uneven):
    decoder, folder = uneven(name)
    plain = json.loads((folder / "config.json").read_text())
    stock = tiny.model(name)
    assert plain["model_type"] == "optimum_prune"
    assert plain["base_model_type"] == stock.config.model_type
    assert plain["base_config"]["architectures"] == [type(stock).__name__]
    assert plain["architectures"] == [type(decoder.model).__name__] == [f"Pruned{type(stock).__name__}"]
    assert plain["auto_map"]["AutoModelForCausalLM"] == f"modeling_pruned.Pruned{type(stock).__name__}"
    assert all((folder / name).is_file() for name in ("configuration_pruned.py", "modeling_pruned.py"))
    assert isinstance(decoder.model, type(stock))
    assert find_family(AutoConfig.from_pretrained(folder), [decoder.family]) is decoder.family


FRESH = """
import copy, pickle, sys, torch, transformers
from pathlib import Path
from transformers import AutoConfig, AutoModelForCausalLM

def check(source, tokens, wanted):
    config = AutoConfig.from_pretrained(source, trust_remote_code=True)
    model, info = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens, use_cache=False).logits, wanted), "logits"
        assert torch.equal(copy.deepcopy(model)(input_ids=tokens, use_cache=False).logits, wanted), "deepcopy"
    options = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "min_new_tokens": 4, "max_new_tokens": 4}
    cached = model.generate(**options, do_sample=False)
    assert torch.equal(cached, model.generate(**options, do_sample=False, use_cache=False)), "generate"
    eager = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True, attn_implementation="eager")
    with torch.no_grad():
        torch.testing.assert_close(eager(input_ids=tokens).logits, wanted, rtol=1e-4, atol=1e-4)
    attentions = [module for module in eager.modules() if hasattr(module, "layer_idx") and hasattr(module, "config")]
    assert {module.config._attn_implementation for module in attentions} == {"eager"}
    assert copy.deepcopy(model.config).pruned == model.config.pruned
    return model, config

problems = []

for folder in map(Path, sys.argv[1:]):
    tokens, wanted = torch.load(folder / "expected.pt")
    try:
        model, config = check(folder / "saved", tokens, wanted)
        model.save_pretrained(folder / "again")
        check(folder / "again", tokens, wanted)
        assert pickle.loads(pickle.dumps(config)).pruned == config.pruned
    except Exception as error:
        problems.append(f"{folder.name}: {type(error).__name__} {error}")
    for name in ("AutoModelForCausalLM", (folder / "stock").read_text()):
        try:
            getattr(transformers, name).from_pretrained(folder / "saved")
        except Exception:
            pass
        else:
            problems.append(f"{folder.name} was taken by {name} for a checkpoint of its own")
assert not any(name.partition(".")[0] == "optimum_prune" for name in sys.modules), "optimum_prune was imported"
print("\\n" + ("; ".join(problems) or "done"))
"""


def test_where_this_package_is_not_imported_it_loads_if_its_own_code_is_trusted_and_not_otherwise(uneven, tmp_path):
    """Not otherwise, since a stock architecture would fill up with random weights."""
    folders = []
    for name in ("llama-tied", "gemma3-vision", "gpt2", "qwen3_moe", "deepseek_v3"):
        decoder, saved = uneven(name, "channels" if name in tiny.WITHOUT_HEADS else "both")
        folders.append(tmp_path / name)
        shutil.copytree(saved, tmp_path / name / "saved")
        torch.save([WINDOWS.tokens, conformance.logits(decoder.model, WINDOWS)], tmp_path / name / "expected.pt")
        (tmp_path / name / "stock").write_text(type(tiny.model(name)).__name__)
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FRESH, *folders],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        timeout=300,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    assert run.stdout.splitlines()[-1:] == ["done"], run.stdout.splitlines()[-1:] or run.stderr
    for folder in folders:
        assert (folder / "again" / "modeling_pruned.py").is_file()


@pytest.mark.parametrize("name", SOME)
def test_the_stock_class_refuses_it(name, uneven):
    _, folder = uneven(name)
    stock = type(tiny.model(name))
    with pytest.raises(
        Exception, match="load this model with trust_remote_code=True, or after `import optimum_prune`"
    ):
        stock.from_pretrained(folder)


# What is done with a model, done with such a one


@pytest.mark.parametrize("name", ["llama", "gemma3-vision", "gpt2", "qwen3_moe"])
def test_configs_and_models_can_be_copied_and_configs_pickled(name, uneven):
    decoder, folder = uneven(name)
    model = decoder.model
    for config in (model.config, AutoConfig.from_pretrained(folder)):
        for same in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), copy.copy(config)):
            assert type(same) is type(config)
            assert same.to_dict() == config.to_dict()
            assert same.to_json_string() == config.to_json_string()
    assert_close(conformance.logits(copy.deepcopy(model), WINDOWS), conformance.logits(model, WINDOWS), rtol=0, atol=0)


@pytest.mark.parametrize("name", SOME)
def test_the_attention_implementation_that_is_asked_for_reaches_every_layer(name, uneven):
    decoder, folder = uneven(name, "channels" if name in tiny.WITHOUT_HEADS else "both")
    expected = conformance.logits(decoder.model, WINDOWS)

    def used(model):
        layers = Decoder(model, decoder.family).layers
        return {layer.part(decoder.family.attention).config._attn_implementation for layer in layers}

    for implementation in ("eager", "sdpa"):
        found = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=implementation).eval()
        assert used(found) == {implementation}
        assert_close(conformance.logits(found, WINDOWS), expected, rtol=1e-4, atol=1e-4)
    found.set_attn_implementation("eager")
    assert used(found) == {"eager"}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_half_precision_and_shards_are_kept(name, uneven, tmp_path):
    decoder, folder = uneven(name)
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    found = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert found.dtype == torch.bfloat16
    assert Decoder(found, decoder.family).shape() == decoder.shape()
    assert_close(conformance.logits(found, WINDOWS), conformance.logits(half.eval(), WINDOWS), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_it_can_be_trained(name, uneven):
    model = copy.deepcopy(uneven(name)[0].model).train()
    model(input_ids=WINDOWS.tokens, labels=WINDOWS.tokens).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# And pruned again


@pytest.mark.parametrize("name", SOME)
def test_it_can_be_pruned_again_in_width_and_depth(name, uneven, plugins, tmp_path):
    _, folder = uneven(name)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    before = count_parameters(model).total
    for step in (Osscar(ratio=0.4), Depth(layers=1)):
        conformance.pruned(step, Decoder.of(model, plugins.families), WINDOWS, plugins)
        assert count_parameters(model).total < before
    conformance.generates_as_it_scores(conformance.reloads_exactly(model, tmp_path, WINDOWS), WINDOWS)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("by", ["layers", "widths"])
def test_even_again_it_is_a_stock_checkpoint_again(name, by, uneven, plugins, tmp_path):
    _, folder = uneven(name)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    decoder = Decoder.of(model, plugins.families)
    if by == "layers":
        cuts = Cuts(layers=(1, 2, 4, 5))  # the protected ones go
    else:
        layers = decoder.shape().layers
        units = {
            name: [layer.units(name) for layer in layers if layer.units(name)] for name in ("channels", "experts")
        }
        narrowest = {name: min(found) for name, found in units.items() if found}
        cuts = conformance.cuts_to(decoder, conformance.first, narrowest)
    conformance.cut(decoder, cuts)
    stock = type(tiny.model(name))
    assert type(model) is stock
    found = conformance.reloads_exactly(model, tmp_path, WINDOWS)
    assert type(found) is stock
    assert "optimum_prune" not in (tmp_path / "config.json").read_text()
    assert not (tmp_path / "modeling_pruned.py").exists()
    conformance.generates_as_it_scores(found, WINDOWS)


def test_cutting_one_model_leaves_other_models_of_its_architecture_alone(plugins):
    bystander = tiny.model("llama")
    before = conformance.logits(bystander, WINDOWS)
    uneven_model("llama", plugins, "both")
    assert bystander.config.model_type == "llama"
    assert torch.equal(conformance.logits(bystander, WINDOWS), before)
    assert type(tiny.model("llama")) is type(bystander)


def test_every_layer_may_differ_from_every_other(plugins, tmp_path):
    decoder = Decoder.of(tiny.model("llama"), plugins.families)
    channels = {index: tuple(range(0, tiny.WIDTH, index + 1)) for index in range(tiny.LAYERS)}
    cuts = Cuts.along("channels", channels).merge(Cuts.along("heads", {2: (1,), 4: (0,)}))
    masked = conformance.with_masked(decoder, cuts, WINDOWS)
    conformance.cut(decoder, cuts)
    assert len(set(decoder.shape().layers)) == tiny.LAYERS
    assert_close(conformance.logits(decoder.model, WINDOWS), masked, rtol=1e-5, atol=1e-5)
    conformance.generates_as_it_scores(conformance.reloads_exactly(decoder.model, tmp_path, WINDOWS), WINDOWS)


# Whoever writes the config


HOSTILE = {
    "a class": {"layers": "__class__"},
    "globals": {"config": "__class__.__init__.__globals__"},
    "a method": {"layers": "model.forward"},
    "a method of the config": {"config": "to_dict"},
    "what a config keeps for itself": {"config": "_name_or_path"},
    "no list of layers": {"layers": "lm_head"},
    "nothing": {"layers": ""},
    "a number": {"layers": 3},
    "a path without an end": {"layers": ".".join(["model"] * 10_000)},
    "a block that is a method": {
        "blocks": {"attention": ["forward"], "feed_forward": ["mlp"]},
        "first": {"without": ["attention"]},
    },
    "a block that leads out": {
        "blocks": {"attention": [".."], "feed_forward": ["mlp"]},
        "first": {"without": ["attention"]},
    },
    "one kind of block": {"blocks": {"feed_forward": ["mlp"]}},
    "a stock config with fields of ours": {"base_config": {"base_model_type": "llama"}},
    "no blocks": {"blocks": {}, "first": {"without": ["attention"]}},
    "a block that there is not": {"first": {"without": ["memory"]}},
    "a field of Python's": {"first": {"__class__": 3}},
    "a field of ours": {"first": {"_config": 3}},
    "a field that there is not": {"first": {"fancy": 3}},
    "a size in words": {"first": {"intermediate_size": "wide"}},
    "no size": {"first": {"intermediate_size": 0}},
    "an activation": {"first": {"hidden_act": "silu"}},
    "layers that there are not": {"own": [{}] * 99},
    "no layers": {"own": 3},
    "no architecture": {"base_model_type": "fancy"},
    "itself as the architecture": {"base_model_type": "optimum_prune"},
    "an architecture without a language model": {"base_model_type": "clip"},
    "no config of the architecture": {"base_config": 3},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_paths_and_fields_that_are_no_modules_and_no_sizes_are_refused(case, uneven, tmp_path):
    folder = shutil.copytree(uneven("llama")[1], tmp_path / "hostile")
    plain = json.loads((folder / "config.json").read_text())
    for name, value in HOSTILE[case].items():
        if name == "first":
            plain["pruned"]["own"][0] = value
        elif name.startswith("base_"):
            plain[name] = value
        else:
            plain["pruned"][name] = value
    (folder / "config.json").write_text(json.dumps(plain))
    with pytest.raises(CheckpointError) as caught:
        meta_model(opening.open_checkpoint(str(folder)).config)
    assert "\n" not in str(caught.value)


class Hub:
    """A Hub that keeps the names of what is pushed to it."""

    def __init__(self):
        self.pushed = []

    def create_repo(self, repo_id, **_):
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, operations, **_):
        self.pushed = sorted(operation.path_in_repo for operation in operations)


@pytest.mark.skipif(not hasattr(transformers.utils.hub, "hf_api"), reason="older transformers push in another way")
@pytest.mark.parametrize("again", [False, True], ids=["at first", "over an older one"])
@pytest.mark.parametrize("part", ["model", "config"])
def test_its_code_is_pushed_to_the_hub_with_it(part, again, uneven, tmp_path, monkeypatch):
    hub = Hub()
    for module in (transformers.utils.hub, transformers.modeling_utils, transformers.configuration_utils):
        monkeypatch.setattr(module, "hf_api", lambda: hub)
    monkeypatch.setattr(transformers.modeling_utils, "create_and_tag_model_card", lambda *_, **__: ModelCard(""))
    model = uneven("llama")[0].model
    saved = model if part == "model" else model.config
    if again:
        saved.save_pretrained(tmp_path)
        for file in tmp_path.iterdir():
            os.utime(file, (0, 0))
    saved.save_pretrained(str(tmp_path), push_to_hub=True)
    assert {"config.json", "configuration_pruned.py", "modeling_pruned.py"} <= set(hub.pushed)


class OwnConfig(transformers.LlamaConfig):
    """Of a model that comes with code of its own."""


def test_that_a_model_with_code_of_its_own_cannot_be_saved_so_is_known_beforehand(uneven):
    for config in (tiny.model("llama").config, tiny.model("gemma3-vision").config, uneven("llama")[0].model.config):
        check_heterogeneous(config, "a model")
    with pytest.raises(SurgeryError, match="Keep the same sizes and blocks in every layer"):
        check_heterogeneous(OwnConfig(), "a model")


GONE = Cuts(blocks={0: ("feed_forward",), 2: ("attention",), 4: ("feed_forward",)})


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2", "cohere2", "mistral", "gpt2"])
def test_where_an_attention_is_gone_looking_up_the_prompt_and_assistants_give_the_same_text(name, decoder):
    conformance.cut(decoder, GONE)
    model, half = decoder.model, tiny.windows(1, 12).tokens
    tokens = torch.cat([half, half], dim=1)
    asked = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    expected = model.generate(tokens, **asked)
    for more in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": copy.deepcopy(model)}, {"use_cache": False}):
        assert torch.equal(model.generate(tokens, **asked, **more), expected)


@pytest.mark.parametrize("name", [name for name in tiny.FAMILIES if name != "gemma3-vision"])
def test_a_norm_goes_with_its_block_and_every_parameter_that_is_left_can_be_trained(name, decoder, tmp_path):
    conformance.cut(decoder, GONE)
    found = conformance.reloads_exactly(decoder.model, tmp_path, WINDOWS)
    conformance.generates_as_it_scores(found, WINDOWS)
    if name not in tiny.MIXTURES:
        found(input_ids=WINDOWS.tokens, labels=WINDOWS.tokens).loss.backward()
        assert [each for each, value in found.named_parameters() if value.grad is None] == []
    again = copy.deepcopy(found)
    conformance.reloads_exactly(again, tmp_path / "again", WINDOWS)


@pytest.mark.parametrize("name", ["gemma3-vision"])
def test_one_that_sees_is_found_as_such(name, decoder, tmp_path):
    conformance.cut(decoder, GONE)
    saving.save(decoder.model, None, tmp_path, Progress())
    found = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert torch.equal(conformance.logits(found, WINDOWS), conformance.logits(decoder.model, WINDOWS))

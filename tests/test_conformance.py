from __future__ import annotations

import copy
import subprocess
import sys

import conformance
import pytest
import tiny
import torch
from torch.testing import assert_close

from optimum_prune import Cuts, Depth, Osscar

PASSES = {
    "depth-2": Depth(layers=2),
    "depth-first-and-last": Depth(drop=(0, tiny.LAYERS - 1)),
    "osscar": Osscar(ratio=0.3),
    "osscar-by-steps": Osscar(ratio=0.5, step=4, multiple_of=8),
    "osscar-heads": Osscar(head_ratio=0.5),
    "osscar-both": Osscar(ratio=0.3, head_ratio=0.5),
}
every_family = pytest.mark.parametrize("name", tiny.FAMILIES)
every_pass = pytest.mark.parametrize("step", PASSES.values(), ids=PASSES)


@every_family
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_layers_that_are_cut_are_layers_that_are_skipped(name, subject, padded):
    dense, family = subject
    windows = tiny.windows(2, padded=padded)
    for size in range(1, tiny.LAYERS):
        for start in range(tiny.LAYERS - size + 1):
            gone = range(start, start + size)
            kept = tuple(index for index in range(tiny.LAYERS) if index not in gone)
            model = copy.deepcopy(dense)
            conformance.cut(model, family, Cuts(layers=kept))
            expected = conformance.with_layers_skipped(dense, family, gone, windows)
            assert_close(
                conformance.logits(model, windows),
                expected,
                rtol=1e-5,
                atol=1e-5,
                msg=lambda m, gone=gone: f"without {gone}: {m}",
            )
            conformance.layers_are_numbered(model, family)


@every_family
@pytest.mark.parametrize("part", ["heads", "channels", "experts", "all"])
def test_what_is_cut_is_what_is_masked(name, subject, part):
    dense, family = subject
    windows = tiny.windows(3)
    sizes = {"heads": [{"heads": 1}], "experts": [{"expert_width": width} for width in (8, 16)]}
    sizes["channels"] = [{"width": width} for width in (8, 29, tiny.WIDTH - 1)]
    sizes["all"] = [{"heads": 1, "width": 29, "expert_width": 16}]
    for seed, size in enumerate(sizes[part]):
        if name == "mixtral" and "expert_width" in size:
            size = {**size, "expert_width": 2 * size["expert_width"]}
        cuts = conformance.cuts_to(dense, family, conformance.at_random(seed), **size)
        if cuts == Cuts():
            pytest.skip(f"{name} has no {part} that could be cut")
        model = copy.deepcopy(dense)
        conformance.cut(model, family, cuts)
        expected = conformance.with_masked(dense, family, cuts, windows)
        assert (expected - conformance.logits(dense, windows)).abs().max() > 0.01
        assert_close(conformance.logits(model, windows), expected, rtol=1e-5, atol=1e-5)
        assert {layer.width for layer in family.shape(model).layers} <= {0, size.get("width", tiny.WIDTH)}


@every_family
def test_the_config_says_how_many_heads_there_are_and_how_large_they_are(name, subject):
    model, family = subject
    if family.heads is None:
        pytest.skip(f"the config of {name} cannot say it")
    (before,) = {family.head_counts(layer) for layer in family.layers_of(model)}
    conformance.cut(model, family, conformance.cuts_to(model, family, conformance.at_random(0), heads=1))
    config = family.text_config(model.config)
    assert config.num_key_value_heads == 1
    assert config.num_attention_heads == before.queries
    assert config.head_dim == before.size
    assert {family.head_counts(layer) for layer in family.layers_of(model)} == {(1, before.queries, before.size)}
    afresh = type(model.config).from_dict(model.config.to_dict())
    assert family.text_config(afresh).head_dim == before.size


@every_family
@every_pass
def test_a_pruned_model_reloads_in_stock_transformers_and_generates(name, subject, step, plugins, tmp_path):
    model, family = subject
    if family.heads is None and step.name == "osscar" and step.head_ratio:
        pytest.skip(f"{name} has no heads that could be cut")
    windows = tiny.windows(3)
    foreseen = step.foresee(family.shape(model))
    conformance.pruned(step, model, family, windows, plugins)
    found = conformance.reloads_exactly(model, tmp_path, windows)
    assert family.shape(found) == family.shape(model)
    assert len(foreseen.layers) == len(family.shape(found).layers)
    if (
        step.name == "osscar" or name not in tiny.MIXTURES
    ):  # which layers go is searched for, and those of a mixture differ
        assert family.shape(found) == foreseen
    conformance.layers_are_numbered(found, family)
    conformance.generates_as_it_scores(found, windows)
    if name in tiny.TIED:
        conformance.stays_tied(model, tmp_path)
        conformance.stays_tied(found, tmp_path)


@every_family
def test_passes_compose_on_one_model(name, subject, plugins, tmp_path):
    model, family = subject
    windows = tiny.windows(3)
    last = PASSES["osscar-by-steps"] if family.heads is None else PASSES["osscar-both"]
    for step in (PASSES["osscar"], PASSES["depth-2"], last):
        conformance.pruned(step, model, family, windows, plugins)
    conformance.generates_as_it_scores(conformance.reloads_exactly(model, tmp_path, windows), windows)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gemma3", "gemma3-vision"])
def test_lists_of_the_config_keep_the_entries_of_the_kept_layers(name, subject):
    model, family = subject
    before = list(model.config.get_text_config().layer_types)
    assert len(set(before)) == 2
    for kept in [(0, 1, 2), (1, 3, 5), (4, 5), (0,), (5,)]:
        smaller = copy.deepcopy(model)
        conformance.cut(smaller, family, Cuts(layers=kept))
        config = smaller.config.get_text_config()
        assert config.layer_types == [before[index] for index in kept]
        assert config.num_hidden_layers == len(kept)


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_the_threshold_of_sliding_layers_follows_the_kept_layers(name, subject):
    model, family = subject
    threshold = model.config.max_window_layers
    for kept in [(0, 1, 2), (1, 3, 5), (4, 5), (0, 1), (1, 2, 3, 4)]:
        smaller = copy.deepcopy(model)
        conformance.cut(smaller, family, Cuts(layers=kept))
        config = smaller.config
        assert config.max_window_layers == sum(index < threshold for index in kept)
        afresh = type(config)(**{**config.to_dict(), "layer_types": None})
        assert afresh.layer_types == config.layer_types


FRESH = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokens, expected = torch.load(sys.argv[2])
with torch.no_grad():
    assert torch.equal(model(input_ids=tokens).logits, expected)
assert not any(name.partition(".")[0] == "optimum_prune" for name in sys.modules), "optimum_prune was imported"
print("equal")
"""


@pytest.mark.parametrize("name", ["qwen3"])
def test_a_pruned_model_loads_where_this_package_is_not_imported(name, subject, plugins, tmp_path):
    model, family = subject
    windows = tiny.windows(2)
    for step in (PASSES["osscar"], PASSES["depth-2"]):
        conformance.pruned(step, model, family, windows, plugins)
    conformance.reloads_exactly(model, tmp_path / "saved", windows)
    torch.save([windows.tokens, conformance.logits(model, windows)], tmp_path / "expected.pt")
    command = [sys.executable, "-c", FRESH, tmp_path / "saved", tmp_path / "expected.pt"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "equal", run.stderr

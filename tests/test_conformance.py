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
from optimum_prune.anatomy import find_family

PASSES = {
    "depth-2": Depth(layers=2),
    "depth-first-and-last": Depth(drop=(0, tiny.LAYERS - 1)),
    "osscar": Osscar(ratio=0.3),
    "osscar-by-steps": Osscar(ratio=0.5, step=4, multiple_of=8),
}
every_family = pytest.mark.parametrize("name", tiny.FAMILIES)
every_pass = pytest.mark.parametrize("step", PASSES.values(), ids=PASSES)


@pytest.fixture
def subject(name, plugins):
    model = tiny.model(name)
    return model, find_family(model.config, plugins.families)


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
def test_channels_that_are_cut_are_channels_that_are_masked(name, subject):
    dense, family = subject
    windows = tiny.windows(3)
    generator = torch.Generator().manual_seed(0)
    for width in (8, 29, tiny.WIDTH - 1):
        kept = {
            index: tuple(torch.randperm(tiny.WIDTH, generator=generator)[:width].sort().values.tolist())
            for index in range(tiny.LAYERS)
        }
        model = copy.deepcopy(dense)
        conformance.cut(model, family, Cuts(channels=kept))
        expected = conformance.with_channels_masked(dense, family, kept, windows)
        assert (expected - conformance.logits(dense, windows)).abs().max() > 0.01
        assert_close(conformance.logits(model, windows), expected, rtol=1e-5, atol=1e-5)
        assert family.shape(model.config).width == width


@every_family
@every_pass
def test_a_pruned_model_reloads_in_stock_transformers_and_generates(name, subject, step, plugins, tmp_path):
    model, family = subject
    windows = tiny.windows(3)
    foreseen = step.foresee(family.shape(model.config))
    conformance.pruned(step, model, family, windows, plugins)
    found = conformance.reloads_exactly(model, tmp_path, windows)
    assert family.shape(found.config) == foreseen
    conformance.layers_are_numbered(found, family)
    conformance.generates_as_it_scores(found, windows)
    if name in tiny.TIED:
        conformance.stays_tied(model, tmp_path)
        conformance.stays_tied(found, tmp_path)


@every_family
def test_passes_compose_on_one_model(name, subject, plugins, tmp_path):
    model, family = subject
    windows = tiny.windows(3)
    for step in (PASSES["osscar"], PASSES["depth-2"], PASSES["osscar-by-steps"]):
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

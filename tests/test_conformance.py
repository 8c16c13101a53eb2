from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import tiny
import torch
from torch.testing import assert_close

from optimum_prune import Cuts, Decoder, Depth, Osscar
from optimum_prune import testing as conformance

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


def copied(decoder: Decoder) -> Decoder:
    return Decoder(copy.deepcopy(decoder.model), decoder.family)


@every_family
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_layers_that_are_cut_are_layers_that_are_skipped(name, decoder, padded):
    windows = tiny.windows(2, padded=padded)
    for size in range(1, tiny.LAYERS):
        for start in range(tiny.LAYERS - size + 1):
            gone = range(start, start + size)
            kept = tuple(index for index in range(tiny.LAYERS) if index not in gone)
            smaller = copied(decoder)
            conformance.cut(smaller, Cuts(layers=kept))
            expected = conformance.with_layers_skipped(decoder, gone, windows)
            assert_close(
                conformance.logits(smaller.model, windows),
                expected,
                rtol=1e-5,
                atol=1e-5,
                msg=lambda m, gone=gone: f"without {gone}: {m}",
            )
            assert len(smaller) == len(kept)
            conformance.layers_are_numbered(smaller)


@every_family
@pytest.mark.parametrize("part", ["heads", "channels", "experts", "all"])
def test_what_is_cut_is_what_is_masked(name, decoder, part):
    tiny.in_double(decoder.model)
    windows = tiny.windows(3)
    sizes = {"heads": [{"heads": 1}], "experts": [{"experts": width} for width in (8, 16)]}
    sizes["channels"] = [{"channels": width} for width in (8, 29, tiny.WIDTH - 1)]
    sizes["all"] = [{"heads": 1, "channels": 29, "experts": 16}]
    for seed, size in enumerate(sizes[part]):
        if name == "mixtral" and "experts" in size:
            size = {**size, "experts": 2 * size["experts"]}
        cuts = conformance.cuts_to(decoder, conformance.at_random(seed), size)
        if cuts == Cuts():
            pytest.skip(f"{name} has no {part} that could be cut")
        smaller = copied(decoder)
        conformance.cut(smaller, cuts)
        expected = conformance.with_masked(decoder, cuts, windows)
        assert (expected - conformance.logits(decoder.model, windows)).abs().max() > 0.01
        assert_close(conformance.logits(smaller.model, windows), expected, rtol=1e-9, atol=1e-9)
        for layer, before in zip(smaller.shape().layers, decoder.shape().layers, strict=True):
            for axis in layer.axes:
                assert axis.units == size.get(axis.name, before.units(axis.name)), axis


@every_family
def test_the_config_says_how_many_heads_there_are_and_how_large_they_are(name, decoder):
    if decoder.family.heads is None:
        pytest.skip(f"the config of {name} cannot say it")
    (before,) = {layer.axes["heads"].width for layer in decoder.layers}
    size = decoder.layers[0].part(decoder.family.attention).head_dim
    conformance.cut(decoder, conformance.cuts_to(decoder, conformance.at_random(0), {"heads": 1}))
    config = decoder.config
    assert config.num_key_value_heads == 1
    assert config.num_attention_heads == before // size
    assert config.head_dim == size
    assert {(layer.axes["heads"].units, layer.axes["heads"].width) for layer in decoder.layers} == {(1, before)}
    afresh = type(decoder.model.config).from_dict(decoder.model.config.to_dict())
    assert decoder.family.text_config(afresh).head_dim == size


@every_family
@every_pass
def test_a_pruned_model_reloads_in_stock_transformers_and_generates(name, decoder, step, plugins, tmp_path):
    if decoder.family.heads is None and step.name == "osscar" and step.head_ratio:
        pytest.skip(f"{name} has no heads that could be cut")
    windows, model = tiny.windows(3), decoder.model
    foreseen = step.foresee(decoder.shape())
    conformance.pruned(step, decoder, windows, plugins)
    found = Decoder(conformance.reloads_exactly(model, tmp_path, windows), decoder.family)
    assert found.shape() == decoder.shape()
    assert len(foreseen.layers) == len(found.shape().layers)
    if (
        step.name == "osscar" or name not in tiny.MIXTURES
    ):  # which layers go is searched for, and those of a mixture differ
        assert found.shape() == foreseen
    conformance.layers_are_numbered(found)
    conformance.generates_as_it_scores(found.model, windows)
    if name in tiny.TIED:
        conformance.stays_tied(model, tmp_path)
        conformance.stays_tied(found.model, tmp_path)


@every_family
def test_passes_compose_on_one_model(name, decoder, plugins, tmp_path):
    windows = tiny.windows(3)
    last = PASSES["osscar-by-steps"] if decoder.family.heads is None else PASSES["osscar-both"]
    for step in (PASSES["osscar"], PASSES["depth-2"], last):
        conformance.pruned(step, decoder, windows, plugins)
    conformance.generates_as_it_scores(conformance.reloads_exactly(decoder.model, tmp_path, windows), windows)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gemma3", "gemma3-vision"])
def test_lists_of_the_config_keep_the_entries_of_the_kept_layers(name, decoder):
    before = list(decoder.config.layer_types)
    assert len(set(before)) == 2
    for kept in [(0, 1, 2), (1, 3, 5), (4, 5), (0,), (5,)]:
        smaller = copied(decoder)
        conformance.cut(smaller, Cuts(layers=kept))
        config = smaller.model.config.get_text_config()
        assert config.layer_types == [before[index] for index in kept]
        assert config.num_hidden_layers == len(kept)


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_the_threshold_of_sliding_layers_follows_the_kept_layers(name, decoder):
    threshold = decoder.config.max_window_layers
    for kept in [(0, 1, 2), (1, 3, 5), (4, 5), (0, 1), (1, 2, 3, 4)]:
        smaller = copied(decoder)
        conformance.cut(smaller, Cuts(layers=kept))
        config = smaller.model.config
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
def test_a_pruned_model_loads_where_this_package_is_not_imported(name, decoder, plugins, tmp_path):
    windows = tiny.windows(2)
    for step in (PASSES["osscar"], PASSES["depth-2"]):
        conformance.pruned(step, decoder, windows, plugins)
    conformance.reloads_exactly(decoder.model, tmp_path / "saved", windows)
    torch.save([windows.tokens, conformance.logits(decoder.model, windows)], tmp_path / "expected.pt")
    command = [sys.executable, "-c", FRESH, tmp_path / "saved", tmp_path / "expected.pt"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "equal", run.stderr

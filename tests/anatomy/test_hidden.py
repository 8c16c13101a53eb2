"""The features of hidden states: an axis of the whole model."""

from __future__ import annotations

import copy
import dataclasses
import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import tiny
import torch
from torch.testing import assert_close

from optimum_prune import (
    Cuts,
    Decision,
    Decoder,
    Osscar,
    PrunePass,
    Recipe,
    Report,
    Settings,
    Text,
    compress,
    hookimpl,
    load_model,
    option,
)
from optimum_prune import testing as conformance
from optimum_prune.anatomy.counts import count_parameters
from optimum_prune.checkpoint.opening import meta_model
from optimum_prune.errors import SurgeryError
from optimum_prune.hooks.plugins import load
from optimum_prune.plan.forecast import forecast
from optimum_prune.surgery import operation
from optimum_prune.surgery.cuts import indices

WINDOWS = tiny.windows(3)
WITHOUT = ("gpt2", "gpt2-wide", "gpt_neox", "gpt_neox-sequential", "opt", "opt-post-norm")
"""Families whose configs cannot say that hidden states are smaller, and heads as large as before."""
WITH = tuple(name for name in tiny.FAMILIES if name not in WITHOUT)
RMS_NORMS = tuple(name for name in WITH if not name.startswith("cohere"))
every_family_that_can = pytest.mark.parametrize("name", WITH)
SIZES = (20, 12)


def hidden(kept) -> Cuts:
    return Cuts(units={(None, "hidden"): tuple(kept)})


def kept_features(size: int, before: int = 32) -> tuple[int, ...]:
    return conformance.at_random(size)(before, size)


def agrees_with_its_shape(decoder: Decoder) -> None:
    assert decoder.shape().parameters == count_parameters(decoder.model).total
    assert decoder.shape() == Decoder(meta_model(decoder.model.config), decoder.family).shape()


@every_family_that_can
@pytest.mark.parametrize("size", SIZES)
def test_a_narrower_model_is_as_large_as_foreseen_and_reloads_exactly(name, decoder, size, tmp_path):
    before = decoder.shape()
    foreseen = before.narrowed({"hidden": size})
    conformance.cut(decoder, hidden(kept_features(size)))
    assert decoder.shape() == foreseen
    assert foreseen.parameters < before.parameters
    agrees_with_its_shape(decoder)
    assert decoder.config.hidden_size == size
    found = conformance.reloads_exactly(decoder.model, tmp_path, WINDOWS)
    assert type(found) is type(tiny.model(name))
    assert Decoder(found, decoder.family).shape() == foreseen
    conformance.generates_as_it_scores(found, WINDOWS)
    conformance.generates_as_it_scores(decoder.model, WINDOWS)
    if name in tiny.TIED:
        conformance.stays_tied(decoder.model, tmp_path)
        conformance.stays_tied(found, tmp_path)


@every_family_that_can
def test_every_part_of_the_model_that_is_as_wide_as_hidden_states_keeps_the_same_features(name, decoder):
    kept = kept_features(20)
    whole = dict(decoder.model.named_parameters())
    axis = decoder.hidden()
    conformance.cut(decoder, hidden(kept))
    expected = {path: value.detach() for path, value in whole.items()}
    for member in axis.members:
        expected[member.path] = expected[member.path].index_select(member.dim, torch.tensor(kept))
    found = dict(decoder.model.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[path], value) for path, value in expected.items())
    narrowed = {member.path for member in axis.members}
    for table in (decoder.model.get_input_embeddings(), decoder.model.get_output_embeddings()):
        assert table.weight.shape[1] == 20
    for layer in decoder.layers:
        for block in layer.blocks:
            assert {f"{layer.prefix}{output}" for output in layer.outputs_of(block)} <= narrowed


def zeroed(decoder: Decoder, kept) -> Decoder:
    """The model where the features that are not kept are zero wherever they are stored."""
    silent = Decoder(copy.deepcopy(decoder.model), decoder.family)
    axis = silent.hidden()
    gone = torch.tensor([feature for feature in range(axis.units) if feature not in kept])
    with torch.no_grad():
        for member in axis.members:
            silent.model.get_parameter(member.path).index_fill_(member.dim, gone, 0)
    return silent


def norms(decoder: Decoder) -> list[torch.nn.Module]:
    """The norms over the features of hidden states."""
    paths = {member.path for member in decoder.hidden().members}
    return [
        module
        for name, module in decoder.model.named_modules()
        if f"{name}.weight" in paths and "RMSNorm" in type(module).__name__
    ]


def without_epsilon(decoder: Decoder) -> None:
    """Lets norms add nothing to the mean square, which is not as large over other numbers of features."""
    for norm in norms(decoder):
        setattr(norm, "eps" if hasattr(norm, "eps") else "variance_epsilon", 0.0)


def rescale_norms(decoder: Decoder, before: int) -> None:
    """Lets norms divide by the root mean square over as many features as there were."""
    for norm in norms(decoder):
        one = 1.0 if type(norm).__name__.startswith("Gemma") else 0.0  # these multiply by 1 + weight
        norm.weight.data = (one + norm.weight.data) * (before / decoder.hidden().units) ** 0.5 - one


@pytest.mark.parametrize("name", RMS_NORMS)
@pytest.mark.parametrize("size", SIZES)
def test_features_that_are_cut_are_features_that_are_zero_everywhere(name, decoder, size):
    tiny.in_double(decoder.model)
    without_epsilon(decoder)
    kept = kept_features(size)
    silent, narrow = zeroed(decoder, kept), Decoder(copy.deepcopy(decoder.model), decoder.family)
    conformance.cut(narrow, hidden(kept))
    rescale_norms(narrow, before=32)
    embeddings = [each.model.get_input_embeddings() for each in (silent, narrow)]
    if hasattr(embeddings[0], "embed_scale"):  # by the root of the hidden size
        assert_close(embeddings[1].embed_scale, embeddings[0].embed_scale * (size / 32) ** 0.5)
        embeddings[0].embed_scale = embeddings[1].embed_scale
    expected = conformance.logits(silent.model, WINDOWS)
    assert (expected - conformance.logits(decoder.model, WINDOWS)).abs().max() > 0.1
    assert_close(conformance.logits(narrow.model, WINDOWS), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", WITHOUT)
def test_a_config_that_cannot_say_it_is_told_in_one_sentence(name, decoder):
    assert decoder.hidden() is None
    assert not any(layer.units("hidden") for layer in (*decoder.shape().layers, decoder.shape().rest))
    before = conformance.logits(decoder.model, WINDOWS)
    with pytest.raises(
        SurgeryError, match=rf"The hidden of the model .* family '{decoder.family.name}' cannot say\.$"
    ):
        operation.carry_out(decoder, Decision(hidden(range(12))))
    assert torch.equal(conformance.logits(decoder.model, WINDOWS), before)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma2", "gemma3", "gemma3-vision"])
def test_where_heads_must_divide_the_hidden_size_other_sizes_are_refused(name, decoder):
    assert decoder.hidden().possible == (4, 8, 12, 16, 20, 24, 28, 32)
    with pytest.raises(SurgeryError, match=r"18 features of hidden states .* allows 4, 8"):
        operation.carry_out(decoder, Decision(hidden(range(18))))
    conformance.cut(decoder, conformance.cuts_to(decoder, conformance.first, {"heads": 1}))
    assert 18 in decoder.hidden().possible, "there are two heads now"


# With other cuts


@every_family_that_can
def test_all_axes_and_layers_are_cut_in_one_decision(name, decoder, tmp_path):
    units = {"heads": 1, "channels": 40, "experts": 16}
    if name != "deepseek_v3":  # whose router needs all of so few experts
        units["whole_experts"] = 2
    dense = decoder.shape()
    cuts = conformance.cuts_to(decoder, conformance.at_random(0), units)
    cuts = cuts.merge(hidden(kept_features(20))).merge(Cuts(layers=(0, 2, 3, 5)))
    conformance.cut(decoder, cuts)
    assert decoder.shape() == dense.keep((0, 2, 3, 5)).narrowed({**units, "hidden": 20})
    agrees_with_its_shape(decoder)
    found = conformance.reloads_exactly(decoder.model, tmp_path, WINDOWS)
    assert type(found) is type(tiny.model(name))
    conformance.generates_as_it_scores(found, WINDOWS)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3-vision", "phi3", "qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("first", ["layers that differ", "hidden"])
def test_layers_that_differ_have_narrower_hidden_states_too(name, decoder, first, tmp_path):
    index = next(
        index for index in (1, 2) if "channels" in decoder.layer(index).axes or "experts" in decoder.layer(index).axes
    )
    alone = conformance.cuts_to(decoder, conformance.at_random(0), {"channels": 24, "experts": 16})
    uneven = Cuts(units={key: kept for key, kept in alone.units.items() if key[0] == index})
    uneven = uneven.merge(Cuts(blocks={4: ("feed_forward",)}))
    steps = [uneven, hidden(kept_features(20))]
    for cuts in steps if first != "hidden" else reversed(steps):
        conformance.cut(decoder, cuts)
    agrees_with_its_shape(decoder)
    assert not decoder.shape().even
    found = conformance.reloads_exactly(decoder.model, tmp_path, WINDOWS)
    assert Decoder(found, decoder.family).shape() == decoder.shape()
    conformance.generates_as_it_scores(found, WINDOWS)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_a_narrower_model_has_axes_that_compute_what_is_masked(name, decoder):
    conformance.cut(decoder, hidden(kept_features(20)))
    tiny.in_double(decoder.model)
    cuts = conformance.cuts_to(decoder, conformance.at_random(1), {"heads": 1, "channels": 29, "experts": 13})
    expected = conformance.with_masked(decoder, cuts, WINDOWS)
    smaller = Decoder(copy.deepcopy(decoder.model), decoder.family)
    conformance.cut(smaller, cuts)
    assert_close(conformance.logits(smaller.model, WINDOWS), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["llama-tied", "gemma3"])
def test_it_can_be_trained(name, decoder):
    conformance.cut(decoder, hidden(kept_features(20)))
    model = decoder.model
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())
    model(input_ids=WINDOWS.tokens, labels=WINDOWS.tokens).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["llama"])
def test_a_family_that_misses_a_size_finds_no_such_axis(name, decoder):
    """With the head size left to the config, making hidden states larger would make heads larger too."""
    decoder.model.config.head_dim = None
    without_heads = Decoder(decoder.model, dataclasses.replace(decoder.family, heads=None))
    assert without_heads.hidden() is None


# By a pass


@dataclass(frozen=True, kw_only=True)
class NarrowHidden(PrunePass):
    """Keeps the features of hidden states that are largest in front of the last layer."""

    name: ClassVar[str] = "narrow-hidden"
    keep: int = option("How many.", at_least=1)

    def foresee(self, shape):
        return shape.narrowed({"hidden": self.keep})

    def decide(self, decoder, calibration):
        *_, last = calibration.walk(decoder, "hidden states")
        size = sum(hidden.double().square().sum((0, 1)) for _, hidden in last.stream)
        kept = tuple(size.topk(self.keep).indices.sort().values.tolist())
        yield Decision(hidden(kept), evidence={"kept": kept})


class Plugin:
    @hookimpl
    def passes(self):
        yield NarrowHidden


@pytest.mark.parametrize("name", ["llama-tied", "qwen3_moe"])
def test_a_pass_may_cut_it_with_weights_in_memory_or_on_disk(name, checkpoints, text_file, tmp_path):
    text = Text(text=str(text_file), samples=4, length=24)
    for offload in (False, True):
        settings = Settings(model=str(checkpoints(name)), device="cpu", offload=offload)
        recipe = Recipe(
            passes=(NarrowHidden(keep=20), Osscar(ratio=0.3)),
            calibration=text,
            evaluation=Text(samples=2),
            settings=settings,
        )
        out = tmp_path / f"offload-{offload}"
        report = compress(recipe, out, hooks=[Plugin()])
        assert Report.read(out) == report
        narrowed, _ = json.loads((out / "compression/cuts.json").read_text())
        assert len(indices(narrowed["hidden"])) == 20
    weights = [(tmp_path / f"offload-{offload}" / "model.safetensors").read_bytes() for offload in (False, True)]
    assert weights[0] == weights[1]
    planned = forecast(recipe, load([Plugin()]))
    head, *rows = planned.rows()
    assert {row[0]: row[head.index("hidden size")] for row in rows}["narrow-hidden"] == "20"
    found = load_model(out)
    assert found.config.hidden_size == 20
    assert planned.phases[-1].shape is None or planned.phases[-1].shape.parameters == count_parameters(found).total
    conformance.generates_as_it_scores(found, WINDOWS)

from __future__ import annotations

import copy

import conformance
import pytest
import tiny
import torch

from optimum_prune import Cuts, Decision, Family, FeedForward, Shape, surgery
from optimum_prune.anatomy import find_family, parameters
from optimum_prune.compress import meta_model
from optimum_prune.errors import FamilyError, SurgeryError

LLAMA = Family(name="llama", model_types=("llama",))
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def model():
    return tiny.model("llama")


@pytest.mark.parametrize(
    ("cuts", "why"),
    [
        (Cuts(layers=()), "No decoder layers would be left"),
        (Cuts(layers=(0, 0, 1)), "distinct, in order, and within 0 to 5"),
        (Cuts(layers=(2, 1)), "distinct, in order"),
        (Cuts(layers=(0, 6)), "within 0 to 5"),
        (Cuts(layers=(-1, 0)), "within 0 to 5"),
        (Cuts(channels={0: ()}), "No channels of the FFN would be left"),
        (Cuts(channels={0: (0, 64)}), "within 0 to 63"),
        (Cuts(channels={0: (5, 5)}), "distinct"),
        (Cuts(channels={6: (0, 1)}), "layers 0 to 5"),
        (Cuts(channels={-1: (0, 1)}), "layers 0 to 5"),
    ],
    ids=str,
)
def test_cuts_that_cannot_be_are_refused_and_leave_the_model_alone(model, cuts, why):
    windows = tiny.windows(2)
    before = conformance.logits(model, windows)
    with pytest.raises(SurgeryError, match=why):
        surgery.carry_out(model, LLAMA, Decision(cuts))
    assert torch.equal(conformance.logits(model, windows), before)


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("model.layers.9.mlp.down_proj.weight", torch.zeros(32, 64), "does not have"),
        ("model.layers.1.mlp.nothing", torch.zeros(32, 64), "does not have"),
        (DOWN, torch.zeros(32, 63), r"shape \(32, 63\).*\(32, 64\)"),
        (DOWN, torch.full((32, 64), torch.nan), "not finite"),
    ],
)
def test_weights_that_cannot_be_are_refused(model, name, value, why):
    with pytest.raises(SurgeryError, match=why):
        surgery.carry_out(model, LLAMA, Decision(weights={name: value}))


def test_new_weights_take_the_dtype_of_the_model(model):
    model.to(torch.bfloat16)
    value = torch.randn(32, 64, dtype=torch.float64)
    surgery.carry_out(model, LLAMA, Decision(weights={DOWN: value}))
    found = model.get_parameter(DOWN)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, value.to(torch.bfloat16))


def test_new_weights_have_the_shape_after_the_cut(model):
    kept = tuple(range(0, 64, 2))
    value = torch.randn(32, 32)
    surgery.carry_out(model, LLAMA, Decision(Cuts(channels={1: kept}), {DOWN: value}))
    assert torch.equal(model.get_parameter(DOWN), value)


def test_weights_are_named_as_before_layers_are_cut(model):
    value = torch.randn(32, 64)
    surgery.carry_out(model, LLAMA, Decision(Cuts(layers=(1, 3)), {DOWN: value}))
    assert torch.equal(model.get_parameter("model.layers.0.mlp.down_proj.weight"), value)


def test_layers_of_different_widths_cannot_be_settled(model):
    surgery.carry_out(model, LLAMA, Decision(Cuts(channels={2: (0, 1, 2)})))
    with pytest.raises(SurgeryError, match="from 3 to 64"):
        surgery.settle_width(model, LLAMA)


def test_cutting_keeps_what_training_needs(model):
    conformance.cut(model, LLAMA, Cuts(layers=(0, 2), channels=dict.fromkeys(range(tiny.LAYERS), (0, 3))))
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())
    assert model.model.layers[1].mlp.gate_proj.out_features == 2
    assert model.model.layers[1].mlp.down_proj.in_features == 2
    loss = model(input_ids=tiny.windows(2).tokens, labels=tiny.windows(2).tokens).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_config_list_of_the_wrong_length_is_refused():
    model = tiny.model("gemma3")
    family = Family(name="gemma3", model_types=("gemma3_text",), per_layer=("layer_types",))
    model.config.__dict__["layer_types"] = ["full_attention"] * 4
    with pytest.raises(SurgeryError, match="4 entries in 'layer_types' for 6 decoder layers"):
        surgery.keep_layers(model, family, (0, 1))


@pytest.mark.parametrize("name", tiny.FAMILIES)
@pytest.mark.parametrize("shape", [Shape(6, 64), Shape(4, 64), Shape(6, 40), Shape(1, 8)], ids=str)
def test_a_reshaped_config_describes_the_cut_model_and_leaves_the_original(name, shape, plugins):
    model = tiny.model(name)
    family = find_family(model.config, plugins.families)
    config = surgery.reshaped(model.config, family, shape)
    assert family.shape(model.config) == Shape(tiny.LAYERS, tiny.WIDTH)
    assert family.shape(config) == shape
    smaller = copy.deepcopy(model)
    kept = tuple(range(shape.width))
    conformance.cut(
        smaller, family, Cuts(layers=tuple(range(shape.layers)), channels=dict.fromkeys(range(tiny.LAYERS), kept))
    )
    described = meta_model(config)
    assert parameters(described) == parameters(smaller)
    assert {name: value.shape for name, value in described.named_parameters()} == {
        name: value.shape for name, value in smaller.named_parameters()
    }


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_tied_parameters_count_once(name):
    model = tiny.model(name)
    distinct = {value.data_ptr(): value.numel() for value in model.parameters()}
    tables = {
        table.weight.data_ptr(): table.weight.numel()
        for table in (model.get_input_embeddings(), model.get_output_embeddings())
    }
    assert parameters(model) == {
        "total": sum(distinct.values()),
        "non_embedding": sum(distinct.values()) - sum(tables.values()),
    }
    assert (len(tables) == 1) == (name in tiny.TIED)


@pytest.mark.parametrize(
    ("family", "path"),
    [
        (Family(name="wrong", model_types=("llama",), layers="model.blocks"), "model.blocks"),
        (Family(name="wrong", model_types=("llama",), layers="model.norm"), "model.norm"),
        (Family(name="wrong", model_types=("llama",), feed_forward=FeedForward(output="mlp.w2")), "mlp.w2"),
        (Family(name="wrong", model_types=("llama",), feed_forward=FeedForward(inputs=("mlp.act_fn",))), "mlp.act_fn"),
    ],
    ids=["no list", "not a list", "no linear", "not linear"],
)
def test_a_family_that_does_not_fit_the_model_is_named(model, family, path):
    with pytest.raises(FamilyError, match=rf"Family 'wrong' expects a (ModuleList|Linear) at '{path}'"):
        surgery.keep_channels(family.layers_of(model)[0], family, (0, 1))


def test_an_unknown_architecture_gets_the_lines_of_a_plugin_that_work(plugins):
    class Config:
        model_type = "falcon-h1.5"

    with pytest.raises(FamilyError, match=r"'falcon-h1\.5'.*Known: .*llama") as caught:
        find_family(Config(), plugins.families)
    source, _, project = str(caught.value).partition("# pyproject.toml")
    code = source[source.index("# falcon") :].replace("\n    ", "\n")
    namespace: dict = {}
    exec(code, namespace)
    (family,) = namespace["families"]()
    assert family.model_types == ("falcon-h1.5",)
    assert 'falcon_h1_5_family = "falcon_h1_5_family"' in project

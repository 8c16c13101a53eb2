from __future__ import annotations

import conformance
import pytest
import tiny
import torch
from torch.testing import assert_close

from optimum_prune import Cuts, Decision, Family, FeedForward, LayerShape, Shape, surgery
from optimum_prune.anatomy import find_family, parameters
from optimum_prune.errors import FamilyError, SurgeryError
from optimum_prune.subject import meta_model

LLAMA = Family(name="llama", model_types=("llama",))
every_family = pytest.mark.parametrize("name", tiny.FAMILIES)
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
        (Cuts(heads={0: ()}), "No key-value heads would be left"),
        (Cuts(heads={0: (0, 2)}), "within 0 to 1"),
        (Cuts(heads={0: (1, 0)}), "distinct, in order"),
        (Cuts(heads={6: (0,)}), "layers 0 to 5"),
        (Cuts(experts={0: ((0,), (1,))}), "no experts"),
        (Cuts(shared={0: (0,)}), "no shared experts"),
    ],
    ids=str,
)
def test_cuts_that_cannot_be_are_refused_and_leave_the_model_alone(model, cuts, why):
    windows = tiny.windows(2)
    before = conformance.logits(model, windows)
    with pytest.raises(SurgeryError, match=why):
        surgery.carry_out(model, LLAMA, Decision(cuts))
    assert torch.equal(conformance.logits(model, windows), before)


@pytest.mark.parametrize("name", ["deepseek_v3"])
@pytest.mark.parametrize(
    ("cuts", "why"),
    [
        (Cuts(experts={2: ((0, 1),) * 3}), "each of the 4 experts"),
        (Cuts(experts={2: ((0, 1), (0, 1), (0, 1), (0,))}), "As many channels"),
        (Cuts(experts={2: ((),) * 4}), "No channels of an expert would be left"),
        (Cuts(experts={2: ((0, 24),) * 4}), "within 0 to 23"),
        (Cuts(experts={0: ((0, 1),) * 4}), "no experts in this layer"),
        (Cuts(experts={6: ((0, 1),) * 4}), "layers 0 to 5"),
        (Cuts(shared={2: (0, 48)}), "within 0 to 47"),
        (Cuts(shared={6: (0,)}), "layers 0 to 5"),
        (Cuts(heads={2: (0,)}), "cannot say that a layer has fewer heads"),
        (Cuts(channels={2: (0, 1)}), "mlp.down_proj"),
    ],
    ids=str,
)
def test_cuts_of_a_mixture_that_cannot_be_are_refused_and_leave_it_alone(name, subject, cuts, why):
    model, family = subject
    before = conformance.logits(model, tiny.windows(2))
    with pytest.raises((SurgeryError, FamilyError), match=why):
        surgery.carry_out(model, family, Decision(cuts))
    assert torch.equal(conformance.logits(model, tiny.windows(2)), before)


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


def test_layers_of_different_widths_are_settled_each_for_itself(model):
    dense = tiny.model("llama")
    windows = tiny.windows(2)
    expected = conformance.with_masked(dense, LLAMA, Cuts(channels={2: (0, 1, 2)}), windows)
    conformance.cut(model, LLAMA, Cuts(channels={2: (0, 1, 2)}))
    assert [layer.width for layer in LLAMA.shape(model).layers] == [64, 64, 3, 64, 64, 64]
    assert model.config.intermediate_size == 64
    assert model.config.model_type == "optimum_prune"
    assert_close(conformance.logits(model, windows), expected, rtol=1e-5, atol=1e-5)
    assert LLAMA.shape(meta_model(model.config)) == LLAMA.shape(model)


def test_layers_that_become_alike_again_make_a_stock_model_again(model):
    conformance.cut(model, LLAMA, Cuts(channels={2: tuple(range(40))}))
    odd = type(model)
    others = {index: tuple(range(40)) for index in range(tiny.LAYERS) if index != 2}
    conformance.cut(model, LLAMA, Cuts(channels=others))
    assert isinstance(tiny.model("llama"), type(model))
    assert issubclass(odd, type(model))
    assert (model.config.model_type, model.config.intermediate_size) == ("llama", 40)
    assert "pruned" not in model.config.to_dict()


def test_what_a_config_cannot_say_is_refused(model):
    class Stranger(type(model)):
        pass

    class StrangeConfig(type(model.config)):
        model_type = "strange"

    model.__class__, model.config.__class__ = Stranger, StrangeConfig
    surgery.carry_out(model, LLAMA, Decision(Cuts(channels={2: (0, 1, 2)})))
    with pytest.raises(SurgeryError, match="Keep the same sizes in every layer"):
        surgery.settle(model, LLAMA)


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


@every_family
def test_a_shape_is_the_same_with_and_without_storage_and_counts_every_parameter_once(name, subject):
    model, family = subject
    shape = family.shape(model)
    assert shape == family.shape(meta_model(model.config))
    assert shape.parameters == parameters(model)["total"]
    assert len(shape.layers) == tiny.LAYERS
    layers = family.layers_of(model)
    assert [each.parameters for each in shape.layers] == [
        sum(p.numel() for p in layer.parameters()) for layer in layers
    ]
    assert {each.width for each in shape.layers} <= {0, tiny.WIDTH}
    assert all(bool(each.width) != bool(each.expert_width) for each in shape.layers)
    assert any(each.expert_width for each in shape.layers) == (name in tiny.MIXTURES)


@every_family
def test_narrowed_layers_have_as_many_parameters_as_the_cut_ones(name, subject):
    model, family = subject
    shape = family.shape(model)
    foreseen = Shape(
        tuple(
            layer.narrowed(heads=layer.heads and 1, width=layer.width and 40, expert_width=layer.expert_width and 16)
            for layer in shape.layers
        ),
        shape.elsewhere,
    )
    conformance.cut(
        model, family, conformance.cuts_to(model, family, conformance.first, heads=1, width=40, expert_width=16)
    )
    assert family.shape(model) == foreseen
    assert foreseen.parameters == parameters(model)["total"] < shape.parameters
    assert family.shape(meta_model(model.config)) == foreseen


@every_family
@pytest.mark.parametrize("kept", [(0, 1, 2, 3), (1, 4, 5), (5,)], ids=str)
def test_a_shape_with_fewer_layers_is_that_of_the_cut_model(name, subject, kept):
    model, family = subject
    foreseen = family.shape(model).keep(kept)
    conformance.cut(model, family, Cuts(layers=kept))
    assert family.shape(model) == foreseen
    assert foreseen.parameters == parameters(model)["total"]
    described = meta_model(model.config)
    assert {name: value.shape for name, value in described.named_parameters()} == {
        name: value.shape for name, value in model.named_parameters()
    }


def test_shapes_are_described_in_a_line():
    plain = LayerShape(1000, heads=8, width=64, per_head=10, per_channel=10)
    assert Shape((plain,) * 3).describe() == "3 layers, FFN width 64, 8 heads"
    assert Shape((plain,) * 3).even
    narrow = plain.narrowed(heads=4, width=32)
    assert narrow.parameters == 1000 - 40 - 320
    odd = Shape((plain, narrow))
    assert not odd.even
    assert odd.describe() == "2 layers, FFN width 32-64 (48 on average), 4-8 (6 on average) heads"
    mixed = Shape((LayerShape(1, width=64), LayerShape(1, expert_width=24), LayerShape(1, expert_width=16)))
    assert mixed.describe() == "3 layers, FFN width 64, experts 16-24 (20 on average)"


@every_family
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

from __future__ import annotations

import pytest
import tiny
import torch
from torch.testing import assert_close
from transformers import BloomConfig, Llama4Config, SmolLM3Config

from optimum_prune import AxisShape, Cuts, Decision, Decoder, Family, FeedForward, Heads, LayerShape, Shape
from optimum_prune import testing as conformance
from optimum_prune.anatomy.counts import Counts, count_parameters
from optimum_prune.anatomy.family import find_family
from optimum_prune.checkpoint.opening import meta_model
from optimum_prune.errors import FamilyError, SurgeryError
from optimum_prune.surgery import config, operation

LLAMA = Family(name="llama", model_types=("llama",), heads=Heads(divide_hidden=True))
every_family = pytest.mark.parametrize("name", tiny.FAMILIES)
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def llama():
    return Decoder(tiny.model("llama"), LLAMA)


def described(decoder):
    """The model that the config describes, without storage."""
    return Decoder(meta_model(decoder.model.config), decoder.family)


@pytest.mark.parametrize(
    ("cuts", "why"),
    [
        (Cuts(layers=()), "No decoder layers would be left"),
        (Cuts(layers=(0, 0, 1)), "distinct, in order, and within 0 to 5"),
        (Cuts(layers=(2, 1)), "distinct, in order"),
        (Cuts(layers=(0, 6)), "within 0 to 5"),
        (Cuts(layers=(-1, 0)), "within 0 to 5"),
        (Cuts.along("channels", {0: ()}), "No channels of the FFN would be left"),
        (Cuts.along("channels", {0: (0, 64)}), "within 0 to 63"),
        (Cuts.along("channels", {0: (5, 5)}), "distinct"),
        (Cuts.along("channels", {6: (0, 1)}), "layers 0 to 5"),
        (Cuts.along("channels", {-1: (0, 1)}), "layers 0 to 5"),
        (Cuts.along("heads", {0: ()}), "No key-value heads would be left"),
        (Cuts.along("heads", {0: (0, 2)}), "within 0 to 1"),
        (Cuts.along("heads", {0: (1, 0)}), "distinct, in order"),
        (Cuts.along("heads", {6: (0,)}), "layers 0 to 5"),
        (Cuts.along("experts", {0: ((0,), (1,))}), "experts of layer 0 .* 'llama' cannot say .*: heads, channels"),
        (Cuts.along("shared", {0: (0,)}), "shared of layer 0 .* there are none"),
        (Cuts.along("colours", {0: (0,)}), "colours of layer 0 .* there are none"),
        (Cuts.along("hidden", {0: (0,)}), "hidden of layer 0 .* there are none"),
        (Cuts.along("hidden", {None: ()}), "No features of hidden states would be left"),
        (Cuts.along("hidden", {None: (0, 32)}), "within 0 to 31"),
        (Cuts.along("hidden", {None: tuple(range(30))}), "30 features of hidden states .* 4, 8, 12, .* only"),
        (Cuts.along("channels", {None: (0,)}), "channels of the model is to be cut, .* 'llama' cannot say"),
        (Cuts(blocks={0: ()}), "one at least must be kept"),
        (Cuts(blocks={0: ("norm",)}), "attention, feed_forward"),
        (Cuts(blocks={6: ("attention",)}), "layers 0 to 5"),
    ],
    ids=str,
)
def test_cuts_that_cannot_be_are_refused_and_leave_the_model_alone(llama, cuts, why):
    windows = tiny.windows(2)
    before, shape = conformance.logits(llama.model, windows), llama.shape()
    with pytest.raises(SurgeryError, match=why):
        operation.carry_out(llama, Decision(cuts))
    assert torch.equal(conformance.logits(llama.model, windows), before)
    assert llama.shape() == shape


@pytest.mark.parametrize("name", ["deepseek_v3"])
@pytest.mark.parametrize(
    ("cuts", "why"),
    [
        (Cuts.along("experts", {2: ((0, 1),) * 3}), "each of the 4 experts"),
        (Cuts.along("experts", {2: ((0, 1), (0, 1), (0, 1), (0,))}), "As many channels"),
        (Cuts.along("experts", {2: ((),) * 4}), "No channels of an expert would be left"),
        (Cuts.along("experts", {2: ((0, 24),) * 4}), "within 0 to 23"),
        (Cuts.along("experts", {2: (0, 1)}), "each of the 4 experts"),
        (Cuts.along("experts", {0: ((0, 1),) * 4}), "experts of layer 0 .* there are none"),
        (Cuts.along("experts", {6: ((0, 1),) * 4}), "layers 0 to 5"),
        (Cuts.along("shared", {2: (0, 48)}), "within 0 to 47"),
        (Cuts.along("shared", {6: (0,)}), "layers 0 to 5"),
        (Cuts.along("heads", {2: (0,)}), "heads of layer 2 .* no field for fewer"),
        (Cuts.along("channels", {2: (0, 1)}), "channels of layer 2 .*: experts, shared, whole_experts"),
        (Cuts.along("whole_experts", {2: ()}), "No experts would be left"),
        (Cuts.along("whole_experts", {2: (0, 4)}), "within 0 to 3"),
        (Cuts.along("whole_experts", {2: (0, 1, 3)}), "3 experts .* allows 4 only"),
        (Cuts.along("whole_experts", {2: (1,)}), "1 experts .* allows 4 only"),
        (Cuts.along("whole_experts", {0: (0, 1)}), "whole_experts of layer 0 .* there are none"),
    ],
    ids=str,
)
def test_cuts_of_a_mixture_that_cannot_be_are_refused_and_leave_it_alone(name, decoder, cuts, why):
    before, shape = conformance.logits(decoder.model, tiny.windows(2)), decoder.shape()
    with pytest.raises(SurgeryError, match=why):
        operation.carry_out(decoder, Decision(cuts))
    assert torch.equal(conformance.logits(decoder.model, tiny.windows(2)), before)
    assert decoder.shape() == shape


@pytest.mark.parametrize("name", ["deepseek_v2"])
@pytest.mark.parametrize(
    "cuts", [Cuts.along("shared", {2: tuple(range(24))}), Cuts.along("experts", {2: (tuple(range(8)),) * 4})], ids=str
)
def test_axes_that_one_field_counts_are_cut_together_or_not_at_all(name, decoder, cuts):
    with pytest.raises(SurgeryError, match=r"how layer 2 was cut: by it, 'mlp.shared_experts.*one of its fields"):
        operation.carry_out(decoder, Decision(cuts))


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("model.layers.9.mlp.down_proj.weight", torch.zeros(32, 64), "does not have"),
        ("model.layers.1.mlp.nothing", torch.zeros(32, 64), "does not have"),
        (DOWN, torch.zeros(32, 63), r"shape \(32, 63\).*\(32, 64\)"),
        (DOWN, torch.full((32, 64), torch.nan), "not finite"),
    ],
)
def test_weights_that_cannot_be_are_refused(llama, name, value, why):
    with pytest.raises(SurgeryError, match=why):
        operation.carry_out(llama, Decision(weights={name: value}))


def test_new_weights_take_the_dtype_of_the_model(llama):
    llama.model.to(torch.bfloat16)
    value = torch.randn(32, 64, dtype=torch.float64)
    operation.carry_out(llama, Decision(weights={DOWN: value}))
    found = llama.model.get_parameter(DOWN)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, value.to(torch.bfloat16))


def test_new_weights_have_the_shape_after_the_cut(llama):
    kept = tuple(range(0, 64, 2))
    value = torch.randn(32, 32)
    operation.carry_out(llama, Decision(Cuts.along("channels", {1: kept}), {DOWN: value}))
    assert torch.equal(llama.model.get_parameter(DOWN), value)


def test_weights_are_named_as_before_layers_are_cut(llama):
    value = torch.randn(32, 64)
    operation.carry_out(llama, Decision(Cuts(layers=(1, 3)), {DOWN: value}))
    assert torch.equal(llama.model.get_parameter("model.layers.0.mlp.down_proj.weight"), value)


def test_the_config_says_of_layers_of_different_widths_what_each_has(llama):
    dense = Decoder(tiny.model("llama"), LLAMA)
    windows, cuts = tiny.windows(2), Cuts.along("channels", {2: (0, 1, 2)})
    expected = conformance.with_masked(dense, cuts, windows)
    conformance.cut(llama, cuts)
    assert [layer.units("channels") for layer in llama.shape().layers] == [64, 64, 3, 64, 64, 64]
    assert llama.config.intermediate_size == 64
    assert llama.config.model_type == "optimum_prune"
    assert_close(conformance.logits(llama.model, windows), expected, rtol=1e-5, atol=1e-5)
    assert described(llama).shape() == llama.shape()


def test_layers_that_become_alike_again_make_a_stock_model_again(llama):
    model = llama.model
    conformance.cut(llama, Cuts.along("channels", {2: tuple(range(40))}))
    heterogeneous = type(model)
    others = {index: tuple(range(40)) for index in range(tiny.LAYERS) if index != 2}
    conformance.cut(llama, Cuts.along("channels", others))
    assert isinstance(tiny.model("llama"), type(model))
    assert issubclass(heterogeneous, type(model))
    assert (model.config.model_type, model.config.intermediate_size) == ("llama", 40)
    assert "pruned" not in model.config.to_dict()


def test_what_a_config_cannot_say_is_refused(llama):
    model = llama.model

    class Stranger(type(model)):
        pass

    class StrangeConfig(type(model.config)):
        model_type = "strange"

    model.__class__, model.config.__class__ = Stranger, StrangeConfig
    operation.carry_out(llama, Decision(Cuts.along("channels", {2: (0, 1, 2)})))
    with pytest.raises(SurgeryError, match="Keep the same sizes in every layer"):
        config.sync_config(llama)


def test_cutting_keeps_what_training_needs(llama):
    model, channels = llama.model, Cuts.along("channels", dict.fromkeys(range(tiny.LAYERS), (0, 3)))
    conformance.cut(llama, channels.merge(Cuts(layers=(0, 2))))
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
        operation.keep_layers(Decoder(model, family), (0, 1))


@every_family
def test_a_shape_is_the_same_with_and_without_storage_and_counts_every_parameter_once(name, decoder):
    shape = decoder.shape()
    assert shape == described(decoder).shape()
    assert shape.parameters == count_parameters(decoder.model).total
    assert len(shape.layers) == tiny.LAYERS
    assert [each.parameters for each in shape.layers] == [
        sum(p.numel() for p in layer.parameters()) for layer in decoder.modules
    ]
    assert {each.units("channels") for each in shape.layers} <= {0, tiny.WIDTH}
    assert all(bool(each.units("channels")) != bool(each.units("experts")) for each in shape.layers)
    assert any(each.units("experts") for each in shape.layers) == (name in tiny.MIXTURES)


@every_family
def test_narrowed_layers_have_as_many_parameters_as_the_cut_ones(name, decoder):
    shape, units = decoder.shape(), {"heads": 1, "channels": 40, "experts": 16}
    foreseen = Shape(tuple(layer.narrowed(units) for layer in shape.layers), shape.rest)
    assert shape.narrowed(units) == foreseen
    conformance.cut(decoder, conformance.cuts_to(decoder, conformance.first, units))
    assert decoder.shape() == foreseen
    assert foreseen.parameters == count_parameters(decoder.model).total < shape.parameters
    assert described(decoder).shape() == foreseen


@every_family
@pytest.mark.parametrize("kept", [(0, 1, 2, 3), (1, 4, 5), (5,)], ids=str)
def test_a_shape_with_fewer_layers_is_that_of_the_cut_model(name, decoder, kept):
    foreseen = decoder.shape().keep(kept)
    conformance.cut(decoder, Cuts(layers=kept))
    assert decoder.shape() == foreseen
    assert foreseen.parameters == count_parameters(decoder.model).total
    assert {name: value.shape for name, value in described(decoder).model.named_parameters()} == {
        name: value.shape for name, value in decoder.model.named_parameters()
    }


def test_shapes_are_described_in_a_line():
    heads = AxisShape("heads", 8, block="attention", column="heads")
    channels = AxisShape("channels", 64, block="feed_forward", column="FFN width")
    plain = LayerShape((heads, channels), ((("heads",), 10), (("channels",), 10), ((), 280)))
    assert plain.parameters == 1000
    assert Shape((plain,) * 3).describe() == "3 layers, heads 8, FFN width 64"
    assert Shape((plain,) * 3).even
    narrow = plain.narrowed({"heads": 4, "channels": 32})
    assert narrow.parameters == 1000 - 40 - 320
    uneven = Shape((plain, narrow))
    assert not uneven.even
    assert uneven.describe() == "2 layers, heads 4-8 (6 on average), FFN width 32-64 (48 on average)"
    experts = AxisShape("experts", 24, block="feed_forward", column="FFN width", label="experts")
    mixed = Shape(tuple(LayerShape((axis,)) for axis in (channels, experts, experts.narrowed(16, groups=0))))
    assert mixed.describe() == "3 layers, FFN width 64, experts 16-24 (20 on average)"


def test_parameters_are_counted_by_products_of_units():
    axes = (AxisShape("experts", 4), AxisShape("channels", 10, groups=4), AxisShape("hidden", 8))
    layer = LayerShape(
        axes, ((("channels", "experts", "hidden"), 3), (("experts", "hidden"), 1), (("hidden",), 2), ((), 5))
    )
    assert layer.parameters == 3 * 4 * 10 * 8 + 4 * 8 + 2 * 8 + 5
    assert layer.per_unit("channels") == 3 * 4 * 8
    assert layer.per_unit("experts") == 3 * 10 * 8 + 8
    assert layer.per_unit("hidden") == 3 * 4 * 10 + 4 + 2
    assert layer.per_unit("colours") == 0
    smaller = layer.narrowed({"experts": 2, "hidden": 7, "colours": 1})
    assert smaller.parameters == 3 * 2 * 10 * 7 + 2 * 7 + 2 * 7 + 5
    assert layer.of_size(1234).parameters == 1234
    assert layer.routed == 10 * 3 * 4 * 8


@every_family
def test_tied_parameters_count_once(name):
    model = tiny.model(name)
    distinct = {value.data_ptr(): value.numel() for value in model.parameters()}
    tables = {
        table.weight.data_ptr(): table.weight.numel()
        for table in (model.get_input_embeddings(), model.get_output_embeddings())
    }
    total = sum(distinct.values())
    assert count_parameters(model) == Counts(total, non_embedding=total - sum(tables.values()))
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
def test_a_family_that_does_not_fit_the_model_is_named(llama, family, path):
    decoder = Decoder(llama.model, family)
    for ask in (
        decoder.shape,
        lambda: operation.carry_out(decoder, Decision(Cuts.along("channels", {0: (0, 1)}))),
    ):
        with pytest.raises(FamilyError, match=rf"Family 'wrong' expects a (ModuleList|Linear) at '{path}'"):
            ask()


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


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (SmolLM3Config(num_hidden_layers=4), {"per_layer": ("layer_types", "no_rope_layers")}),
        (Llama4Config(), {"per_layer": ("layer_types", "no_rope_layers"), "config": "text_config"}),
        (BloomConfig(n_layer=2), {"depth": "n_layer"}),
    ],
    ids=lambda each: getattr(each, "model_type", ""),
)
def test_these_lines_name_what_the_config_says_of_each_layer(config, told):
    with pytest.raises(FamilyError) as caught:
        find_family(config, [])
    code = str(caught.value).partition("# pyproject.toml")[0]
    namespace: dict = {}
    exec(code[code.index("# ") :].replace("\n    ", "\n"), namespace)
    (family,) = namespace["families"]()
    assert {name: getattr(family, name) for name in told} == told

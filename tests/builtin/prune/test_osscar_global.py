"""OSSCAR with an allocation for the whole model."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from divergences import divergence_by_hand

from optimum_prune import Calibration, Decoder, Osscar, Shape
from optimum_prune import testing as conformance
from optimum_prune.anatomy.counts import count_parameters
from optimum_prune.surgery.operation import carry_out

CALIBRATION = tiny.windows(16)
SIZES = {"heads": "heads", "width": "channels", "expert_width": "experts"}
"""What the evidence calls the number of units of an axis -> the axis."""


def units(shape: Shape, axis: str) -> list[int]:
    """Of each layer."""
    return [layer.units(axis) for layer in shape.layers]


def uneven(name: str, plugins, matters: int = 2) -> Decoder:
    """A model whose FFNs hardly matter, but for one."""
    decoder = Decoder.of(tiny.model(name), plugins.families)
    with torch.no_grad():
        for layer in decoder.layers:
            if layer.index != matters and "channels" in layer.axes:
                layer.linear_of(layer.axes["channels"].output).module.weight.mul_(0.2)
    return decoder


def weaken_attention(decoder: Decoder, *indices: int) -> None:
    """Makes the heads of some layers hardly matter."""
    with torch.no_grad():
        for index in indices:
            layer = decoder.layer(index)
            layer.linear_of(layer.output_of("attention")).module.weight.mul_(0.01)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "opt", "gpt_neox", "mixtral", "qwen3_moe", "deepseek_v2"])
@pytest.mark.parametrize("target", [{"ratio": 0.25}, {"params": 0.85}], ids=str)
def test_globally_as_many_parameters_go_as_evenly(name, decoder, target, plugins):
    shape = decoder.shape()
    uniform = Osscar(**target).foresee(shape)
    step = Osscar(**target, allocation="global")
    wanted = target["params"] * shape.parameters if "params" in target else uniform.parameters
    outcome = conformance.pruned(step, decoder, CALIBRATION, plugins)
    found = decoder.shape()
    coarsest = max(max(layer.per_unit("channels") * 4, layer.per_unit("experts") * 8) for layer in shape.layers)
    assert abs(found.parameters - wanted) <= coarsest / 2
    assert found.parameters == count_parameters(decoder.model).total
    measured = outcome.evidence[0]["nats_per_token_alone"]
    assert list(measured) == list(range(tiny.LAYERS))
    for index, layer in enumerate(found.layers):
        parts = measured[index]
        for size, each in parts.items():
            assert each[shape.layers[index].units(SIZES[size])] == 0
            assert layer.units(SIZES[size]) >= min(each)
        narrowed = {size for size, axis in SIZES.items() if shape.layers[index].units(axis)}
        assert narrowed - {"heads"} <= set(parts) <= narrowed


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "gpt2"])
def test_globally_the_layer_that_matters_keeps_more_channels_than_the_others(name, plugins):
    decoder = uneven(name, plugins)
    conformance.pruned(Osscar(ratio=0.25, allocation="global"), decoder, CALIBRATION, plugins)
    widths = units(decoder.shape(), "channels")
    assert widths[2] == max(widths) > min(widths)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral"])
def test_by_parameters_heads_go_as_well_as_channels(name, decoder, plugins):
    weaken_attention(decoder, 1, 3)
    shape = decoder.shape()
    outcome = conformance.pruned(Osscar(params=0.8, allocation="global"), decoder, CALIBRATION, plugins)
    found = decoder.shape()
    assert units(found, "heads")[1::2][:2] == [1, 1]
    assert any(units(found, axis) != units(shape, axis) for axis in ("channels", "experts"))
    costs_of_heads = [each["heads"] for each in outcome.evidence[0]["nats_per_token_alone"].values()]
    assert {tuple(each) for each in costs_of_heads} == {(2, 1)}
    assert max(costs_of_heads[1][1], costs_of_heads[3][1]) < min(
        each[1] for index, each in enumerate(costs_of_heads) if index not in (1, 3)
    )


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_moe"])
def test_a_head_ratio_is_kept_to_whatever_the_allocation(name, decoder, plugins):
    step = Osscar(params=0.7, head_ratio=0.5, allocation="global")
    conformance.pruned(step, decoder, CALIBRATION, plugins)
    assert set(units(decoder.shape(), "heads")) == {1}


@pytest.mark.parametrize("name", ["llama"])
def test_all_heads_that_can_go_may_be_all_that_goes(name, decoder, plugins):
    """Layers are then as even as the uniform allocation has them, and different."""
    weaken_attention(decoder, *range(tiny.LAYERS))
    shape = decoder.shape()
    fewer = shape.parameters - sum(layer.per_unit("heads") for layer in shape.layers)
    step = Osscar(params=fewer / shape.parameters, allocation="global")
    conformance.pruned(step, decoder, CALIBRATION, plugins)
    found = decoder.shape()
    assert units(found, "heads") == [1] * tiny.LAYERS
    assert units(found, "channels") == [tiny.WIDTH] * tiny.LAYERS


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("target", [{"ratio": 0.3}, {"params": 0.88}], ids=str)
def test_protected_layers_stay_whole_whatever_the_allocation(name, decoder, target, plugins):
    shape, dense = decoder.shape(), copy.deepcopy(decoder)
    step = Osscar(**target, allocation="global", protect=(0, 3), correction=0.0)
    outcome = conformance.pruned(step, decoder, CALIBRATION, plugins)
    found = decoder.shape()
    for index in step.protect:
        assert found.layers[index] == shape.layers[index]
        assert outcome.evidence[0]["nats_per_token_alone"][index] == {}
        layers = (each.modules[index].state_dict() for each in (dense, decoder))
        assert all(torch.equal(*pair) for pair in zip(*(each.values() for each in layers), strict=True))
    assert found.parameters < shape.parameters


@pytest.mark.parametrize(
    ("name", "multiple"),
    [*((name, multiple) for name in ("llama", "opt") for multiple in (1, 8, 20, 24, 40)), ("deepseek_v3", 8)],
)
def test_globally_every_width_is_a_multiple_of_what_is_asked_for_or_stays_whole(name, decoder, multiple, plugins):
    shape = decoder.shape()
    step = Osscar(ratio=0.4, allocation="global", multiple_of=multiple)
    conformance.pruned(step, decoder, CALIBRATION, plugins)
    found = decoder.shape()
    for before, after in zip(units(shape, "channels"), units(found, "channels"), strict=True):
        assert after == before or after % multiple == 0
    for before, after in zip(units(shape, "experts"), units(found, "experts"), strict=True):
        assert after == before or after % 8 == 0
    assert found.parameters < shape.parameters


@pytest.mark.parametrize("name", ["llama", "deepseek_v2"])
def test_allocating_records_nothing_for_a_backward_pass(name, decoder):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda packed: packed):
        for decision in Osscar(params=0.8, allocation="global").decide(decoder, Calibration(CALIBRATION)):
            carry_out(decoder, decision)
    assert not saved


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("target", [{"ratio": 0.25}, {"params": 0.8}], ids=str)
def test_what_was_allocated_reloads_exactly(name, target, plugins, tmp_path):
    decoder = uneven(name, plugins)
    conformance.pruned(Osscar(**target, allocation="global"), decoder, CALIBRATION, plugins)
    conformance.reloads_exactly(decoder.model, tmp_path, tiny.windows(2, seed=1))


def test_an_allocation_for_the_whole_model_stays_closer_to_it_than_an_even_one(plugins):
    dense = uneven("llama", plugins)
    held_out = tiny.windows(12, seed=1)

    def distance(allocation: str) -> float:
        decoder = copy.deepcopy(dense)
        step = Osscar(ratio=0.4, allocation=allocation, correction=0.0, damping=0.1)
        conformance.pruned(step, decoder, tiny.windows(40), plugins)
        return divergence_by_hand(dense, decoder, held_out)

    assert distance("global") < 0.9 * distance("uniform")

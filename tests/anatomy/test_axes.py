"""The axes of decoder layers: what is cut along one is what was masked, and what its numbers said beforehand."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from unittest.mock import patch

import pytest
import tiny
import torch
from torch.testing import assert_close
from transformers import DeepseekV3ForCausalLM

from optimum_prune import Cuts, Decoder
from optimum_prune import testing as conformance
from optimum_prune.anatomy.axis import Axis, Member
from optimum_prune.anatomy.counts import count_parameters
from optimum_prune.checkpoint.opening import meta_model
from optimum_prune.errors import SurgeryError

WINDOWS = tiny.windows(3)
MIXTURES = ("mixtral", "qwen3_moe", "deepseek_v2")
every_family = pytest.mark.parametrize("name", tiny.FAMILIES)


def copied(decoder: Decoder) -> Decoder:
    return Decoder(copy.deepcopy(decoder.model), decoder.family)


def independent_axes(decoder: Decoder) -> dict[str, list[Axis]]:
    """Name -> the axes of the layers that have one of that name and are cut for themselves."""
    found: dict[str, list[Axis]] = {}
    for layer in decoder.layers:
        for name, axis in layer.axes.items():
            if not axis.follows:
                found.setdefault(name, []).append(axis)
    return found


def fewer_units(axis: Axis) -> list[int]:
    """The smaller numbers of units that the config can say, and kernels multiply."""
    possible = range(1, axis.units) if axis.possible is None else axis.possible
    return [count for count in possible if count < axis.units and count % axis.multiple == 0]


def some(counts: list[int], seed: int, how_many: int) -> list[int]:
    order = torch.randperm(len(counts), generator=torch.Generator().manual_seed(seed))
    return [counts[index] for index in order[:how_many]]


def agrees_with_its_shape(decoder: Decoder) -> None:
    """What is counted by axes is what is there, with storage and without."""
    shape = decoder.shape()
    assert shape.parameters == count_parameters(decoder.model).total
    assert [layer.parameters for layer in shape.layers] == [
        sum(parameter.numel() for parameter in layer.parameters()) for layer in decoder.modules
    ]
    assert shape == Decoder(meta_model(decoder.model.config), decoder.family).shape()


@every_family
def test_what_is_cut_along_an_axis_is_masked_and_counted_as_foreseen(name, decoder):
    tiny.in_double(decoder.model)
    agrees_with_its_shape(decoder)
    before, tried = decoder.shape(), 0
    for name_of_axis, axes in independent_axes(decoder).items():
        for number, size in enumerate(some(fewer_units(axes[0]), seed=0, how_many=3)):
            cuts = conformance.cuts_to(decoder, conformance.at_random(number), {name_of_axis: size})
            smaller = copied(decoder)
            conformance.cut(smaller, cuts)
            agrees_with_its_shape(smaller)
            foreseen = before.narrowed({name_of_axis: size})
            assert smaller.shape() == foreseen
            less = sum((axes[0].units - size) * layer.per_unit(name_of_axis) for layer in before.layers)
            assert before.parameters - foreseen.parameters == less > 0
            if all(axis.output for axis in axes):
                expected = conformance.with_masked(decoder, cuts, WINDOWS)
                assert_close(conformance.logits(smaller.model, WINDOWS), expected, rtol=1e-9, atol=1e-9)
                tried += 1
    assert tried


@every_family
def test_layers_cut_along_all_axes_each_to_a_size_of_its_own_reload_exactly(name, decoder, tmp_path):
    cuts, units = Cuts(), []
    for layer in decoder.layers:
        own = {
            axis.name: some([*fewer_units(axis), axis.units], seed=layer.index, how_many=1)[0]
            for axis in layer.axes.values()
            if not axis.follows
        }
        alone = conformance.cuts_to(decoder, conformance.at_random(layer.index), own)
        of_layer = {key: kept for key, kept in alone.units.items() if key[0] == layer.index}
        cuts = cuts.merge(Cuts(units=of_layer))
        units.append(own)
    foreseen = [layer.narrowed(own) for layer, own in zip(decoder.shape().layers, units, strict=True)]
    conformance.cut(decoder, cuts)
    agrees_with_its_shape(decoder)
    assert list(decoder.shape().layers) == foreseen
    assert len(set(foreseen)) > 1
    found = conformance.reloads_exactly(decoder.model, tmp_path, WINDOWS)
    assert Decoder(found, decoder.family).shape() == decoder.shape()
    conformance.generates_as_it_scores(found, WINDOWS)


@every_family
def test_a_model_cut_along_one_axis_reloads_in_the_stock_class_and_decodes_with_a_cache(name, decoder, tmp_path):
    for name_of_axis, axes in independent_axes(decoder).items():
        for size in some(fewer_units(axes[0]), seed=1, how_many=1):
            smaller = copied(decoder)
            conformance.cut(smaller, conformance.cuts_to(decoder, conformance.at_random(0), {name_of_axis: size}))
            found = conformance.reloads_exactly(smaller.model, tmp_path / name_of_axis, WINDOWS)
            assert type(found) is type(decoder.model)
            conformance.generates_as_it_scores(found, WINDOWS)
            fields = {field: count for axis in axes for field, count in axis.fields.items()}
            for field, count in fields.items():
                assert getattr(decoder.family.text_config(found.config), field) == size * count


@every_family
def test_the_members_of_an_axis_have_a_part_for_each_unit_and_its_output_is_one_of_them(name, decoder):
    for layer in decoder.layers:
        taken = set()
        for axis in layer.axes.values():
            assert not axis.output or axis.output in {member.path for member in axis.members}
            for member in axis.members:
                whole = dict([*layer.module.named_parameters(), *layer.module.named_buffers()])[member.path]
                assert whole.shape[member.dim] == axis.size_along(member)
                features = member.features(torch.arange(axis.units), axis.units)
                assert features.sort().values.tolist() == list(range(whole.shape[member.dim]))
                assert (member.path, member.dim) not in taken
                taken.add((member.path, member.dim))
            if axis.output and not axis.groups:
                assert axis.inputs(range(axis.units)).tolist() == list(range(axis.units * axis.width))


def test_a_unit_has_its_features_in_each_stretch():
    fused = Member("qkv.weight", 0, (4, 2, 2))  # three heads: 12 features of queries, 6 of keys, 6 of values
    kept = torch.tensor([0, 2])
    assert fused.features(kept, units=3).tolist() == [0, 1, 2, 3, 8, 9, 10, 11, 12, 13, 16, 17, 18, 19, 22, 23]
    by_expert = Member("gate_up", 1, (1, 1)).features(torch.tensor([[0, 2], [1, 2]]), units=3)
    assert by_expert.tolist() == [[0, 2, 3, 5], [1, 2, 4, 5]]


# Whole experts


def without_experts(decoder: Decoder, kept: dict[int, tuple[int, ...]]) -> torch.Tensor:
    """Logits where routers give the experts that are gone, of some layers, a logit of minus infinity."""
    linear, router = torch.nn.functional.linear, decoder.family.experts.router

    def deaf(module, gone):
        forward = module.forward

        def masked(rows, weight, *bias):
            found = linear(rows, weight, *bias)
            found[..., gone] = -torch.inf
            return found

        def with_masked_logits(*args, **kwargs):
            with patch("torch.nn.functional.linear", masked):
                return forward(*args, **kwargs)

        return patch.object(module, "forward", with_masked_logits)

    with ExitStack() as stack:
        for index, experts in kept.items():
            gone = [
                expert for expert in range(decoder.layer(index).axes["whole_experts"].units) if expert not in experts
            ]
            stack.enter_context(deaf(decoder.layer(index).part(router), gone))
        return conformance.logits(decoder.model, WINDOWS)


def mixed_layers(decoder: Decoder) -> list[int]:
    return [layer.index for layer in decoder.layers if "whole_experts" in layer.axes]


def grouped(plugins) -> Decoder:
    """A model whose router divides its eight experts into two groups, and chooses from one of them."""
    config = tiny.model("deepseek_v3").config
    config.n_routed_experts = 8
    decoder = Decoder.of(tiny.filled(DeepseekV3ForCausalLM(config)), plugins.families)
    for layer in decoder.layers:
        if "whole_experts" in layer.axes:
            bias = layer.part("mlp.gate").e_score_correction_bias
            bias.copy_(torch.linspace(0, 0.01, 8))
    return decoder


def cut_experts_as_masked(decoder: Decoder, kept: dict[int, tuple[int, ...]]) -> Decoder:
    """The model with these experts only, which is to compute what it does where its routers do not see the others."""
    if type(decoder.layer(max(kept)).part("mlp").gate) is torch.nn.Linear:
        pytest.skip(
            "before transformers 5.16, the router of DeepSeek V2 is not called, so nothing can be hidden from it"
        )
    tiny.in_double(decoder.model)
    smaller = copied(decoder)
    conformance.cut(smaller, Cuts.along("whole_experts", kept))
    expected = without_experts(decoder, kept)
    assert (expected - conformance.logits(decoder.model, WINDOWS)).abs().max() > 0.01
    assert_close(conformance.logits(smaller.model, WINDOWS), expected, rtol=1e-6, atol=1e-6)
    return smaller


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("count", [2, 3])
def test_experts_that_are_cut_are_experts_that_the_router_does_not_see(name, decoder, count, tmp_path):
    kept = {index: conformance.at_random(index)(tiny.EXPERTS, count) for index in mixed_layers(decoder)}
    foreseen = decoder.shape().narrowed({"whole_experts": count})
    smaller = cut_experts_as_masked(decoder, kept)
    assert smaller.shape() == foreseen
    agrees_with_its_shape(smaller)
    assert getattr(smaller.config, decoder.family.experts.count) == count
    smaller.model.float()
    found = conformance.reloads_exactly(smaller.model, tmp_path, WINDOWS)
    assert type(found) is type(tiny.model(name))
    conformance.generates_as_it_scores(found, WINDOWS)


@pytest.mark.parametrize("name", MIXTURES)
def test_layers_may_have_different_numbers_of_experts(name, decoder, tmp_path):
    mixed = mixed_layers(decoder)
    kept = {index: conformance.at_random(index)(tiny.EXPERTS, 2 + index // 2 % 3) for index in mixed}
    assert len({len(each) for each in kept.values()}) > 1
    smaller = cut_experts_as_masked(decoder, kept)
    assert [smaller.layer(index).axes["whole_experts"].units for index in mixed] == [len(kept[i]) for i in mixed]
    agrees_with_its_shape(smaller)
    smaller.model.float()
    found = conformance.reloads_exactly(smaller.model, tmp_path, WINDOWS)
    assert Decoder(found, decoder.family).shape() == smaller.shape()
    conformance.generates_as_it_scores(found, WINDOWS)


def test_of_experts_in_groups_as_many_of_each_group_can_stay(plugins, tmp_path):
    decoder = grouped(plugins)
    assert decoder.layer(5).axes["whole_experts"].possible == (4, 6, 8)
    kept = dict.fromkeys(mixed_layers(decoder), (0, 2, 3, 4, 5, 7))
    before = decoder.layer(5).part("mlp.gate").e_score_correction_bias.clone()
    smaller = cut_experts_as_masked(decoder, kept)
    bias = smaller.layer(5).part("mlp.gate").e_score_correction_bias
    assert_close(bias.float(), before[[0, 2, 3, 4, 5, 7]])
    agrees_with_its_shape(smaller)
    assert smaller.config.n_routed_experts == 6
    smaller.model.float()
    found = conformance.reloads_exactly(smaller.model, tmp_path, WINDOWS)
    conformance.generates_as_it_scores(found, WINDOWS)
    for too_few in ((0, 4), (0, 1, 4, 5, 6)):
        with pytest.raises(SurgeryError, match="allows 4, 6, 8 only"):
            conformance.cut(grouped(plugins), Cuts.along("whole_experts", {5: too_few}))


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_and_their_channels_are_cut_one_after_the_other(name, decoder):
    whole = Cuts.along("whole_experts", dict.fromkeys(mixed_layers(decoder), (0, 2, 3)))
    foreseen = decoder.shape().narrowed({"whole_experts": 3, "experts": 16})
    conformance.cut(decoder, whole)
    conformance.cut(decoder, conformance.cuts_to(decoder, conformance.first, {"experts": 16}))
    assert decoder.shape() == foreseen
    assert {axis.groups for layer in decoder.shape().layers for axis in layer.axes} <= {0, 3}

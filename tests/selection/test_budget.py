from __future__ import annotations

import copy

import conformance
import pytest
import tiny
import torch

from optimum_prune import Cuts, Decision, LayerShape, Osscar, Progress, allocation, layerwise, surgery
from optimum_prune.allocation import Divergence, Measured, allocate, split
from optimum_prune.anatomy import find_family, parameters

# The price of each step


def width(*costs: tuple[int, float], unit: int = 8, per_channel: int = 10) -> Measured:
    return Measured("width", costs, unit, per_channel)


def test_between_what_was_measured_costs_are_straight_lines():
    steps = list(width((64, 0.0), (48, 1.6), (32, 8.0)).steps())
    assert [size for _, size in steps] == [56, 48, 40, 32]
    assert [price for price, _ in steps] == pytest.approx([0.01, 0.01, 0.04, 0.04])


def test_a_line_less_steep_than_the_one_before_is_joined_with_it():
    steps = list(width((64, 0.0), (48, 6.4), (32, 8.0)).steps())
    assert [size for _, size in steps] == [56, 48, 40, 32]
    assert [price for price, _ in steps] == pytest.approx([0.025] * 4)


def test_what_makes_the_model_better_costs_nothing():
    assert [price for price, _ in width((64, 0.0), (56, -1.0), (48, -3.0)).steps()] == [0, 0]


@pytest.mark.parametrize("seed", range(20))
def test_a_step_is_never_dearer_than_those_behind_it(seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = range(128, 127 - 8 * 8, -8)
    costs = [0.0, *torch.randn(len(sizes) - 1, generator=generator).add(0.5).cumsum(0).tolist()]
    measured = width(*zip(sizes, costs, strict=True))
    prices, found = zip(*measured.steps(), strict=True)
    assert list(prices) == sorted(prices)
    assert list(found) == list(sizes[1:])
    known = dict(zip(sizes, costs, strict=True))
    reached = 0.0
    for price, size in measured.steps():  # convex, and nowhere above what was measured
        reached += price * 8 * 10
        assert price == 0 or reached <= max(known[size], 0) + max(-min(costs), 0) + 1e-6


# How much of which layer


def layers(count: int = 4, **sizes: int) -> list[LayerShape]:
    return [LayerShape(**{"parameters": 10_000, "width": 64, "per_channel": 10, **sizes})] * count


def saved(before: list[LayerShape], after: list[LayerShape]) -> int:
    return sum(layer.parameters for layer in before) - sum(layer.parameters for layer in after)


@pytest.mark.parametrize("budget", [0, 1, 39, 40, 41, 80, 500, 777, 1234, 1280])
def test_what_is_gone_is_the_budget_within_half_a_step(budget):
    measured = [[width((64, 0.0), (48, rank), (32, 3 * rank))] for rank in (1.0, 2.0, 3.0, 4.0)]
    assert abs(saved(layers(), allocate(layers(), measured, budget)) - budget) <= 40


@pytest.mark.parametrize("seed", range(20))
def test_steps_of_different_sizes_meet_the_budget_within_half_the_smallest(seed):
    generator = torch.Generator().manual_seed(seed)
    before = layers(heads=4, per_head=333, per_channel=7)
    measured = []
    for _ in before:
        cost = torch.rand(3, generator=generator).tolist()
        heads = Measured("heads", ((4, 0.0), (2, cost[0])), 2, 333)
        measured.append([heads, width((64, 0.0), (40, cost[1]), (16, cost[1] + cost[2]), per_channel=7)])
    for budget in range(0, 3000, 137):
        after = allocate(before, measured, budget)
        assert abs(saved(before, after) - budget) <= 8 * 7 / 2
        assert all(layer.heads in (2, 4) and layer.width % 8 == 0 for layer in after)


def test_the_cheap_layers_go_first():
    measured = [[width((64, 0.0), (32, cost))] for cost in (4.0, 1.0, 3.0, 2.0)]
    assert [layer.width for layer in allocate(layers(), measured, 320)] == [64, 32, 64, 64]
    assert [layer.width for layer in allocate(layers(), measured, 2 * 320)] == [64, 32, 64, 32]
    assert [layer.width for layer in allocate(layers(), measured, 3 * 320)] == [64, 32, 32, 32]
    assert [layer.width for layer in allocate(layers(), measured, 320 + 160)] == [64, 32, 64, 48]


def test_heads_go_before_channels_where_they_cost_less_for_each_parameter():
    before = layers(1, heads=2, per_head=400)
    channels = width((64, 0.0), (32, 0.32))  # 0.001 for each parameter
    for cost, expected in ((0.1, (1, 64)), (1.0, (2, 24 + 8))):
        heads = Measured("heads", ((2, 0.0), (1, cost)), 1, 400)
        (after,) = allocate(before, [[heads, channels]], 400)
        assert (after.heads, after.width) == expected


@pytest.mark.parametrize("seed", range(10))
def test_no_other_allocation_that_saves_as_much_costs_less(seed):
    """Of convex costs, against every combination."""
    generator = torch.Generator().manual_seed(seed)
    slopes = [torch.rand(4, generator=generator).sort().values.cumsum(0).tolist() for _ in range(3)]
    costs = [[0.0, *each] for each in slopes]
    measured = [[width(*zip(range(64, 31, -8), each, strict=True))] for each in costs]
    for steps in range(13):
        after = allocate(layers(3), measured, steps * 80)
        taken = [(64 - layer.width) // 8 for layer in after]
        assert sum(taken) == steps
        found = sum(cost[count] for cost, count in zip(costs, taken, strict=True))
        best = min(
            costs[0][a] + costs[1][b] + costs[2][steps - a - b]
            for a in range(5)
            for b in range(5)
            if 0 <= steps - a - b <= 4
        )
        assert found == pytest.approx(best)


def test_no_layer_gets_narrower_than_was_measured():
    measured = [[width((64, 0.0), (40, 1.0))], [], [width((64, 0.0), (48, 2.0))], [width((64, 0.0))]]
    after = allocate(layers(), measured, 10**9)
    assert [layer.width for layer in after] == [40, 64, 48, 64]


def test_sizes_that_are_no_whole_steps_apart_are_reached_all_the_same():
    measured = [[width((60, 0.0), (48, 1.0), (32, 3.0), unit=16)]]
    (after,) = allocate(layers(1, width=60), measured, 10**9)
    assert after.width == 32
    sizes = {allocate(layers(1, width=60), measured, budget)[0].width for budget in range(0, 300, 10)}
    assert sizes == {60, 48, 32}


# Windows to fit to and windows to measure on


@pytest.mark.parametrize(("count", "fitted", "measured"), [(1, 1, 1), (2, 1, 1), (5, 4, 1), (8, 6, 2), (40, 36, 4)])
def test_a_few_windows_are_held_out_to_measure_on(count, fitted, measured, monkeypatch):
    monkeypatch.setattr(allocation, "LENGTH", 16)
    windows = tiny.windows(count, padded=True)
    to_fit, to_measure = split(windows)
    assert len(to_fit.tokens) == fitted
    assert len(to_measure.tokens) == measured
    assert torch.equal(to_fit.tokens, windows.tokens[:fitted])
    assert torch.equal(to_measure.tokens, windows.tokens[-measured:, :16])
    assert torch.equal(to_fit.mask, windows.mask[:fitted])
    assert torch.equal(to_measure.mask, windows.mask[-measured:, :16])
    assert to_fit.source == windows.source


# What a change costs the model


def divergence_by_hand(dense, changed, windows) -> float:
    """The mean over every second token of what the dense model's predictions tell against those of the changed one."""
    before, after = (conformance.logits(model, windows).double().log_softmax(-1) for model in (dense, changed))
    divergences = (before.exp() * (before - after)).sum(-1)
    counted = windows.mask & (torch.arange(windows.mask.shape[1]) % allocation.STRIDE == 0)
    return divergences[counted].mean().item()


def costs(model, family, windows, index, decisions) -> list[float]:
    """As `Divergence` has them, for decisions about one layer."""
    divergence = Divergence(model, family, windows)
    for visit in layerwise.walk(model, family, windows, Progress(), ""):
        if visit.index == index:
            found = divergence.of(visit, decisions)
    return found


def changed(model, family, decision):
    other = copy.deepcopy(model)
    surgery.carry_out(other, family, decision)
    surgery.settle(other, family)
    return other


SOME = ("llama", "llama-tied", "gemma2", "gemma3-vision", "cohere2", "gpt2", "gpt_neox", "opt", "opt-post-norm")


def decisions_about(index, model, family) -> list[Decision]:
    """Cuts of channels, of heads where they can be cut, of experts, and new weights alone."""
    layer, shape = family.layers_of(model)[index], family.shape(model).layers[index]
    every_other = conformance.cuts_to(
        model, family, conformance.at_random(1), width=shape.width // 2, expert_width=shape.expert_width // 2
    )
    parts = {"channels": every_other.channels, "experts": every_other.experts, "shared": every_other.shared}
    decisions = [Decision(Cuts(**{name: {index: cut[index]} for name, cut in parts.items() if index in cut}))]
    if shape.heads:
        decisions.append(Decision(Cuts(heads={index: (1,)})))
    if shape.width:
        path = family.feed_forward.output
        linear = family.linear(layer, path)
        name = f"{family.layers}.{index}.{path}.weight"
        decisions.append(Decision(weights={name: linear.module.weight.detach().roll(1, -1)}))
    return decisions


@pytest.mark.parametrize("name", [*SOME, *tiny.MIXTURES])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("index", [1, 4])
def test_a_decision_costs_what_the_predictions_of_the_model_that_is_really_changed_diverge(
    name, subject, padded, index
):
    model, family = subject
    windows = tiny.windows(3, padded=padded)
    decisions = decisions_about(index, model, family)
    expected = [divergence_by_hand(model, changed(model, family, each), windows) for each in decisions]
    found = costs(model, family, windows, index, decisions)
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert min(found) > 1e-4


@pytest.mark.parametrize("name", [*SOME, "mixtral"])
def test_a_decision_that_changes_nothing_costs_nothing(name, subject):
    model, family = subject
    shape = family.shape(model).layers[2]
    whole = conformance.cuts_to(model, family, conformance.first, width=shape.width, expert_width=shape.expert_width)
    decisions = [Decision(), Decision(Cuts(channels={2: whole.channels[2]} if shape.width else {}))]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    config = model.config.to_dict()
    assert costs(model, family, tiny.windows(3), 2, decisions) == pytest.approx([0, 0], abs=1e-6)
    costs(model, family, tiny.windows(3), 2, decisions_about(2, model, family))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.config.to_dict() == config


# OSSCAR with an allocation for the whole model


def uneven(name: str, plugins, matters: int = 2):
    """A model whose FFNs hardly matter, but for one."""
    model = tiny.model(name)
    family = find_family(model.config, plugins.families)
    with torch.no_grad():
        for index, layer in enumerate(family.layers_of(model)):
            if index != matters and family.experts_of(layer) is None:
                family.linear(layer, family.feed_forward.output).module.weight.mul_(0.2)
    return model, family


CALIBRATION = tiny.windows(16)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "opt", "gpt_neox", "mixtral", "qwen3_moe", "deepseek_v2"])
@pytest.mark.parametrize("target", [{"ratio": 0.25}, {"params": 0.85}], ids=str)
def test_globally_as_many_parameters_go_as_evenly(name, subject, target, plugins):
    model, family = subject
    shape = family.shape(model)
    uniform = Osscar(**target).foresee(shape)
    step = Osscar(**target, allocation="global")
    wanted = target["params"] * shape.parameters if "params" in target else uniform.parameters
    outcome = conformance.pruned(step, model, family, CALIBRATION, plugins)
    found = family.shape(model)
    coarsest = max(max(layer.per_channel * 4, layer.per_expert_channel * 8) for layer in shape.layers)
    assert abs(found.parameters - wanted) <= coarsest / 2
    assert found.parameters == parameters(model)["total"]
    measured = outcome.evidence[0]["nats_per_token_if_narrowed_alone"]
    assert list(measured) == list(range(tiny.LAYERS))
    for index, layer in enumerate(found.layers):
        parts = measured[index]
        for field, each in parts.items():
            assert each[getattr(shape.layers[index], field)] == 0
            assert getattr(layer, field) >= min(each)
        narrowed = {field for field in ("heads", "width", "expert_width") if getattr(shape.layers[index], field)}
        assert narrowed - {"heads"} <= set(parts) <= narrowed


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "gpt2"])
def test_globally_the_layer_that_matters_keeps_more_channels_than_the_others(name, plugins):
    model, family = uneven(name, plugins)
    conformance.pruned(Osscar(ratio=0.25, allocation="global"), model, family, CALIBRATION, plugins)
    widths = [layer.width for layer in family.shape(model).layers]
    assert widths[2] == max(widths) > min(widths)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral"])
def test_by_parameters_heads_go_as_well_as_channels(name, subject, plugins):
    model, family = subject
    with torch.no_grad():  # heads of some layers hardly matter
        for index in (1, 3):
            family.linear(family.layers_of(model)[index], family.attention_output).module.weight.mul_(0.01)
    shape = family.shape(model)
    outcome = conformance.pruned(Osscar(params=0.8, allocation="global"), model, family, CALIBRATION, plugins)
    found = family.shape(model)
    assert [layer.heads for layer in found.layers][1::2][:2] == [1, 1]
    assert any(
        (layer.width, layer.expert_width) != (before.width, before.expert_width)
        for layer, before in zip(found.layers, shape.layers, strict=True)
    )
    costs_of_heads = [each["heads"] for each in outcome.evidence[0]["nats_per_token_if_narrowed_alone"].values()]
    assert {tuple(each) for each in costs_of_heads} == {(2, 1)}
    assert max(costs_of_heads[1][1], costs_of_heads[3][1]) < min(
        each[1] for index, each in enumerate(costs_of_heads) if index not in (1, 3)
    )


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_moe"])
def test_a_head_ratio_is_kept_to_whatever_the_allocation(name, subject, plugins):
    model, family = subject
    step = Osscar(params=0.7, head_ratio=0.5, allocation="global")
    conformance.pruned(step, model, family, CALIBRATION, plugins)
    assert {layer.heads for layer in family.shape(model).layers} == {1}


@pytest.mark.parametrize("name", ["llama"])
def test_all_heads_that_can_go_may_be_all_that_goes(name, subject, plugins):
    """Layers are then as even as the uniform allocation has them, and different."""
    model, family = subject
    with torch.no_grad():
        for layer in family.layers_of(model):
            family.linear(layer, family.attention_output).module.weight.mul_(0.01)
    shape = family.shape(model)
    fewer = shape.parameters - sum(layer.per_head for layer in shape.layers)
    step = Osscar(params=fewer / shape.parameters, allocation="global")
    conformance.pruned(step, model, family, CALIBRATION, plugins)
    assert [(layer.heads, layer.width) for layer in family.shape(model).layers] == [(1, tiny.WIDTH)] * tiny.LAYERS


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("target", [{"ratio": 0.3}, {"params": 0.88}], ids=str)
def test_protected_layers_stay_whole_whatever_the_allocation(name, subject, target, plugins):
    model, family = subject
    shape, dense = family.shape(model), copy.deepcopy(model)
    step = Osscar(**target, allocation="global", protect=(0, 3), correction=0.0)
    outcome = conformance.pruned(step, model, family, CALIBRATION, plugins)
    found = family.shape(model)
    for index in step.protect:
        assert found.layers[index] == shape.layers[index]
        assert outcome.evidence[0]["nats_per_token_if_narrowed_alone"][index] == {}
        layers = (family.layers_of(each)[index].state_dict() for each in (dense, model))
        assert all(torch.equal(*pair) for pair in zip(*(each.values() for each in layers), strict=True))
    assert found.parameters < shape.parameters


@pytest.mark.parametrize(
    ("name", "multiple"),
    [*((name, multiple) for name in ("llama", "opt") for multiple in (1, 8, 20, 24, 40)), ("deepseek_v3", 8)],
)
def test_globally_every_width_is_a_multiple_of_what_is_asked_for_or_stays_whole(name, subject, multiple, plugins):
    model, family = subject
    shape = family.shape(model)
    step = Osscar(ratio=0.4, allocation="global", multiple_of=multiple)
    conformance.pruned(step, model, family, CALIBRATION, plugins)
    for before, after in zip(shape.layers, family.shape(model).layers, strict=True):
        assert after.width == before.width or after.width % multiple == 0
        assert after.expert_width == before.expert_width or after.expert_width % 8 == 0
    assert family.shape(model).parameters < shape.parameters


@pytest.mark.parametrize("name", ["llama", "deepseek_v2"])
def test_allocating_records_nothing_for_a_backward_pass(name, subject):
    model, family = subject
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda packed: packed):
        for decision in Osscar(params=0.8, allocation="global").decide(model, family, CALIBRATION, Progress()):
            surgery.carry_out(model, family, decision)
    assert not saved


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("target", [{"ratio": 0.25}, {"params": 0.8}], ids=str)
def test_what_was_allocated_reloads_exactly(name, target, plugins, tmp_path):
    model, family = uneven(name, plugins)
    conformance.pruned(Osscar(**target, allocation="global"), model, family, CALIBRATION, plugins)
    conformance.reloads_exactly(model, tmp_path, tiny.windows(2, seed=1))


def test_an_allocation_for_the_whole_model_stays_closer_to_it_than_an_even_one(plugins):
    dense, family = uneven("llama", plugins)
    held_out = tiny.windows(12, seed=1)

    def distance(allocation: str) -> float:
        model = copy.deepcopy(dense)
        step = Osscar(ratio=0.4, allocation=allocation, correction=0.0, damping=0.1)
        conformance.pruned(step, model, family, tiny.windows(40), plugins)
        return divergence_by_hand(dense, model, held_out)

    assert distance("global") < 0.9 * distance("uniform")

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch

from optimum_prune import AxisShape, LayerShape
from optimum_prune.anatomy.shape import ATTENTION, FEED_FORWARD
from optimum_prune.selection.budget import Measured, allocate

# The price of each step


def width(*costs: tuple[int, float], unit: int = 8, per_channel: int = 10) -> Measured:
    return Measured("channels", costs, unit, per_channel)


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


def layers(
    count: int = 4, *, channels: int = 64, per_channel: int = 10, heads: int = 0, per_head: int = 0
) -> list[LayerShape]:
    """Layers of one shape, with 10000 parameters each."""
    axes = [AxisShape("channels", channels, FEED_FORWARD)]
    terms = [(("channels",), per_channel), ((), 10_000 - channels * per_channel - heads * per_head)]
    if heads:
        axes.append(AxisShape("heads", heads, ATTENTION))
        terms.append((("heads",), per_head))
    return [LayerShape(tuple(axes), tuple(terms))] * count


def channels_of(shapes: Iterable[LayerShape]) -> list[int]:
    return [layer.units("channels") for layer in shapes]


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
        assert all(layer.units("heads") in (2, 4) and layer.units("channels") % 8 == 0 for layer in after)


def test_the_cheap_layers_go_first():
    measured = [[width((64, 0.0), (32, cost))] for cost in (4.0, 1.0, 3.0, 2.0)]
    assert channels_of(allocate(layers(), measured, 320)) == [64, 32, 64, 64]
    assert channels_of(allocate(layers(), measured, 2 * 320)) == [64, 32, 64, 32]
    assert channels_of(allocate(layers(), measured, 3 * 320)) == [64, 32, 32, 32]
    assert channels_of(allocate(layers(), measured, 320 + 160)) == [64, 32, 64, 48]


def test_heads_go_before_channels_where_they_cost_less_for_each_parameter():
    before = layers(1, heads=2, per_head=400)
    channels = width((64, 0.0), (32, 0.32))  # 0.001 for each parameter
    for cost, expected in ((0.1, (1, 64)), (1.0, (2, 24 + 8))):
        heads = Measured("heads", ((2, 0.0), (1, cost)), 1, 400)
        (after,) = allocate(before, [[heads, channels]], 400)
        assert (after.units("heads"), after.units("channels")) == expected


@pytest.mark.parametrize("seed", range(10))
def test_no_other_allocation_that_saves_as_much_costs_less(seed):
    """Of convex costs, against every combination."""
    generator = torch.Generator().manual_seed(seed)
    slopes = [torch.rand(4, generator=generator).sort().values.cumsum(0).tolist() for _ in range(3)]
    costs = [[0.0, *each] for each in slopes]
    measured = [[width(*zip(range(64, 31, -8), each, strict=True))] for each in costs]
    for steps in range(13):
        after = allocate(layers(3), measured, steps * 80)
        taken = [(64 - channels) // 8 for channels in channels_of(after)]
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
    assert channels_of(after) == [40, 64, 48, 64]


def test_sizes_that_are_no_whole_steps_apart_are_reached_all_the_same():
    measured = [[width((60, 0.0), (48, 1.0), (32, 3.0), unit=16)]]
    (after,) = allocate(layers(1, channels=60), measured, 10**9)
    assert after.units("channels") == 32
    sizes = {channels_of(allocate(layers(1, channels=60), measured, budget))[0] for budget in range(0, 300, 10)}
    assert sizes == {60, 48, 32}

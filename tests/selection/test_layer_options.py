from __future__ import annotations

import math
import random
from itertools import pairwise, product

import pytest

from optimum_prune.selection.options import Curve, Option, chosen, filled, frontier, hull


def options(rng: random.Random, count: int) -> list[Option]:
    """The layer as it is, and smaller ways, the smaller the dearer but for some chance."""
    sizes = sorted(rng.sample(range(100), count - 1), reverse=True)
    smaller = [Option(None, float(size), (100 - size) * rng.uniform(0.5, 2)) for size in sizes]
    return [Option(None, 100.0, 0.0), *smaller]


@pytest.mark.parametrize("seed", range(20))
def test_a_hull_lies_below_every_option_and_grows_dearer(seed):
    rng = random.Random(seed)
    given = options(rng, 8)
    found = hull(given)
    assert found[0] == given[0]
    assert {option.size for option in found} >= {min(option.size for option in given)}
    prices = [(small.cost - large.cost) / (large.size - small.size) for large, small in pairwise(found)]
    assert prices == sorted(prices)
    for option in given:
        for large, small in pairwise(found):
            if small.size <= option.size <= large.size:
                share = (large.size - option.size) / (large.size - small.size)
                assert large.cost + share * (small.cost - large.cost) <= option.cost + 1e-9


def test_what_is_smaller_and_costs_no_more_takes_the_place_of_what_is_larger():
    assert [each.size for each in hull([Option(None, 9.0, 0.0), Option(None, 5.0, 0.0), Option(None, 7.0, 1.0)])] == [
        5.0
    ]


@pytest.mark.parametrize("seed", range(10))
def test_a_choice_is_within_its_size_and_no_dearer_than_the_best_that_is_smaller_by_a_step(seed):
    rng = random.Random(seed)
    layers = [hull(options(rng, 4)) for _ in range(4)]
    every = [(sum(o.size for o in each), sum(o.cost for o in each)) for each in product(*layers)]
    largest_step = max(large.size - small.size for layer in layers for large, small in pairwise(layer))
    for size in range(60, 400, 20):
        found = chosen(layers, size)
        total, cost = sum(each.size for each in found), sum(each.cost for each in found)
        assert total <= max(size, min(total for total, _ in every))
        smaller = [cost for total, cost in every if total <= size - largest_step]
        assert cost <= min(smaller, default=math.inf) + 1e-9


def test_a_frontier_goes_from_everything_to_the_least_and_grows_dearer():
    rng = random.Random(0)
    layers = [hull(options(rng, 6)) for _ in range(5)]
    found = frontier(layers, 10)
    assert found[0] == (500.0, 0.0)
    assert found[-1][0] == pytest.approx(sum(layer[-1].size for layer in layers))
    assert [size for size, _ in found] == sorted((size for size, _ in found), reverse=True)
    assert [cost for _, cost in found] == sorted(cost for _, cost in found)


def test_costs_between_sizes_are_in_proportion_to_errors():
    curve = Curve((10, 20, 40), (0.5, 0.2, 0.0), 3.0)
    assert [curve.at(size) for size in (10, 15, 20, 30, 40)] == pytest.approx([1.5, 1.05, 0.6, 0.3, 0.0])


@pytest.mark.parametrize("seed", range(20))
def test_room_that_is_left_is_made_use_of(seed):
    rng = random.Random(seed)
    layers = [options(rng, 6) for _ in range(4)]
    size = rng.uniform(100, 350)
    picked = chosen([hull(each) for each in layers], size)
    if sum(each.size for each in picked) > size:
        return
    found = filled(picked, layers, size)
    total = sum(each.size for each in found)
    assert total <= size + 1e-9
    assert sum(each.cost for each in found) <= sum(each.cost for each in picked)
    for now, others in zip(found, layers, strict=True):
        assert not any(now.size < each.size <= now.size + size - total and each.cost < now.cost for each in others)

"""The order in which windows of domains are trained on."""

from __future__ import annotations

from collections import Counter

import pytest

from optimum_prune.text.mixture import Mixture

STEPS, WINDOWS = 20, 8


def taken(mixture, steps=range(STEPS)):
    return [mixture.of_step(step) for step in steps]


def test_each_domain_is_as_much_of_the_steps_as_its_weight():
    counts = Counter(domain for step in taken(Mixture([10, 100, 50], [1, 2, 5], WINDOWS, 0)) for domain, _ in step)
    assert counts == {0: pytest.approx(20, abs=2), 1: pytest.approx(40, abs=2), 2: pytest.approx(100, abs=2)}


def test_no_window_comes_again_before_all_of_its_domain_came():
    counts = Counter(window for step in taken(Mixture([10, 200], [1, 1], WINDOWS, 0)) for window in step)
    of_first = [count for (domain, _), count in counts.items() if domain == 0]
    assert len(of_first) == 10
    assert max(of_first) - min(of_first) <= 1
    assert {count for (domain, _), count in counts.items() if domain == 1} == {1}


def test_the_order_is_another_in_each_round_and_with_each_seed():
    orders = [
        tuple(window for step in taken(Mixture([16], [1], WINDOWS, seed)) for _, window in step) for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0][:16] != orders[0][16:32]
    assert sorted(orders[0][:16]) == sorted(orders[0][16:32]) == list(range(16))


def test_other_weights_hold_from_the_next_step_on():
    mixture = Mixture([100, 100], [1, 1], WINDOWS, 0)
    before = mixture.of_step(0)
    mixture.weights = [0, 1]
    assert mixture.of_step(0) == before
    assert {domain for domain, _ in mixture.of_step(1)} == {1}


@pytest.mark.parametrize("broken", [1, 7, 19])
def test_from_its_state_it_goes_on_to_the_same_windows(broken):
    def change(mixture, step):
        mixture.weights = [1 + step % 3, 2]

    whole, parted = (Mixture([10, 30], [1, 2], WINDOWS, 0) for _ in range(2))
    wanted, found = [], []
    for step in range(STEPS):
        wanted.append(whole.of_step(step))
        change(whole, step)
        if step == broken:
            state = parted.state()
            parted = Mixture([10, 30], [1, 2], WINDOWS, 0)
            parted.load(state)
        found.append(parted.of_step(step))
        change(parted, step)
    assert found == wanted

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch
from problems import inputs_of, least_squares, naive, naive_groups, objective, problem
from torch import Tensor
from torch.testing import assert_close

from optimum_prune.refit.elimination import eliminate, eliminate_groups, eliminations, group_eliminations
from optimum_prune.refit.solving import damped


@pytest.mark.parametrize("step", [1, 4, 7, 100])
@pytest.mark.parametrize(("size", "keep", "tokens"), [(60, 20, 300), (150, 13, 400), (200, 60, 80), (200, 136, 1000)])
def test_lazy_updates_choose_what_fresh_inverses_choose(size, keep, tokens, step):
    gram, weight = problem(size, tokens)
    found = eliminate(gram, weight, keep, step)
    assert found.kept == naive(gram, weight.T, keep, step)
    expected, loss = least_squares(gram, weight.T, found.kept)
    assert found.loss == pytest.approx(loss, rel=1e-8)
    assert_close(found.weight, expected[list(found.kept)].T, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("keep", [2, 4, 6])
@pytest.mark.parametrize("seed", range(5))
def test_the_greedy_lies_between_the_best_subset_and_trivial_ones(seed, keep):
    gram, weight = problem(8, 30, seed=seed)
    losses = [least_squares(gram, weight.T, kept)[1] for kept in combinations(range(8), keep)]
    found = eliminate(gram, weight, keep).loss
    assert min(losses) * (1 - 1e-9) <= found <= sum(losses) / len(losses)
    by_norm = weight.norm(dim=0).argsort(descending=True)[:keep]
    unfitted = torch.zeros_like(weight)
    unfitted[:, by_norm] = weight[:, by_norm]
    assert found <= objective(gram, weight.T, unfitted.T)


def test_keeping_fewer_keeps_a_part_and_costs_more():
    gram, weight = problem(150, 400)
    results = [eliminate(gram, weight, keep) for keep in (150, 149, 100, 86, 40, 1)]
    for more, fewer in pairwise(results):
        assert set(fewer.kept) < set(more.kept)
        assert 0 <= more.relative_error < fewer.relative_error < 1
    assert results[0].loss == 0
    assert_close(results[0].weight, weight)


def test_the_relative_error_compares_with_removing_everything():
    gram, weight = problem(40, 100)
    found = eliminate(gram, weight, 10)
    assert found.relative_error == pytest.approx(found.loss / objective(gram, weight.T, torch.zeros_like(weight.T)))


def test_elimination_is_deterministic():
    gram, weight = problem(150, 40)
    first, second = eliminate(gram, weight, 50), eliminate(gram.clone(), weight.clone(), 50)
    assert first.kept == second.kept
    assert torch.equal(first.weight, second.weight)


def test_arguments_are_left_as_they_were():
    gram, weight = problem(100, 300)
    before = gram.clone(), weight.clone()
    eliminate(gram, weight, 20)
    assert torch.equal(gram, before[0])
    assert torch.equal(weight, before[1])


def test_dead_channels_go_first_and_leave_the_others_alone():
    generator = torch.Generator().manual_seed(0)
    activations = torch.randn(500, 96, generator=generator, dtype=torch.float64)
    dead = torch.arange(0, 96, 3)
    activations[:, dead] = 0
    weight = torch.randn(12, 96, generator=generator, dtype=torch.float64)
    found = eliminate(damped(activations.T @ activations, 0.01), weight, 64)
    assert set(found.kept).isdisjoint(dead.tolist())
    assert_close(found.weight, weight[:, list(found.kept)], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_few_tokens_give_finite_weights_that_reproduce_them(tokens):
    generator = torch.Generator().manual_seed(0)
    activations = torch.randn(tokens, 80, generator=generator)
    weight = torch.randn(12, 80, generator=generator)
    found = eliminate(damped(activations.T @ activations, 1e-6), weight, 40)
    assert len(found.kept) == 40
    assert found.weight.isfinite().all()
    assert 0 <= found.relative_error <= 1
    assert_close(
        activations[:, list(found.kept)].double() @ found.weight.T,
        (activations @ weight.T).double(),
        rtol=0,
        atol=1e-2,
    )


def test_without_a_token_the_weights_stay_and_the_smallest_go():
    weight = torch.randn(12, 80, generator=torch.Generator().manual_seed(0))
    found = eliminate(damped(torch.zeros(80, 80), 0.01), weight, 30)
    assert set(found.kept) == set(weight.norm(dim=0).argsort(descending=True)[:30].tolist())
    assert_close(found.weight.float(), weight[:, list(found.kept)])


def test_weights_of_zero_lose_nothing():
    gram, weight = problem(40, 100)
    found = eliminate(gram, torch.zeros_like(weight), 10)
    assert (len(found.kept), found.loss, found.relative_error) == (10, 0, 0)


def test_one_shot_is_close_to_the_greedy_and_above_it():
    gram, weight = problem(200, 400)
    greedy, ranked = eliminate(gram, weight, 160), eliminate(gram, weight, 160, step=200)
    naive = (weight.T.square().sum(1) / torch.linalg.inv(gram).diagonal()).topk(160).indices
    assert ranked.kept == tuple(sorted(naive.tolist()))
    assert greedy.loss <= ranked.loss < 1.5 * greedy.loss


@pytest.mark.parametrize(("size", "groups", "keep"), [(1, 20, 7), (4, 12, 5), (8, 6, 1), (16, 8, 3), (64, 3, 2)])
@pytest.mark.parametrize("tokens", [20, 500])
def test_groups_go_as_trying_each_lets_them_go(size, groups, keep, tokens):
    gram, weight = problem(size * groups, tokens)
    found = eliminate_groups(gram, weight, keep, size)
    assert found.kept == naive_groups(gram, weight.T, keep, size)
    inputs = inputs_of(found.kept, size)
    expected, loss = least_squares(gram, weight.T, tuple(inputs))
    assert found.loss == pytest.approx(loss, rel=1e-8)
    assert found.loss == pytest.approx(objective(gram, weight.T, expected))
    assert_close(found.weight, expected[inputs].T, rtol=1e-6, atol=1e-8)
    assert found.relative_error == pytest.approx(loss / objective(gram, weight.T, torch.zeros_like(weight.T)))


@pytest.mark.parametrize("keep", [1, 3, 5])
@pytest.mark.parametrize("seed", range(4))
def test_the_greedy_over_groups_lies_between_the_best_subset_and_the_average(seed, keep):
    gram, weight = problem(24, 60, seed=seed)
    subsets = [tuple(inputs_of(kept, 4)) for kept in combinations(range(6), keep)]
    losses = [least_squares(gram, weight.T, inputs)[1] for inputs in subsets]
    found = eliminate_groups(gram, weight, keep, 4).loss
    assert min(losses) * (1 - 1e-9) <= found <= sum(losses) / len(losses)
    if keep == 5:  # one group goes, so the greedy cannot err
        assert found == pytest.approx(min(losses), rel=1e-9)


@pytest.mark.parametrize(("size", "keep"), [(40, 39), (60, 20), (60, 1), (60, 60)])
def test_groups_of_one_are_channels(size, keep):
    gram, weight = problem(size, 200)
    groups, channels = eliminate_groups(gram, weight, keep, 1), eliminate(gram, weight, keep)
    assert groups.kept == channels.kept
    assert groups.loss == pytest.approx(channels.loss, rel=1e-9, abs=1e-12)
    assert_close(groups.weight, channels.weight, rtol=1e-9, atol=1e-10)


def test_groups_leave_their_arguments_as_they_were():
    gram, weight = problem(40, 100)
    before = gram.clone(), weight.clone()
    eliminate_groups(gram, weight, 3, 8)
    assert torch.equal(gram, before[0])
    assert torch.equal(weight, before[1])


def of_one_token(size: int) -> Tensor:
    row = torch.randn(1, size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return row.T @ row


def with_dead_channels(size: int) -> Tensor:
    gram, _ = problem(size, 300)
    gram[::3], gram[:, ::3] = 0, 0
    return gram


def of_low_rank(size: int) -> Tensor:
    rows = torch.randn(size // 5, size, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return rows.T @ rows


@pytest.mark.parametrize("degenerate", [of_one_token, with_dead_channels, of_low_rank])
@pytest.mark.parametrize("solve", ["channels", "groups"])
def test_degenerate_grams_are_solved_as_well_as_by_naive_inverses(degenerate, solve):
    size, keep, group = 48, 24, 4
    gram, (_, weight) = damped(degenerate(size), 0.01), problem(size, 100)
    if solve == "channels":
        found, inputs = eliminate(gram, weight, keep), None
        inputs, fresh = list(found.kept), list(naive(gram, weight.T, keep, 1))
    else:
        found = eliminate_groups(gram, weight, keep // group, group)
        inputs = inputs_of(found.kept, group)
        fresh = inputs_of(naive_groups(gram, weight.T, keep // group, group), group)
    expected, loss = least_squares(gram, weight.T, tuple(inputs))
    assert found.loss == pytest.approx(loss, rel=1e-6)
    assert found.loss <= least_squares(gram, weight.T, tuple(fresh))[1] * (1 + 1e-6)
    assert_close(found.weight, expected[inputs].T, rtol=1e-5, atol=1e-6)
    assert 0 <= found.relative_error <= 1


@pytest.mark.parametrize("harm", [torch.nan, torch.inf, -1.0], ids=["nan", "inf", "negative"])
@pytest.mark.parametrize("solve", ["channels", "groups"])
def test_a_gram_that_is_not_finite_or_not_positive_definite_is_no_silent_success(solve, harm):
    gram, weight = problem(40, 100)
    gram[7, 7] = harm
    with pytest.raises(torch.linalg.LinAlgError):
        eliminate(gram, weight, 5) if solve == "channels" else eliminate_groups(gram, weight, 5, 4)


@pytest.mark.parametrize("step", [1, 4, 300])
@pytest.mark.parametrize("swaps", [0, 3])
def test_sizes_that_an_elimination_comes_by_are_as_if_each_was_asked_for_alone(step, swaps):
    gram, weight = problem(200, 300)
    sizes = (200, 180, 100, 36, 12)  # whole steps apart
    for keep, found in zip(sizes, eliminations(lambda: gram.clone(), weight, sizes, step, swaps), strict=True):
        alone = eliminate(gram, weight, keep, step, swaps)
        assert found.kept == alone.kept
        assert_close(found.weight, alone.weight)
        assert found.relative_error == pytest.approx(alone.relative_error)


def test_numbers_of_groups_that_an_elimination_comes_by_are_as_if_each_was_asked_for_alone():
    gram, weight = problem(60, 200)
    for keep, found in zip((10, 7, 2), group_eliminations(gram, weight, (10, 7, 2), 5), strict=True):
        alone = eliminate_groups(gram, weight, keep, 5)
        assert found.kept == alone.kept
        assert_close(found.weight, alone.weight)

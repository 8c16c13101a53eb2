from __future__ import annotations

from itertools import combinations

import pytest
import torch
from problems import least_squares, problem
from torch.testing import assert_close

from optimum_prune.refit.solving import OfMedian, damped, refit, refit_by_factor


def test_damping_is_relative_to_the_mean_of_the_diagonal():
    gram = torch.diag(torch.tensor([1.0, 2.0, 6.0]))
    assert_close(damped(gram, 0.1), torch.diag(torch.tensor([1.3, 2.3, 6.3], dtype=torch.float64)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("largest", [6.0, 6e4])
def test_damping_may_be_relative_to_the_median_of_what_is_not_always_0(largest):
    gram = torch.diag(torch.tensor([0.0, 1.0, 2.0, largest]))
    expected = torch.diag(torch.tensor([0.2, 1.2, 2.2, largest + 0.2], dtype=torch.float64))
    assert_close(damped(gram, OfMedian(0.1)), expected, rtol=1e-6, atol=0)
    massive = torch.diag(torch.tensor([1.0, 1.0, 3e9]))
    enormous = damped(massive, OfMedian(0.1)) - massive.double()
    assert_close(enormous, 1e3 * torch.eye(3).double(), rtol=1e-6, atol=0)  # what sums in float32 are exact to
    assert_close(damped(torch.zeros(2, 2), OfMedian(0.1)), 0.1 * torch.eye(2).double())


@pytest.mark.parametrize("seed", range(3))
def test_the_refit_is_least_squares_on_every_subset(seed):
    gram, weight = problem(8, 30, seed=seed)
    for keep in (1, 3, 5, 7):
        for kept in combinations(range(8), keep):
            expected, loss = least_squares(gram, weight.T, kept)
            refitted, found = refit(gram.clone(), weight, torch.tensor(kept))
            assert found == pytest.approx(loss, rel=1e-9)
            assert_close(refitted, expected[list(kept)], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("gone", [1, 5, 11, 12, 13, 30, 59])
def test_both_formulas_of_the_refit_give_the_same(gone):
    gram, weight = problem(60, 100)
    kept = torch.randperm(60, generator=torch.Generator().manual_seed(gone))[gone:].sort().values
    direct, loss = refit(gram.clone(), weight, kept)
    through_what_goes, other = refit_by_factor(torch.linalg.cholesky(gram), weight, kept)
    assert_close(through_what_goes, direct, rtol=1e-8, atol=1e-9)
    assert other == pytest.approx(loss, rel=1e-8)
    assert loss == pytest.approx(least_squares(gram, weight.T, tuple(kept.tolist()))[1], rel=1e-8)

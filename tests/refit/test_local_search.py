from __future__ import annotations

import pytest
import torch
from problems import problem

from optimum_prune.refit.elimination import eliminate
from optimum_prune.refit.solving import refit


@pytest.mark.parametrize("seed", range(5))
def test_swaps_lower_the_loss_and_never_raise_it(seed):
    gram, weight = problem(40, 60, seed=seed)
    losses = [eliminate(gram, weight, 12, step=40, swaps=swaps).loss for swaps in (0, 1, 2, 4, 100)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("seed", range(5))
def test_the_local_search_ends_where_no_swap_of_the_cheapest_helps(seed):
    """By brute force: every channel outside in place of the cheapest inside."""
    gram, weight = problem(24, 60, seed=seed)
    kept = eliminate(gram, weight, 10, step=24, swaps=1000).kept
    loss = refit(gram.clone(), weight, torch.tensor(kept))[1]
    cheapest = min(kept, key=lambda j: refit(gram.clone(), weight, torch.tensor([k for k in kept if k != j]))[1])
    for other in set(range(24)) - set(kept):
        swapped = sorted({*kept, other} - {cheapest})
        assert refit(gram.clone(), weight, torch.tensor(swapped))[1] >= loss * (1 - 1e-8)

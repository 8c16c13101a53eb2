from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from optimum_prune.calibration.statistics import Gram

CPU = torch.device("cpu")


def rows(count: int, features: int = 7) -> torch.Tensor:
    return torch.randn(count, features, generator=torch.Generator().manual_seed(0))


def test_a_gram_is_the_sum_of_outer_products():
    gram, activations = Gram(7, CPU), rows(50)
    gram.add(activations)
    assert_close(gram.value, sum(torch.outer(row, row) for row in activations))
    assert gram.tokens == 50


def test_parts_add_up_to_the_whole():
    whole, parts = Gram(7, CPU), Gram(7, CPU)
    whole.add(rows(50))
    for part in rows(50).split(13):
        parts.add(part)
    assert_close(parts.value, whole.value)
    assert parts.tokens == whole.tokens


def test_no_token_leaves_zeros():
    gram = Gram(7, CPU)
    gram.add(rows(0))
    assert (gram.value.count_nonzero(), gram.tokens) == (0, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_single_precision(dtype):
    gram = Gram(7, CPU)
    activations = (100 * rows(2000)).to(dtype)
    gram.add(activations)
    assert gram.value.dtype == torch.float32
    assert_close(gram.value.double(), activations.double().T @ activations.double(), rtol=1e-4, atol=100)

"""Losses whose gradient is computed with them, against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div
from torch.testing import assert_close

from optimum_prune.training import losses
from optimum_prune.training.losses import divergence, divergence_of_kept, keep_likeliest, text_loss

ROWS, VOCABULARY = 50, 300


@pytest.fixture
def logits():
    return torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(0)).requires_grad_()


@pytest.fixture
def teacher():
    return 3 * torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=[1, 7, 1000])
def rows_at_once(request, monkeypatch):
    monkeypatch.setattr(losses, "PIECE", request.param * VOCABULARY)


def compare(found, wanted, logits):
    assert_close(found, wanted)
    assert_close(*(torch.autograd.grad(2 * loss, logits)[0] for loss in (found, wanted)))


def log_divergence(logits, teacher, temperature):
    mine, its = ((each / temperature).log_softmax(-1) for each in (logits, teacher))
    return temperature**2 * kl_div(mine, its, reduction="sum", log_target=True)


@pytest.mark.usefixtures("rows_at_once")
def test_the_likelihood_is_the_cross_entropy(logits):
    targets = torch.arange(ROWS) * 5
    compare(text_loss(logits, targets), cross_entropy(logits, targets, reduction="sum"), logits)


@pytest.mark.usefixtures("rows_at_once")
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_divergence_is_that_of_the_teachers_predictions(logits, teacher, temperature):
    compare(divergence(logits, teacher, temperature), log_divergence(logits, teacher, temperature), logits)


@pytest.mark.usefixtures("rows_at_once")
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_of_what_is_kept_all_other_tokens_are_one(logits, teacher, temperature):
    kept = keep_likeliest(teacher, 20, temperature)
    merged = [_merged(each, kept.tokens, temperature) for each in (logits, teacher)]
    compare(
        divergence_of_kept(logits, kept, temperature),
        temperature**2 * kl_div(*merged, reduction="sum", log_target=True),
        logits,
    )


def _merged(logits, tokens, temperature):
    """The logarithms of the probabilities of some tokens, and of all others together."""
    probabilities = (logits / temperature).softmax(-1)
    some = probabilities.gather(-1, tokens)
    return torch.cat([some, 1 - some.sum(-1, keepdim=True)], dim=-1).log()


def test_with_all_tokens_but_one_kept_it_is_the_divergence(logits, teacher):
    kept = keep_likeliest(teacher, VOCABULARY, 1.0)
    assert_close(divergence_of_kept(logits, kept), divergence(logits, teacher), rtol=1e-5, atol=0)


def test_a_teacher_that_is_certain_gives_no_infinity(logits):
    certain = torch.zeros(ROWS, VOCABULARY)
    certain[:, 0] = 1e4
    loss = divergence_of_kept(logits, keep_likeliest(certain, 5))
    assert loss.isfinite()
    assert torch.autograd.grad(loss, logits)[0].isfinite().all()


def test_no_copy_of_all_logits_in_float32_is_made(teacher):
    logits = torch.zeros(ROWS, VOCABULARY, dtype=torch.bfloat16).requires_grad_()
    loss = divergence(logits, teacher)
    assert loss.dtype is torch.float32
    assert [each.dtype for each in loss.grad_fn.saved_tensors] == [torch.bfloat16]

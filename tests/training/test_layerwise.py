"""Blocks that are trained one by one, on what reaches them in the pruned model."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch.testing import assert_close

from optimum_prune.calibration.calibration import Calibration
from optimum_prune.training.layerwise import Teaching, teach

EVERY = sorted(tiny.FAMILIES)


def visits(decoder, windows=8):
    return Calibration(tiny.windows(windows)).walk(decoder, "", 32)


def own(visit):
    return {name: value.detach().clone() for name, value in visit.layer.module.named_parameters()}


@pytest.mark.parametrize("name", EVERY)
def test_with_its_own_weights_a_block_puts_out_what_it_does(name, decoder):
    for visit in visits(decoder):
        for block in visit.layer.blocks:
            for position, wanted in enumerate(visit.behind(block)):
                assert_close(visit.behind_with(own(visit), block, position), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral", "gpt_neox"])
def test_other_weights_are_as_if_the_layer_had_them(name, decoder):
    visit = next(visits(decoder))
    last = visit.layer.blocks[-1]
    other = {path: value + 0.05 for path, value in own(visit).items()}
    found = visit.behind_with(other, last, 0)
    for path, value in other.items():
        visit.layer.module.get_parameter(path).data.copy_(value)
    for block in visit.layer.blocks:
        visit.forget(block)
    assert_close(found, visit.behind(last)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "opt", "qwen3_moe"])
def test_a_block_that_was_disturbed_finds_its_way_back(name, decoder):
    for block in ("attention", "feed_forward"):
        visit = next(visits(decoder, 32))
        goal, before = visit.behind(block), own(visit)
        with torch.no_grad():
            for path, value in visit.layer.module.named_parameters():
                if "norm" not in path:
                    value.mul_(1 + 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(len(path))))
        for each in visit.layer.blocks:
            visit.forget(each)
        taught = teach(visit, block, goal, Teaching(steps=60, rate=3e-3, held_out=4))
        assert taught.after < 0.75 * taught.before
        assert taught.weights.keys() < before.keys()
        for path, value in before.items():  # nothing is changed but by whoever asked
            visit.layer.module.get_parameter(path).data.copy_(value)


@pytest.mark.parametrize("name", ["llama"])
def test_the_learning_rate_with_the_smallest_error_is_taken(name, decoder):
    visit = next(visits(decoder, 32))
    goal = [hidden * 1.05 for hidden in visit.behind("feed_forward")]
    chosen = teach(visit, "feed_forward", goal, Teaching(steps=30, rate=None, held_out=4))
    errors = [teach(visit, "feed_forward", goal, Teaching(30, rate, 4)).after for rate in (1e-4, 1e-3)]
    assert chosen.after <= max(errors)
    assert chosen.rate in (1e-4, 3e-4, 1e-3)


@pytest.mark.parametrize("name", ["llama"])
def test_a_block_that_gets_no_better_stays_as_it_was(name, decoder):
    visit = next(visits(decoder))
    taught = teach(visit, "attention", visit.behind("attention"), Teaching(steps=10, rate=0.5, held_out=2))
    assert taught.weights == {}
    assert taught.after == taught.before

from __future__ import annotations

import math

import pytest
import tiny
import torch
from healed import with_ffn_bridged
from shortened import loss, losses_without_windows

from optimum_prune import Calibration, Depth
from optimum_prune.refit.bridging import FINALISTS, best_healed, best_window
from optimum_prune.selection.divergence import split

CALIBRATION = tiny.windows(20)
FITTED, HELD_OUT = split(CALIBRATION)
BRIDGED = ("llama", "gpt2", "opt", "qwen3_moe", "phi3", "gpt_neox")


@pytest.mark.parametrize("name", BRIDGED)
@pytest.mark.parametrize("size", [1, 2])
def test_of_the_best_windows_the_one_goes_that_is_best_when_healed(name, decoder, size):
    losses = losses_without_windows(decoder, CALIBRATION, size)
    finalists = sorted(range(len(losses)), key=lambda start: losses[start])[:FINALISTS]
    healed = {
        start: loss(with_ffn_bridged(decoder, FITTED, range(start, start + size)), HELD_OUT) for start in finalists
    }
    best = min(healed, key=healed.get)
    *_, decision = Depth(layers=size, search="exact").decide(decoder, Calibration(CALIBRATION))
    assert decision.evidence["dropped"] == list(range(best, best + size))
    found = decision.evidence["perplexity_healed_without_window_from"]
    assert found == pytest.approx({start: math.exp(value) for start, value in healed.items()}, rel=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("starts", [(4, 0, 2), (1,)], ids=str)
def test_only_the_windows_that_are_named_are_compared_and_nothing_changes(name, decoder, starts):
    before = {key: value.clone() for key, value in decoder.model.state_dict().items()}
    best, found = best_healed(decoder, Calibration(CALIBRATION), starts, 2, 0.1)
    expected = {start: loss(with_ffn_bridged(decoder, FITTED, range(start, start + 2)), HELD_OUT) for start in starts}
    assert best == min(expected, key=expected.get)
    assert found == pytest.approx({start: math.exp(value) for start, value in expected.items()}, rel=1e-3)
    assert all(torch.equal(value, before[key]) for key, value in decoder.model.state_dict().items())


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_the_window_that_a_training_begins_without_is_the_one_that_depth_leaves_out(name, decoder):
    *_, decision = Depth(layers=2).decide(decoder, Calibration(CALIBRATION))
    window = best_window(decoder, Calibration(CALIBRATION), 2, Depth(layers=2).damping)
    assert list(window) == decision.evidence["dropped"]

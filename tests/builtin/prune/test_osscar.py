from __future__ import annotations

import copy

import pytest
import tiny
import torch

from optimum_prune import Osscar
from optimum_prune import testing as conformance
from optimum_prune.anatomy.counts import count_parameters
from optimum_prune.errors import RecipeError

# Options, and the shape they lead to


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({}, "needs a target"),
        ({"protect": (1,)}, "needs a target"),
        ({"ratio": 0.0}, "ratio 0.0"),
        ({"ratio": 1.0}, "ratio 1.0"),
        ({"ratio": -0.1}, "ratio -0.1"),
        ({"ratio": float("nan")}, "'ratio' of osscar is nan"),
        ({"params": 0.0}, "params 0.0"),
        ({"params": 1.0}, "params 1.0"),
        ({"params": 1.5}, "params 1.5"),
        ({"params": float("nan")}, "'params' of osscar is nan"),
        ({"head_ratio": 0.0}, "needs a target"),
        ({"head_ratio": 1.0}, "head_ratio 1.0"),
        ({"head_ratio": float("inf")}, "'head_ratio' of osscar is inf"),
        ({"params": 0.5, "ratio": 0.5}, "both 'ratio' and 'params'"),
        ({"head_ratio": 0.5, "allocation": "global"}, "'global' and no channels to remove"),
        ({"ratio": 0.2, "protect": (1, 1)}, r"\[1, 1\]. Name each once"),
        ({"ratio": 0.2, "protect": (-1,)}, "counted from 0"),
        ({"ratio": 0.2, "multiple_of": 0}, "multiple_of 0"),
        ({"ratio": 0.2, "damping": 0.0}, "damping 0.0"),
        ({"ratio": 0.2, "damping": -1.0}, "damping -1.0"),
        ({"ratio": 0.2, "damping": float("nan")}, "'damping' of osscar is nan"),
        ({"ratio": 0.2, "correction": 1.5}, "correction 1.5"),
        ({"ratio": 0.2, "step": 0}, "step 0"),
        ({"ratio": 0.2, "swaps": -1}, "swaps -1"),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused(options, why):
    with pytest.raises(RecipeError, match=why) as caught:
        Osscar(**options)
    assert "osscar " in str(caught.value)


@pytest.mark.parametrize("name", ["llama"])
@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"ratio": 0.2, "protect": (6,)}, "layer 6, but there are only 0 to 5"),
        ({"ratio": 0.2, "protect": tuple(range(6))}, "nothing to prune"),
        ({"params": 0.01}, r"it can keep 0\.\d+ to 0\.\d+ of them"),
        ({"params": 0.01, "head_ratio": 0.5}, r"it can keep 0\.\d+ to 0\.\d+ of them"),
        ({"params": 0.999, "head_ratio": 0.5}, r"it can keep 0\.\d+ to 0\.\d+ of them"),
        ({"params": 0.5, "protect": (0, 1, 2, 3, 4)}, r"it can keep 0\.\d+ to 0\.\d+ of them"),
        ({"params": 0.9, "multiple_of": 64}, "Lower"),
    ],
    ids=str,
)
def test_what_a_model_of_this_shape_cannot_give_is_refused(name, decoder, options, why):
    with pytest.raises(RecipeError, match=why):
        Osscar(**options).foresee(decoder.shape())


@pytest.mark.parametrize("name", ["llama-tied", "phi3", "gpt2", "qwen3_moe", "deepseek_v2"])
@pytest.mark.parametrize(
    "options", [{"params": 0.85}, {"params": 0.8, "protect": (1,)}, {"ratio": 0.999}, {"ratio": 0.001}], ids=str
)
def test_what_is_foreseen_is_what_there_is(name, decoder, options, plugins):
    step = Osscar(**options)
    foreseen = step.foresee(decoder.shape())
    dense = copy.deepcopy(decoder)
    conformance.pruned(step, decoder, tiny.windows(3), plugins)
    assert decoder.shape() == foreseen
    assert foreseen.parameters == count_parameters(decoder.model).total
    assert all((layer.units("channels") or layer.units("experts")) >= 1 for layer in foreseen.layers)
    for index in step.protect:
        for before, after in zip(dense.modules[index].parameters(), decoder.modules[index].parameters(), strict=True):
            assert torch.equal(before, after)


# What is decided (how a layer is narrowed: refit/test_narrowing.py)


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_osscar_stays_closer_to_the_dense_model_than_random_channels_do(name, decoder, plugins):
    dense = copy.deepcopy(decoder)
    calibration, held_out = tiny.windows(60), tiny.windows(20, seed=1)
    wanted = conformance.logits(dense.model, held_out)

    def distance(model) -> float:
        return (conformance.logits(model, held_out) - wanted).square().mean().item()

    conformance.pruned(Osscar(ratio=0.25), decoder, calibration, plugins)
    widths = {axis: max(layer.units(axis) for layer in decoder.shape().layers) for axis in ("channels", "experts")}
    at_random = []
    for seed in range(3):
        other = copy.deepcopy(dense)
        conformance.cut(other, conformance.cuts_to(other, conformance.at_random(seed), widths))
        assert other.shape() == decoder.shape()
        at_random.append(distance(other.model))
    assert distance(decoder.model) < 0.7 * min(at_random)

"""What is looked at of a model that was loaded."""

from __future__ import annotations

import pytest
import tiny
import torch
from harms import opened
from torch import nn

from optimum_prune.checkpoint.soundness import is_finite, left_out_layer
from optimum_prune.machine.mapped_weights import MappedWeights
from optimum_prune.testing import logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e5m2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_is_found_anywhere(dtype, value):
    tensor = torch.randn(33, 65).to(dtype)
    assert is_finite(tensor)
    for place in ((0, 0), (32, 64), (17, 31)):
        poisoned = tensor.clone()
        poisoned[place] = value
        assert not is_finite(poisoned)


def test_the_largest_numbers_are_finite_and_what_has_no_numbers_is_too():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert is_finite(torch.full((1000,), torch.finfo(dtype).max, dtype=dtype))
    assert is_finite(torch.empty(0))
    assert is_finite(torch.empty(3, device="meta"))
    assert is_finite(torch.tensor([1, 2]))


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["model.layers.6.mlp.up_proj.weight"], True),
        (["layers.9.mlp.up_proj.weight"], True),
        (["model.layers.5.stray.weight", "stray.9.weight", "9.weight", "model.layers.x"], False),
        (["model.experts.77.weight"], False),
    ],
)
def test_a_layer_is_left_out_only_if_there_is_no_place_for_it(names, found):
    assert left_out_layer(tiny.model("llama"), names) == (names[0] if found else "")


def test_of_several_lists_of_layers_that_with_the_most_similar_name_counts():
    model = tiny.model("gemma3-vision")
    assert left_out_layer(model, ["model.language_model.layers.6.a"])
    assert left_out_layer(model, ["model.vision_tower.encoder.layers.1.a"])
    assert not left_out_layer(model, ["model.language_model.layers.5.a", "model.vision_tower.encoder.layers.0.a"])


@pytest.mark.parametrize("family", ["llama", "gemma3-vision", "gpt2", "deepseek_v3"])
def test_looking_leaves_nothing_behind(family, checkpoints, tmp_path):
    for weights in (None, MappedWeights(tmp_path / "changed")):
        model = opened(checkpoints(family), weights=weights)
        if weights is None:
            assert not any(module._forward_pre_hooks for module in model.modules())
        assert isinstance(model, nn.Module)
        assert torch.equal(logits(model, tiny.windows(2)), logits(tiny.model(family), tiny.windows(2)))

from __future__ import annotations

import harms
import pytest
import tiny
import torch
from harms import opened

from optimum_prune.checkpoint.loading import load_model
from optimum_prune.errors import CheckpointError
from optimum_prune.machine.mapped_weights import MappedWeights
from optimum_prune.testing import logits


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_a_checkpoint_loads_as_it_was_saved(name, checkpoints):
    model = opened(checkpoints(name))
    windows = tiny.windows(2)
    assert torch.equal(logits(model, windows), logits(tiny.model(name), windows))
    assert not model.training


def test_a_sharded_checkpoint_loads_like_a_single_file(llama, tmp_path):
    tiny.save("llama", tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    sharded, single = opened(tmp_path).state_dict(), opened(llama).state_dict()
    assert all(torch.equal(sharded[name], single[name]) for name in single)


@pytest.mark.parametrize(
    ("asked", "dtype"), [("auto", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)]
)
def test_a_checkpoint_loads_in_the_dtype_that_is_asked_for(asked, dtype, llama):
    assert {parameter.dtype for parameter in opened(llama, asked).parameters()} == {dtype}


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (harms.shard_missing, r"lacks the weights file model-00002-of-\d+\.safetensors"),
        (harms.truncated, "model.safetensors is damaged"),
        (harms.header_broken, "model.safetensors is damaged"),
        (harms.emptied, "model.safetensors is damaged"),
        (harms.no_weights, "has no weights"),
        (harms.tensor_missing, r"1 weights missing, such as model\.layers\.2\.self_attn\.o_proj\.weight"),
        (harms.tensor_of_another_shape, None),
        (harms.too_many_layers, "weights missing"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_checkpoint_that_is_not_whole_is_refused_in_one_line_whoever_loads_it(harm, why, folder, tmp_path):
    harm(folder)
    with pytest.raises(CheckpointError, match=why) as caught:
        opened(folder)
    assert "\n" not in str(caught.value)
    for load in (lambda: opened(folder, weights=MappedWeights(tmp_path / "changed")), lambda: load_model(folder)):
        with pytest.raises(CheckpointError) as caught:
            load()
        assert "\n" not in str(caught.value)


def test_weights_that_a_config_has_no_use_for_do_no_harm_in_a_model_to_be_pruned(folder, llama, tmp_path):
    harms.tensor_added(folder)
    expected = opened(llama).state_dict()
    for weights in (None, MappedWeights(tmp_path / "changed")):
        found = opened(folder, weights=weights).state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(CheckpointError, match=r"unexpected, such as model\.layers\.2\.stray\.weight"):
        load_model(folder)

from __future__ import annotations

import harms
import pytest
import tiny
import torch
from harms import CPU, opened
from torch.testing import assert_close

from optimum_prune import Depth, Progress
from optimum_prune.anatomy.counts import count_parameters
from optimum_prune.anatomy.decoder import Decoder
from optimum_prune.checkpoint import saving, verification
from optimum_prune.checkpoint.loading import Loading
from optimum_prune.errors import VerificationError
from optimum_prune.machine.mapped_weights import MappedWeights
from optimum_prune.testing import pruned

TOKENS = tiny.windows(3, length=40).tokens


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_what_is_saved_verifies(name, plugins, tmp_path):
    model = tiny.model(name)
    pruned(Depth(layers=2), Decoder.of(model, plugins.families), tiny.windows(2), plugins)
    saving.save(model, None, tmp_path, Progress())
    found, verified = verification.verify(tmp_path, verification.probe(model, TOKENS), Loading(torch.float32, CPU))
    assert verified.max_logit_difference == verified.max_logit_difference_with_cache == 0
    assert verified.cached_against_uncached < 1e-4
    assert count_parameters(found) == count_parameters(model)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "opt"])
def test_half_precision_verifies_too(name, dtype, checkpoints, tmp_path):
    model = opened(checkpoints(name), dtype)
    saving.save(model, None, tmp_path, Progress())
    found, verified = verification.verify(tmp_path, verification.probe(model, TOKENS), Loading(model.dtype, CPU))
    assert found.dtype == model.dtype == getattr(torch, dtype)
    assert verified.max_logit_difference == 0


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (harms.tensor_missing, r"missing, such as model\.layers\.2\.self_attn\.o_proj\.weight"),
        (harms.tensor_added, r"unexpected, such as model\.layers\.2\.stray\.weight"),
        (harms.tensor_changed, "logits differ"),
        (harms.layers_swapped, "logits differ"),
        (harms.attention_silenced, "logits differ"),
        (harms.other_rope, "logits differ"),
        (harms.too_few_layers, "unexpected"),
        (harms.tensor_of_another_shape, None),
        (harms.truncated, "cannot be loaded again"),
        (harms.no_weights, "cannot be loaded again"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_what_does_not_survive_saving_fails_verification(harm, why, folder, tmp_path):
    probe = verification.probe(tiny.model("llama"), TOKENS)
    harm(folder)
    for weights in (None, MappedWeights(tmp_path / "changed")):
        with pytest.raises(VerificationError, match=why):
            verification.verify(folder, probe, Loading(torch.float32, CPU, weights=weights))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("harm", [harms.layers_swapped, harms.other_rope, harms.attention_silenced])
def test_half_precision_hides_no_wrong_weights_from_verification(harm, dtype, folder):
    probe = verification.probe(opened(folder, dtype), TOKENS)
    harm(folder)
    with pytest.raises(VerificationError, match="logits differ"):
        verification.verify(folder, probe, Loading(getattr(torch, dtype), CPU))


def test_a_model_that_is_wrong_with_a_cache_fails_verification(tmp_path):
    """As when surviving layers keep the numbers they had."""
    model = tiny.model("llama")
    model.model.layers[3].self_attn.layer_idx = 2
    saving.save(model, None, tmp_path, Progress())
    with pytest.raises(VerificationError, match="logits differ"):
        verification.verify(tmp_path, verification.probe(model, TOKENS), Loading(torch.float32, CPU))


@pytest.mark.parametrize("length", [2, 3, 200])
def test_windows_of_any_length_can_be_probed(length):
    model = tiny.model("llama")
    probe = verification.probe(
        model, torch.randint(3, 300, (1, min(length, 128)), generator=torch.Generator().manual_seed(0))
    )
    assert probe.plain.shape == probe.cached.shape
    assert_close(probe.plain, probe.cached, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_by_what_attention_is_computed_makes_no_difference(name, attention, checkpoints, tmp_path):
    """No checkpoint says it, and another rounds otherwise."""
    model = opened(checkpoints(name), "bfloat16")
    model.set_attn_implementation(attention)
    saving.save(model, None, tmp_path, Progress())
    found, verified = verification.verify(tmp_path, verification.probe(model, TOKENS), Loading(model.dtype, CPU))
    assert verified.max_logit_difference == verified.max_logit_difference_with_cache == 0
    assert found.config._attn_implementation == attention


def test_a_model_that_computes_nothing_finite_is_not_compared():
    model = tiny.model("llama")
    model.model.norm.weight.data.fill_(float("inf"))
    with pytest.raises(VerificationError, match="not finite"):
        verification.probe(model, TOKENS)

from __future__ import annotations

import pytest
import tiny
import torch
from healed import behind, error, healed_model
from shortened import loss, without

from optimum_prune import Calibration, Depth
from optimum_prune import testing as conformance
from optimum_prune.errors import OptimumPruneError

CALIBRATION = tiny.windows(20)


@pytest.mark.parametrize("name", ["llama", "qwen3", "cohere", "gpt2", "gpt2-wide", "gpt_neox", "opt", "phi3"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_healing_brings_hidden_states_nearer_to_those_behind_the_gap(name, decoder, padded):
    windows = tiny.windows(20, padded=padded)
    unhealed = without(decoder, (3, 4))
    healed, told = healed_model(decoder, windows, (3, 4))
    wanted = behind(decoder, windows, 4)
    before = error(wanted, behind(unhealed, windows, 2))
    after = error(wanted, behind(healed, windows, 2))
    assert [index for index, _, _ in told] == [2, 2, 5, 5]
    assert after < 0.9 * before
    assert after > 0


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "opt", "gpt_neox"])
def test_healing_lowers_the_perplexity_on_the_windows_it_is_fitted_to(name, decoder):
    windows = tiny.windows(30)
    with torch.no_grad():  # text that the dense model expects
        windows.tokens[:, 1::2] = conformance.logits(decoder.model, windows).argmax(-1)[:, ::2]
    unhealed = loss(without(decoder, (3, 4)), windows)
    healed, _ = healed_model(decoder, windows, (3, 4))
    assert loss(healed, windows) < unhealed


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("gone", [(0,), (0, 1), (3,), (2, 3), (5,), (1, 4), (0, 2, 5), (1, 2, 4)], ids=str)
def test_only_output_projections_in_front_of_gaps_and_behind_them_get_new_weights(name, decoder, gone):
    family = decoder.family
    healed, told = healed_model(decoder, CALIBRATION, gone)
    unhealed = without(decoder, gone)
    kept = [index for index in range(tiny.LAYERS) if index not in gone]
    fronts = [index for index in kept if index + 1 in gone]
    touched = {index for index, _, _ in told}
    assert all(index >= fronts[0] for index in touched) if fronts else not touched
    projections = {(index, projection) for index, projection, _ in told}
    changed = {
        name
        for (name, value), other in zip(
            healed.model.state_dict().items(), unhealed.model.state_dict().values(), strict=True
        )
        if not torch.equal(value, other)
    }
    prefixes = tuple(f"{family.layers}.{kept.index(index)}.{projection}." for index, projection in projections)
    assert all(name.startswith(prefixes) for name in changed)
    assert all(any(name.startswith(prefix) for name in changed) for prefix in prefixes)
    for index in kept:
        if "experts" in decoder.layer(index).axes:
            assert (index, family.feed_forward.output) not in projections
        elif index in fronts:
            assert (index, family.feed_forward.output, 1.0) in told


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "glm4", "opt-post-norm"])
def test_where_a_norm_follows_each_projection_nothing_is_healed_or_said_to_be(name, decoder):
    healed, told = healed_model(decoder, CALIBRATION, (1, 3))
    unhealed = without(decoder, (1, 3))
    found, expected = (conformance.logits(each.model, CALIBRATION) for each in (healed, unhealed))
    assert torch.equal(found, expected)
    assert told == []


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "opt"])
def test_each_of_several_gaps_is_healed_in_the_stream_of_those_healed_before(name, decoder):
    unhealed, (healed, told) = without(decoder, (1, 2, 4)), healed_model(decoder, CALIBRATION, (1, 2, 4))
    of_ffns = [index for index, projection, _ in told if projection == decoder.family.feed_forward.output]
    assert of_ffns == [0, 3, 5]
    first_only, _ = healed_model(decoder, CALIBRATION, (1, 2))
    assert torch.equal(behind(first_only, CALIBRATION, 0), behind(healed, CALIBRATION, 0))
    for position, until in ((0, 2), (1, 4), (2, 5)):  # of layers that stay, and where their gap ends
        wanted = behind(decoder, CALIBRATION, until)
        before, after = (error(wanted, behind(each, CALIBRATION, position)) for each in (unhealed, healed))
        assert after < before


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_the_farther_behind_a_gap_the_less_a_layer_is_moved(name, decoder):
    _, told = healed_model(decoder, CALIBRATION, (1,))
    output = decoder.family.feed_forward.output
    behind_it = [strength for index, projection, strength in told if index > 1 and projection == output]
    assert len(behind_it) == 4
    assert behind_it == sorted(set(behind_it), reverse=True)
    assert 0 < behind_it[-1] < behind_it[0] < 1


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_gap_that_does_nothing_asks_for_no_healing(name, decoder):
    layer = decoder.layer(3)
    with torch.no_grad():
        for block in layer.blocks:
            linear = layer.linear_of(layer.output_of(block))
            linear.module.weight.zero_()
            linear.module.bias.zero_()
    healed, _ = healed_model(decoder, CALIBRATION, (3,))
    expected = conformance.logits(decoder.model, CALIBRATION)
    assert (conformance.logits(healed.model, CALIBRATION) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_less_damping_heals_more_of_the_calibration_windows(name, decoder):
    wanted = behind(decoder, CALIBRATION, 4)
    errors = [
        error(wanted, behind(healed_model(decoder, CALIBRATION, (3, 4), damping)[0], CALIBRATION, 2))
        for damping in (1e6, 10, 1, 0.1, 0.001)
    ]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("name", ["llama"])
@pytest.mark.parametrize("shape", ["greedy", "ranked"])
def test_layers_here_and_there_are_healed_as_well(name, decoder, shape):
    *healing, decision = Depth(layers=3, shape=shape).decide(decoder, Calibration(CALIBRATION))
    gone = decision.evidence["dropped"]
    fronts = {index for index in range(tiny.LAYERS) if index not in gone and index + 1 in gone}
    healed = {each.evidence["healed"] for each in healing}
    assert fronts <= healed
    assert not healed & set(gone)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_broken_layer_in_front_of_a_gap_is_named(name, decoder, plugins):
    linear = decoder.family.linear(decoder.modules[2], decoder.family.feed_forward.inputs[0])
    with torch.no_grad():
        linear.module.weight[0, 0] = torch.nan
    with pytest.raises(OptimumPruneError, match=r"ayers?[ .]2.* not finite"):
        conformance.pruned(Depth(drop=(3,)), decoder, tiny.windows(5), plugins)

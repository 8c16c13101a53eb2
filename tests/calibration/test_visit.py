from __future__ import annotations

import copy
import dataclasses

import conformance
import pytest
import tiny
import torch
from torch.testing import assert_close

from optimum_prune import Cuts, Decision, Progress, layerwise, surgery
from optimum_prune.errors import FamilyError, NumericalError

every_family = pytest.mark.parametrize("name", tiny.FAMILIES)
whole_and_padded = pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])


def visits(model, family, windows):
    return layerwise.walk(model, family, windows, Progress(), "")


@torch.no_grad()
def hidden_states_of_the_model(model, family, windows):
    """What reaches each layer in the model's own forward."""
    reached = {}
    for index, layer in enumerate(family.layers_of(model)):
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, index=index: reached.update({index: args[0] if args else kwargs["hidden_states"]}),
            with_kwargs=True,
        )
    conformance.logits(model, windows)
    for layer in family.layers_of(model):
        layer._forward_pre_hooks.clear()
    return reached


@every_family
@whole_and_padded
def test_walking_reproduces_the_hidden_states_of_every_layer(name, subject, padded):
    model, family = subject
    windows = tiny.windows(3, padded=padded)
    expected = hidden_states_of_the_model(model, family, windows)
    seen = []
    for visit in visits(model, family, windows):
        hidden = torch.cat([hidden for _, hidden in visit.stream])
        assert_close(hidden[windows.mask], expected[visit.index][windows.mask], rtol=1e-5, atol=1e-5)
        assert visit.layer is family.layers_of(model)[visit.index]
        seen.append(visit.index)
    assert seen == list(range(tiny.LAYERS))


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "gemma3", "gemma3-vision", "opt"])
def test_walking_agrees_with_output_hidden_states(name, subject):
    model, family = subject
    windows = tiny.windows(3)
    with torch.no_grad():
        expected = model(input_ids=windows.tokens, output_hidden_states=True, use_cache=False).hidden_states
    for visit in visits(model, family, windows):
        assert_close(torch.cat([hidden for _, hidden in visit.stream]), expected[visit.index], rtol=1e-5, atol=1e-5)


@every_family
@whole_and_padded
def test_the_head_on_the_last_hidden_states_gives_the_logits_of_the_model(name, subject, padded):
    model, family = subject
    windows = tiny.windows(3, padded=padded)
    parts = []
    with torch.no_grad():
        for batch, hidden in layerwise.embed(model, family, windows):
            for index, layer in enumerate(family.layers_of(model)):
                hidden = batch.run(layer, index, hidden)
            parts.append(layerwise.logits(model, family, batch, hidden))
            one_by_one = [layerwise.logits(model, family, one, part) for one, part in batch.split(hidden)]
            assert_close(torch.cat(one_by_one), parts[-1], rtol=1e-5, atol=1e-5)
    found, expected = torch.cat(parts), conformance.logits(model, windows)
    assert_close(found[windows.mask], expected[windows.mask], rtol=1e-5, atol=1e-5)


@every_family
def test_the_model_is_whole_again_after_a_walk_even_one_broken_off(name, subject):
    model, family = subject
    windows = tiny.windows(2)
    layers, before = family.layers_of(model), conformance.logits(model, windows)
    walk = visits(model, family, windows)
    next(walk)
    assert family.layers_of(model) is layers
    walk.close()
    list(visits(model, family, windows))
    assert family.layers_of(model) is layers
    assert torch.equal(conformance.logits(model, windows), before)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_batches_hold_few_tokens_and_all_windows_in_order(name, subject, monkeypatch):
    model, family = subject
    windows = tiny.windows(5, padded=True)
    monkeypatch.setattr(layerwise, "TOKENS_PER_BATCH", 2 * windows.tokens.shape[1] + 1)
    stream = layerwise.embed(model, family, windows)
    assert [len(batch.tokens) for batch, _ in stream] == [2, 2, 1]
    assert torch.equal(torch.cat([batch.tokens for batch, _ in stream]), windows.tokens)
    expected = hidden_states_of_the_model(model, family, windows)
    for visit in visits(model, family, windows):
        hidden = torch.cat([hidden for _, hidden in visit.stream])
        assert_close(hidden[windows.mask], expected[visit.index][windows.mask], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_the_stream_passes_through_the_layer_as_it_is_by_then(name, subject):
    model, family = subject
    windows = tiny.windows(3)
    walk = visits(model, family, windows)
    visit = next(walk)
    with torch.no_grad():
        for parameter in visit.layer.parameters():
            parameter.mul_(1.3)
    found = torch.cat([hidden for _, hidden in next(walk).stream])
    assert_close(found, hidden_states_of_the_model(model, family, windows)[1], rtol=1e-5, atol=1e-5)


def inputs_in_the_model(model, layer, path, windows):
    """What reaches a linear module of a layer in the model's own forward, padding left out."""
    reached = []
    handle = layer.get_submodule(path).register_forward_pre_hook(lambda _, args: reached.append(args[0]))
    conformance.logits(model, windows)
    handle.remove()
    return torch.cat([part.reshape(*windows.tokens.shape, -1) for part in reached])[windows.mask]


@every_family
@whole_and_padded
def test_observing_hands_over_every_token_that_is_not_padding(name, subject, padded, monkeypatch):
    model, family = subject
    windows = tiny.windows(5, padded=padded)
    monkeypatch.setattr(layerwise, "TOKENS_PER_BATCH", 2 * windows.tokens.shape[1])
    observed = 0
    for visit in visits(model, family, windows):
        observations = []
        if family.heads is not None:
            observations.append((visit.observe_heads, family.attention_output))
        if family.experts_of(visit.layer) is None:
            observations.append((visit.observe_channels, family.feed_forward.output))
        for observe, path in observations:
            seen = []
            observe(seen.append)
            expected = inputs_in_the_model(model, visit.layer, path, windows)
            assert_close(torch.cat(seen), expected, rtol=1e-5, atol=1e-5)
            assert not visit.layer.get_submodule(path)._forward_pre_hooks
            observed += 1
    assert observed or name == "deepseek_v2"


@pytest.mark.parametrize("name", tiny.MIXTURES)
@whole_and_padded
def test_experts_are_observed_on_the_tokens_that_are_routed_to_them(name, subject, padded, monkeypatch):
    """Against the output that the experts' module itself gives for each expert alone."""
    model, family = subject
    windows = tiny.windows(5, padded=padded)
    monkeypatch.setattr(layerwise, "TOKENS_PER_BATCH", 2 * windows.tokens.shape[1])
    shared_path = None if family.experts.shared is None else family.experts.shared.output
    observed = 0
    for visit in visits(model, family, windows):
        experts = family.experts_of(visit.layer)
        if experts is None:
            continue
        observed += 1
        seen, seen_shared, calls = {}, [], []
        visit.observe_experts(
            lambda expert, rows, seen=seen: seen.setdefault(expert, []).append(rows), seen_shared.append
        )
        handle = experts.register_forward_pre_hook(
            lambda _, args, kwargs, calls=calls: calls.append((*args, *kwargs.values())), with_kwargs=True
        )
        conformance.logits(model, windows)
        handle.remove()
        ((hidden, chosen, weights),) = calls
        mask = windows.mask.flatten()
        output = getattr(experts, family.experts.output)
        for expert in range(tiny.EXPERTS):
            rows = torch.cat(seen[expert])
            routed = (chosen == expert).any(1) & mask
            assert len(rows) == routed.sum()
            with torch.no_grad():
                alone = experts(hidden, chosen, weights * (chosen == expert))
            assert_close(rows @ output[expert].T, alone[routed], rtol=1e-4, atol=1e-5)
        if shared_path is not None:
            expected = inputs_in_the_model(model, visit.layer, shared_path, windows)
            assert_close(torch.cat(seen_shared), expected, rtol=1e-5, atol=1e-5)
        assert not experts._forward_pre_hooks
    assert observed >= 2


@every_family
@whole_and_padded
def test_a_layer_that_was_observed_and_cut_is_not_evaluated_anew(name, subject, padded):
    model, family = subject
    windows = tiny.windows(3, padded=padded)
    cut = copy.deepcopy(model)
    for whole, plain in zip(visits(model, family, windows), visits(cut, family, windows), strict=True):
        for (_, found), (_, expected) in zip(whole.stream, plain.stream, strict=True):
            assert_close(found, expected, rtol=1e-5, atol=1e-5)
        observed = []
        if family.heads is not None:
            whole.observe_heads(lambda rows: None)
            whole.narrow_heads((1,))
            for each, of in ((whole, model), (plain, cut)):
                surgery.carry_out(of, family, Decision(Cuts(heads={each.index: (1,)})))
            observed += family.heads.inputs
        if family.experts_of(whole.layer) is None:
            kept = tuple(range(whole.index, tiny.WIDTH, 2))
            surgery.keep_channels(plain.layer, family, kept)
            whole.observe_channels(lambda rows: None)
            whole.narrow(kept)
            surgery.keep_channels(whole.layer, family, kept)
            observed += [*family.feed_forward.inputs, *([] if family.heads else [family.attention])]
        for path in observed:  # what was evaluated must not be asked again
            for parameter in whole.layer.get_submodule(path).parameters():
                parameter.data.fill_(torch.nan)


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma2", "cohere", "qwen3_moe", "mixtral"])
@whole_and_padded
def test_channels_are_observed_behind_the_heads_that_were_cut(name, subject, padded):
    model, family = subject
    windows = tiny.windows(3, padded=padded)
    for visit in visits(model, family, windows):
        visit.observe_heads(lambda rows: None)
        visit.narrow_heads((0,))
        surgery.carry_out(model, family, Decision(Cuts(heads={visit.index: (0,)})))
        if family.experts_of(visit.layer) is None:
            seen = []
            visit.observe_channels(seen.append)
            expected = inputs_in_the_model(model, visit.layer, family.feed_forward.output, windows)
            assert_close(torch.cat(seen), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama"])
@pytest.mark.parametrize(
    ("broken", "what"), [("model.embed_tokens", "The embeddings"), ("model.layers.4.mlp.up_proj", "Decoder layer 4")]
)
def test_values_that_are_not_finite_are_traced_to_their_layer(name, subject, broken, what):
    model, family = subject
    with torch.no_grad():
        model.get_submodule(broken).weight.fill_(torch.inf)
    with pytest.raises(NumericalError, match=f"{what} of the model puts out"):
        list(visits(model, family, tiny.windows(2)))


@pytest.mark.parametrize("name", ["llama"])
def test_a_model_that_runs_a_layer_twice_is_refused(name, subject):
    model, family = subject
    original = model.model.forward

    def twice(*args, **kwargs):
        original(*args, **kwargs)
        return original(*args, **kwargs)

    model.model.forward = twice
    with pytest.raises(FamilyError, match="once, one after the other"):
        layerwise.embed(model, family, tiny.windows(2))


@pytest.mark.parametrize("name", ["llama"])
def test_a_family_with_a_wrong_path_is_named(name, subject):
    model, family = subject
    wrong = dataclasses.replace(family, attention="attn")
    with pytest.raises(FamilyError, match=r"Family 'llama' expects a Module at 'attn' of LlamaDecoderLayer"):
        next(visits(model, wrong, tiny.windows(2))).observe_channels(lambda rows: None)

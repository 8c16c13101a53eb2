from __future__ import annotations

import copy
import dataclasses

import pytest
import tiny
import torch
from torch.testing import assert_close

from optimum_prune import Calibration, Cuts, Decision, Decoder
from optimum_prune import testing as conformance
from optimum_prune.anatomy.shape import ATTENTION, FEED_FORWARD
from optimum_prune.calibration import stream
from optimum_prune.errors import FamilyError, NumericalError
from optimum_prune.machine.activation_store import InMemory
from optimum_prune.surgery import operation

every_family = pytest.mark.parametrize("name", tiny.FAMILIES)
whole_and_padded = pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])


def visits(decoder, windows):
    return Calibration(windows).walk(decoder, "")


@torch.no_grad()
def hidden_states_of_the_model(decoder, windows):
    """What reaches each layer in the model's own forward."""
    reached = {}
    for index, layer in enumerate(decoder.modules):
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, index=index: reached.update({index: args[0] if args else kwargs["hidden_states"]}),
            with_kwargs=True,
        )
    conformance.logits(decoder.model, windows)
    for layer in decoder.modules:
        layer._forward_pre_hooks.clear()
    return reached


@every_family
@whole_and_padded
def test_walking_reproduces_the_hidden_states_of_every_layer(name, decoder, padded):
    windows = tiny.windows(3, padded=padded)
    expected = hidden_states_of_the_model(decoder, windows)
    seen = []
    for visit in visits(decoder, windows):
        hidden = torch.cat([hidden for _, hidden in visit.stream])
        assert_close(hidden[windows.mask], expected[visit.index][windows.mask], rtol=1e-5, atol=1e-5)
        assert visit.layer.module is decoder.modules[visit.index]
        assert visit.layer.index == visit.index
        seen.append(visit.index)
    assert seen == list(range(tiny.LAYERS))


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "gemma3", "gemma3-vision", "opt"])
def test_walking_agrees_with_output_hidden_states(name, decoder):
    windows = tiny.windows(3)
    with torch.no_grad():
        found = decoder.model(input_ids=windows.tokens, output_hidden_states=True, use_cache=False)
    expected = found.hidden_states
    for visit in visits(decoder, windows):
        assert_close(torch.cat([hidden for _, hidden in visit.stream]), expected[visit.index], rtol=1e-5, atol=1e-5)


@every_family
@whole_and_padded
def test_the_head_on_the_last_hidden_states_gives_the_logits_of_the_model(name, decoder, padded):
    windows = tiny.windows(3, padded=padded)
    parts = []
    with torch.no_grad():
        for batch, hidden in Calibration(windows).embed(decoder):
            through = stream.run_layers(decoder, batch, hidden, range(tiny.LAYERS))
            for index, layer in enumerate(decoder.modules):
                hidden = batch.run(layer, index, hidden)
            assert torch.equal(through, hidden)
            parts.append(stream.logits(decoder, batch, hidden))
            one_by_one = [stream.logits(decoder, one, part) for one, part in batch.split(hidden)]
            assert_close(torch.cat(one_by_one), parts[-1], rtol=1e-5, atol=1e-5)
    found, expected = torch.cat(parts), conformance.logits(decoder.model, windows)
    assert_close(found[windows.mask], expected[windows.mask], rtol=1e-5, atol=1e-5)


@every_family
def test_the_model_is_whole_again_after_a_walk_even_one_broken_off(name, decoder):
    windows = tiny.windows(2)
    layers, before = decoder.modules, conformance.logits(decoder.model, windows)
    walk = visits(decoder, windows)
    next(walk)
    assert decoder.modules is layers
    walk.close()
    list(visits(decoder, windows))
    assert decoder.modules is layers
    assert torch.equal(conformance.logits(decoder.model, windows), before)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_batches_hold_few_tokens_and_all_windows_in_order(name, decoder, monkeypatch):
    windows = tiny.windows(5, padded=True)
    monkeypatch.setattr(stream, "TOKENS_PER_BATCH", 2 * windows.length + 1)
    for batches in (
        Calibration(windows).embed(decoder),
        stream.embed(decoder, windows, InMemory()),
        stream.embed(decoder, windows, InMemory(), tokens_at_once=2 * windows.length),
    ):
        assert [len(batch.tokens) for batch, _ in batches] == [2, 2, 1]
        assert torch.equal(torch.cat([batch.tokens for batch, _ in batches]), windows.tokens)
    expected = hidden_states_of_the_model(decoder, windows)
    for visit in visits(decoder, windows):
        hidden = torch.cat([hidden for _, hidden in visit.stream])
        assert_close(hidden[windows.mask], expected[visit.index][windows.mask], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_the_stream_passes_through_the_layer_as_it_is_by_then(name, decoder):
    windows = tiny.windows(3)
    walk = visits(decoder, windows)
    visit = next(walk)
    with torch.no_grad():
        for parameter in visit.layer.module.parameters():
            parameter.mul_(1.3)
    found = torch.cat([hidden for _, hidden in next(walk).stream])
    assert_close(found, hidden_states_of_the_model(decoder, windows)[1], rtol=1e-5, atol=1e-5)


def in_front_of(axis):
    """The path of the module whose inputs the units of an axis are."""
    return axis.output.removesuffix(".weight")


def inputs_in_the_model(decoder, layer, path, windows):
    """What reaches a linear module of a layer in the model's own forward, window by window."""
    reached = []
    handle = layer.part(path).register_forward_pre_hook(lambda _, args: reached.append(args[0]))
    conformance.logits(decoder.model, windows)
    handle.remove()
    return torch.cat([part.reshape(*windows.tokens.shape, -1) for part in reached])


def is_of(gram, rows):
    """Whether a gram is the sum over these activations, and over no others."""
    assert gram.tokens == len(rows)
    assert_close(gram.exact, rows.double().T @ rows.double(), rtol=1e-5, atol=1e-4)
    assert_close(gram.mean, rows.double().mean(0), rtol=1e-5, atol=1e-5)


@every_family
@whole_and_padded
def test_observing_hands_over_every_token_that_is_not_padding(name, decoder, padded, monkeypatch):
    windows = tiny.windows(5, padded=padded)
    monkeypatch.setattr(stream, "TOKENS_PER_BATCH", 2 * windows.length)
    observed = 0
    for visit in visits(decoder, windows):
        for axis in visit.layer.axes.values():
            if axis.output != visit.layer.output_of(axis.block) or axis.groups:
                continue
            path = in_front_of(axis)
            gram = visit.gram(axis)
            expected = inputs_in_the_model(decoder, visit.layer, path, windows)
            is_of(gram, expected[windows.mask])
            kept = torch.cat([rows for rows, _ in visit.outputs(axis.block)])
            assert_close(kept[windows.mask.flatten()], expected[windows.mask], rtol=1e-5, atol=1e-5)
            assert not visit.layer.part(path)._forward_pre_hooks
            observed += 1
    assert observed >= (len(decoder) if decoder.family.experts is None else 1) or name == "deepseek_v2"


@pytest.mark.parametrize("name", tiny.MIXTURES)
@whole_and_padded
def test_experts_are_observed_on_the_tokens_that_are_routed_to_them(name, decoder, padded, monkeypatch):
    """Against the output that the experts' module itself gives for each expert alone."""
    windows = tiny.windows(5, padded=padded)
    monkeypatch.setattr(stream, "TOKENS_PER_BATCH", 2 * windows.length)
    observed = 0
    for visit in visits(decoder, windows):
        axes = visit.layer.axes
        if "experts" not in axes:
            continue
        observed += 1
        axis, followers = axes["experts"], visit.layer.followers(axes["experts"])
        path, read = axis.observed
        experts, calls = visit.layer.part(path), []
        grams, *grams_of_followers = visit.grams(axis, *followers)
        assert not experts._forward_pre_hooks
        handle = experts.register_forward_pre_hook(
            lambda _, *called, calls=calls: calls.append(called), with_kwargs=True
        )
        conformance.logits(decoder.model, windows)
        handle.remove()
        ((args, kwargs),) = calls
        hidden, chosen, weights = (*args, *kwargs.values())
        with torch.no_grad():
            seen = dict(read(experts, args, kwargs, windows.mask))
        assert len(seen) == len(grams) == tiny.EXPERTS
        for expert, output in enumerate(visit.layer.projection(axis.output).maps):
            routed = (chosen == expert).any(1) & windows.mask.flatten()
            assert len(seen[expert]) == routed.sum()
            with torch.no_grad():
                alone = experts(hidden, chosen, weights * (chosen == expert))
            assert_close(seen[expert] @ output.T, alone[routed], rtol=1e-4, atol=1e-5)
            is_of(grams[expert], seen[expert])
        assert [each.name for each in followers] == (["shared"] if decoder.family.experts.shared else [])
        for (gram,), follower in zip(grams_of_followers, followers, strict=True):
            is_of(gram, inputs_in_the_model(decoder, visit.layer, in_front_of(follower), windows)[windows.mask])
            assert not visit.layer.part(in_front_of(follower))._forward_pre_hooks
    assert observed >= 2


@every_family
@whole_and_padded
def test_a_layer_that_was_observed_and_cut_is_not_evaluated_anew(name, decoder, padded):
    family, windows = decoder.family, tiny.windows(3, padded=padded)
    tolerance = 1e-5
    if name != "gemma2":  # whose attention brings the mask of padding to float32, where it overflows
        tiny.in_double(decoder.model)
        tolerance = 1e-9
    cut = Decoder(copy.deepcopy(decoder.model), family)
    for whole, plain in zip(visits(decoder, windows), visits(cut, windows), strict=True):
        for (_, found), (_, expected) in zip(whole.stream, plain.stream, strict=True):
            assert_close(found, expected, rtol=tolerance, atol=tolerance)
        observed = []
        axes = whole.layer.axes
        if "heads" in axes:
            whole.gram(axes["heads"])
            whole.narrow(axes["heads"], (1,))
            for of in (decoder, cut):
                operation.carry_out(of, Decision(Cuts.along("heads", {whole.index: (1,)})))
            observed += family.heads.inputs
        if "channels" in axes:
            cuts = Cuts.along("channels", {whole.index: tuple(range(whole.index, tiny.WIDTH, 2))})
            operation.carry_out(cut, Decision(cuts))
            whole.gram(axes["channels"])
            whole.narrow(axes["channels"], cuts.kept(whole.index, "channels"))
            operation.carry_out(decoder, Decision(cuts))
            observed += [*family.feed_forward.inputs, *([] if family.heads else [family.attention])]
        for path in observed:  # what was evaluated must not be asked again
            for parameter in whole.layer.part(path).parameters():
                parameter.data.fill_(torch.nan)


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma2", "cohere", "qwen3_moe", "mixtral"])
@whole_and_padded
def test_channels_are_observed_behind_the_heads_that_were_cut(name, decoder, padded):
    windows = tiny.windows(3, padded=padded)
    for visit in visits(decoder, windows):
        axes = visit.layer.axes
        visit.gram(axes["heads"])
        visit.narrow(axes["heads"], (0,))
        operation.carry_out(decoder, Decision(Cuts.along("heads", {visit.index: (0,)})))
        if "channels" in axes:
            gram = visit.gram(axes["channels"])
            expected = inputs_in_the_model(decoder, visit.layer, in_front_of(axes["channels"]), windows)
            is_of(gram, expected[windows.mask])


# Blocks that are left out, and what is behind them


@every_family
@whole_and_padded
def test_the_hidden_states_behind_a_block_are_those_without_the_blocks_behind_it(name, decoder, padded):
    windows = tiny.windows(3, padded=padded)
    for visit in visits(decoder, windows):
        for block, gone in ((ATTENTION, (FEED_FORWARD,)), (FEED_FORWARD, ())):
            with torch.no_grad():
                expected = [stream.run_without(visit.layer, *each, gone) for each in visit.stream]
                found = visit.behind(block)
            for one, other in zip(found, expected, strict=True):
                assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "cohere", "gpt_neox", "opt", "mixtral"])
@pytest.mark.parametrize("gone", [(ATTENTION,), (FEED_FORWARD,), (ATTENTION, FEED_FORWARD), None], ids=str)
def test_a_layer_is_left_as_if_some_of_its_blocks_or_all_of_it_were_not_there(name, decoder, gone):
    windows = tiny.windows(3)
    walk = visits(decoder, windows)
    visit, before = next(walk), conformance.logits(decoder.model, windows)
    if gone is None:
        expected = [hidden for _, hidden in visit.stream]
        visit.skip()
    else:
        with torch.no_grad():
            expected = [stream.run_without(visit.layer, *each, gone) for each in visit.stream]
        visit.leave_out(gone)
    for (_, found), wanted in zip(next(walk).stream, expected, strict=True):
        assert torch.equal(found, wanted)
    assert torch.equal(conformance.logits(decoder.model, windows), before), "the model was changed"


@every_family
def test_a_norm_behind_a_block_is_noticed(name, decoder):
    behind = ("gemma2", "gemma3", "gemma3-vision", "glm4", "opt-post-norm")
    noticed = set()
    for visit in visits(decoder, tiny.windows(2)):
        for axis in visit.layer.axes.values():
            if axis.output == visit.layer.output_of(axis.block) and not axis.groups:
                visit.gram(axis)
                noticed.add(visit.adds_output(axis.block))
    assert noticed == {name not in behind} or name == "deepseek_v2"


@pytest.mark.parametrize("name", ["llama"])
@pytest.mark.parametrize(
    ("broken", "what"), [("model.embed_tokens", "The embeddings"), ("model.layers.4.mlp.up_proj", "Decoder layer 4")]
)
def test_values_that_are_not_finite_are_traced_to_their_layer(name, decoder, broken, what):
    with torch.no_grad():
        decoder.model.get_submodule(broken).weight.fill_(torch.inf)
    with pytest.raises(NumericalError, match=f"{what} of the model puts out"):
        list(visits(decoder, tiny.windows(2)))


@pytest.mark.parametrize("name", ["llama"])
def test_a_model_that_runs_a_layer_twice_is_refused(name, decoder):
    original = decoder.model.model.forward

    def twice(*args, **kwargs):
        original(*args, **kwargs)
        return original(*args, **kwargs)

    decoder.model.model.forward = twice
    with pytest.raises(FamilyError, match="once, one after the other"):
        Calibration(tiny.windows(2)).embed(decoder)


@pytest.mark.parametrize("name", ["llama"])
def test_a_family_with_a_wrong_path_is_named(name, decoder):
    wrong = Decoder(decoder.model, dataclasses.replace(decoder.family, attention="attn"))
    axis = decoder.layer(0).axes["channels"]
    with pytest.raises(FamilyError, match=r"Family 'llama' expects a Module at 'attn' of LlamaDecoderLayer"):
        next(visits(wrong, tiny.windows(2))).gram(axis)

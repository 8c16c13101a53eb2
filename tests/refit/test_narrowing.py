from __future__ import annotations

import copy

import pytest
import tiny
import torch
from torch import Tensor
from torch.testing import assert_close

from optimum_prune import Calibration, Cuts, Decision, Decoder, Osscar, Windows
from optimum_prune import testing as conformance
from optimum_prune.calibration.visit import LayerVisit
from optimum_prune.refit.elimination import eliminate, eliminate_groups
from optimum_prune.refit.narrowing import Narrowing
from optimum_prune.refit.solving import damped
from optimum_prune.surgery.operation import carry_out

whole_and_padded = pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])


@pytest.mark.parametrize("name", ["llama", "gemma3", "opt"])
@whole_and_padded
def test_each_layer_is_decided_by_the_stream_of_the_layers_cut_before_it(name, decoder, padded):
    windows = tiny.windows(5, padded=padded)
    step = Osscar(ratio=0.5, damping=0.01)
    dense = copy.deepcopy(decoder)
    for index, decision in enumerate(step.decide(decoder, Calibration(windows))):
        layer = decoder.layer(index)
        linear = layer.linear_of(layer.output_of("feed_forward"))
        grams, means = [], []
        for whose in (decoder, dense):
            module = whose.layer(index).linear_of(layer.output_of("feed_forward")).module
            rows = conformance.inputs_of(whose.model, module, windows)
            means.append(rows.mean(0))
            rows = rows if linear.bias is None else rows - rows.mean(0)
            grams.append(rows.T @ rows)
        expected = eliminate(damped(grams[0], 0.01), linear.weight.detach(), tiny.WIDTH // 2)
        assert decision.cuts == Cuts.along("channels", {index: expected.kept})
        name = f"{decoder.family.layers}.{index}.{decoder.family.feed_forward.output}"
        assert decoder.model.get_parameter(f"{name}.weight") is linear.module.weight
        assert_close(decision.weights[f"{name}.weight"], expected.weight, rtol=1e-3, atol=1e-4, check_dtype=False)
        if linear.bias is not None:  # the mean output stays what it was
            before = linear.weight.double() @ means[0] + linear.bias
            after = expected.weight @ means[0][list(expected.kept)] + decision.weights[f"{name}.bias"]
            assert_close(after, before, rtol=1e-3, atol=1e-4)
        assert decision.evidence["layer"] == index
        assert decision.evidence["width"] == tiny.WIDTH // 2
        assert decision.evidence["relative_error"] == pytest.approx(expected.relative_error, rel=1e-3)
        assert index == 0 or not torch.allclose(grams[0], grams[1], rtol=0.01)
        carry_out(decoder, decision)
    assert index == tiny.LAYERS - 1


@pytest.mark.parametrize("name", ["opt", "gpt2-wide", "gpt_neox"])
def test_the_bias_takes_over_the_mean_of_what_is_lost(name, decoder):
    """Better than the same cut whose bias stays."""
    windows = tiny.windows(8)
    expected = conformance.logits(decoder.model, windows)
    errors = []
    for with_bias in (True, False):
        cut = copy.deepcopy(decoder)
        for decision in Osscar(ratio=0.5).decide(cut, Calibration(windows)):
            weights = {name: value for name, value in decision.weights.items() if with_bias or "bias" not in name}
            assert len(decision.weights) == 2
            carry_out(cut, Decision(decision.cuts, weights))
        errors.append((conformance.logits(cut.model, windows) - expected).square().mean())
    assert errors[0] < errors[1]


@pytest.mark.parametrize("name", ["llama", "phi3", "cohere", "qwen3", "mixtral"])
@whole_and_padded
def test_heads_are_decided_over_what_they_put_out_in_the_pruned_stream(name, decoder, padded):
    windows = tiny.windows(5, padded=padded)
    for index, decision in enumerate(Osscar(head_ratio=0.5, damping=0.01).decide(decoder, Calibration(windows))):
        layer = decoder.layer(index)
        heads = layer.axes["heads"]
        linear = layer.linear_of(heads.output)
        rows = conformance.inputs_of(decoder.model, linear.module, windows)
        rows = rows if linear.bias is None else rows - rows.mean(0)
        expected = eliminate_groups(damped(rows.T @ rows, 0.01), linear.weight, 1, rows.shape[1] // heads.units)
        assert decision.cuts == Cuts.along("heads", {index: expected.kept})
        weight = decision.weights[f"{decoder.family.layers}.{index}.{decoder.family.attention_output}.weight"]
        assert_close(weight, expected.weight, rtol=1e-3, atol=1e-4, check_dtype=False)
        carry_out(decoder, decision)
    assert index == tiny.LAYERS - 1


# Mixtures of experts


@torch.no_grad()
def calls_of(experts: torch.nn.Module, decoder: Decoder, windows: Windows) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, chosen experts and their weights with which a mixture is called in the model's own forward."""
    calls: list[tuple[Tensor, ...]] = []
    handle = experts.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((*args, *kwargs.values())), with_kwargs=True
    )
    conformance.logits(decoder.model, windows)
    handle.remove()
    (call,) = calls
    return call


@torch.no_grad()
def routed_rows(call: tuple[Tensor, Tensor, Tensor], mask: Tensor, expert: int, gate_and_up: Tensor) -> Tensor:
    """The activations of an expert's channels for each token that is routed to it, weighted, token by token."""
    hidden, chosen, weights = call
    rows = []
    for token in range(len(hidden)):
        if not mask.flatten()[token] or expert not in chosen[token]:
            continue
        gate, up = (gate_and_up @ hidden[token]).double().chunk(2)
        share = weights[token][chosen[token] == expert].sum().double()
        rows.append(share * torch.nn.functional.silu(gate) * up)
    return torch.stack(rows) if rows else torch.zeros(0, len(gate_and_up) // 2, dtype=torch.float64)


@pytest.mark.parametrize("name", tiny.MIXTURES)
@whole_and_padded
def test_each_expert_is_decided_over_the_tokens_routed_to_it_as_the_router_weights_them(name, decoder, padded):
    windows = tiny.windows(5, padded=padded)
    described = decoder.family.experts
    sets = []
    for decision in Osscar(ratio=0.5, damping=0.01).decide(decoder, Calibration(windows)):
        index = decision.evidence["layer"]
        layer = decoder.layer(index)
        if "experts" not in layer.axes:
            carry_out(decoder, decision)
            continue
        experts = layer.part(described.module)
        call = calls_of(experts, decoder, windows)
        kept = decision.cuts.kept(index, "experts")
        assert len({len(each) for each in kept}) == 1
        inputs, output = getattr(experts, described.inputs).detach(), getattr(experts, described.output).detach()
        keep = len(kept[0])
        assert keep % 8 == 0
        for expert in range(tiny.EXPERTS):
            rows = routed_rows(call, windows.mask, expert, inputs[expert])
            assert decision.evidence["tokens"][expert] == len(rows)
            expected = eliminate(damped(rows.T @ rows, 0.01), output[expert], keep)
            assert kept[expert] == expected.kept
            found = decision.weights[f"{layer.prefix}{described.module}.{described.output}"][expert]
            assert_close(found, expected.weight, rtol=1e-3, atol=1e-4)
        sets.append(kept)
        carry_out(decoder, decision)
    assert len(sets) >= 2
    assert any(len(set(kept)) > 1 for kept in sets)


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
@whole_and_padded
def test_shared_experts_are_cut_with_the_others_over_all_tokens(name, decoder, padded):
    windows = tiny.windows(5, padded=padded)
    for decision in Osscar(ratio=0.5, damping=0.01).decide(decoder, Calibration(windows)):
        index = decision.evidence["layer"]
        layer = decoder.layer(index)
        if "shared" in layer.axes:
            axis = layer.axes["shared"]
            linear = layer.linear_of(axis.output)
            rows = conformance.inputs_of(decoder.model, linear.module, windows)
            keep = len(decision.cuts.kept(index, "experts")[0]) * axis.times
            expected = eliminate(damped(rows.T @ rows, 0.01), linear.weight, keep)
            assert decision.cuts.kept(index, "shared") == expected.kept
            found = decision.weights[f"{layer.prefix}{axis.output}"]
            assert_close(found, expected.weight, rtol=1e-3, atol=1e-4, check_dtype=False)
            assert decision.evidence["shared_relative_error"] == pytest.approx(expected.relative_error, rel=1e-3)
        carry_out(decoder, decision)


def router_of(layer: torch.nn.Module) -> torch.nn.Module:
    return layer.get_submodule("mlp.gate")


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3"])
@pytest.mark.parametrize("windows", [tiny.windows(5), tiny.windows(1, 2)], ids=["many tokens", "two tokens"])
def test_experts_that_no_token_reaches_are_pruned_to_the_same_width(name, decoder, windows, plugins):
    model = decoder.model
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = (
            100  # so it is positive in every hidden state, and the router sees no more
        )
        for layer in decoder.layers:
            if "experts" in layer.axes:
                router_of(layer.module).weight.zero_()
                router_of(layer.module).weight[:, 0] = torch.tensor([1.5, 1.0, 0.5, 0.0])
    outcome = conformance.pruned(Osscar(ratio=0.5), decoder, windows, plugins)
    counts = [evidence["tokens"] for evidence in outcome.evidence if "tokens" in evidence]
    assert counts
    assert all(count == [windows.tokens.numel()] * 2 + [0, 0] for count in counts)
    assert len({layer.units("experts") for layer in decoder.shape().layers if layer.units("experts")}) == 1
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert conformance.logits(model, tiny.windows(3, seed=1)).isfinite().all()


@pytest.mark.parametrize("name", ["deepseek_v3"])
def test_an_expert_that_is_never_chosen_keeps_the_weights_of_its_largest_channels(name, decoder):
    with torch.no_grad():
        for layer in decoder.modules[2:]:
            router_of(layer).e_score_correction_bias[:] = torch.tensor([0.0, 0.0, 0.0, -100.0])
    pruned = 0
    for decision in Osscar(ratio=0.5).decide(decoder, Calibration(tiny.windows(5))):
        index = decision.evidence["layer"]
        if (index, "experts") in decision.cuts.units:
            assert decision.evidence["tokens"][3] == 0
            weight = decoder.layer(index).part("mlp.experts").down_proj[3].detach()
            kept = decision.cuts.kept(index, "experts")[3]
            assert set(kept) == set(weight.norm(dim=0).topk(len(kept)).indices.tolist())
            found = decision.weights[f"{decoder.family.layers}.{index}.mlp.experts.down_proj"][3]
            assert_close(found.float(), weight[:, list(kept)])
            pruned += 1
        carry_out(decoder, decision)
    assert pruned == tiny.LAYERS - 2


# Towards the dense model


def visits(decoder: Decoder, index: int, windows: Windows) -> tuple[LayerVisit, LayerVisit]:
    """Two visits of the same layer, the second of which was left."""
    first, second = (
        next(visit for visit in Calibration(windows).walk(decoder, "") if visit.index == index) for _ in range(2)
    )
    with torch.no_grad():
        second.leave()
    return first, second


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "opt-post-norm"])
def test_a_correction_moves_nothing_where_nothing_is_lacking_or_a_norm_follows(name, decoder):
    windows = tiny.windows(8)
    visit, reference = visits(decoder, 2, windows)
    (corrected,) = Narrowing(0.1, correction=0.5).decisions(visit, "channels", (32,), reference)
    (plain,) = Narrowing(0.1).decisions(visits(decoder, 2, windows)[0], "channels", (32,))
    assert corrected.cuts == plain.cuts
    for name, weight in plain.weights.items():
        assert_close(corrected.weights[name], weight, rtol=1e-4, atol=1e-4, check_dtype=False)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "opt"])
def test_a_correction_brings_the_layers_behind_nearer_to_the_dense_model(name, decoder):
    windows = tiny.windows(30)
    expected = conformance.logits(decoder.model, windows)
    distances = []
    for correction in (0.0, 0.5):
        smaller = copy.deepcopy(decoder)
        for decision in Osscar(ratio=0.5, correction=correction, damping=0.1).decide(smaller, Calibration(windows)):
            carry_out(smaller, decision)
        distances.append((conformance.logits(smaller.model, windows) - expected).square().mean().item())
    assert distances[1] < distances[0]


@pytest.mark.parametrize("name", ["llama"])
def test_what_makes_massive_activations_is_moved_all_the_way_or_not_at_all(name, decoder):
    windows = tiny.windows(8)
    with torch.no_grad():
        decoder.layers[2].part("mlp.up_proj").weight[5] *= 1e3
    reference = visits(decoder, 2, windows)[1]
    reference.stream = [(batch, hidden + torch.randn_like(hidden)) for batch, hidden in reference.stream]
    weights = {}
    for correction in (0.0, 0.5, 1.0):
        visit = visits(decoder, 2, windows)[0]
        (made,) = Narrowing(0.1, correction).decisions(visit, "channels", (32,), reference if correction else None)
        weights[correction] = made.weights["model.layers.2.mlp.down_proj.weight"]
        assert 5 in made.cuts.kept(2, "channels")
    assert torch.equal(weights[0.5], weights[0.0])
    assert not torch.equal(weights[1.0], weights[0.0])


@pytest.mark.parametrize("name", ["llama", "gpt2", "deepseek_v3"])
def test_several_sizes_of_one_visit_are_decided_as_each_alone(name, decoder):
    axis, sizes = ("experts", (16, 8)) if name == "deepseek_v3" else ("channels", (48, 20, 1))
    windows = tiny.windows(5)
    together = Narrowing(0.1).decisions(visits(decoder, 3, windows)[0], axis, sizes)
    for size, decision in zip(sizes, together, strict=True):
        (alone,) = Narrowing(0.1).decisions(visits(decoder, 3, windows)[0], axis, (size,))
        assert decision.cuts == alone.cuts
        assert all(torch.equal(value, alone.weights[name]) for name, value in decision.weights.items())

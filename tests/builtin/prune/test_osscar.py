from __future__ import annotations

import copy
import math

import conformance
import pytest
import tiny
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_prune import Cuts, Decision, LayerShape, Osscar, Progress, Shape, compress, surgery
from optimum_prune.anatomy import find_family, parameters
from optimum_prune.elimination import damped, eliminate, eliminate_groups
from optimum_prune.errors import NumericalError, OptimumPruneError, RecipeError
from optimum_prune.recipe import Recipe
from optimum_prune.run import Texts
from optimum_prune.subject import Subject

# Options, and the shape they lead to


@pytest.mark.parametrize("width", [1, 2, 7, 8, 24, 64, 100, 1023, 1536, 14336])
@pytest.mark.parametrize("multiple", [None, 1, 3, 64])
@pytest.mark.parametrize("ratio", [0.001, 0.1, 0.3, 0.5, 0.75, 0.999])
@pytest.mark.parametrize("experts", [False, True], ids=["FFN", "experts"])
def test_kept_widths_are_the_nearest_multiple_but_never_none_nor_all(width, multiple, ratio, experts):
    step = Osscar(ratio=ratio, multiple_of=multiple)
    kind = "expert_width" if experts else "width"
    shape = Shape((LayerShape(parameters=10**9, **{kind: width}),) * 5)
    least = math.lcm(multiple or 1, 8 if experts else 1)
    possible = [kept for kept in range(1, width) if kept % least == 0]
    if not possible:
        with pytest.raises(RecipeError, match=r"Lower multiple_of|width"):
            step.foresee(shape)
        return
    (kept,) = {getattr(layer, kind) for layer in step.foresee(shape).layers}
    assert kept in possible
    if multiple is not None:
        assert abs(kept - width * (1 - ratio)) <= min(abs(other - width * (1 - ratio)) for other in possible) + 1e-9
    elif width >= 1024:
        assert kept % 64 == 0


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({}, "needs a target"),
        ({"protect": (1,)}, "needs a target"),
        ({"ratio": 0.0}, "ratio 0.0"),
        ({"ratio": 1.0}, "ratio 1.0"),
        ({"ratio": -0.1}, "ratio -0.1"),
        ({"ratio": float("nan")}, "ratio nan"),
        ({"params": 0.0}, "params 0.0"),
        ({"params": 1.0}, "params 1.0"),
        ({"params": 1.5}, "params 1.5"),
        ({"params": float("nan")}, "params nan"),
        ({"head_ratio": 0.0}, "needs a target"),
        ({"head_ratio": 1.0}, "head_ratio 1.0"),
        ({"head_ratio": float("inf")}, "head_ratio inf"),
        ({"params": 0.5, "ratio": 0.5}, "both 'ratio' and 'params'"),
        ({"ratio": 0.2, "protect": (1, 1)}, r"\[1, 1\]. Name each once"),
        ({"ratio": 0.2, "protect": (-1,)}, "counted from 0"),
        ({"ratio": 0.2, "multiple_of": 0}, "multiple_of 0"),
        ({"ratio": 0.2, "damping": 0.0}, "damping 0.0"),
        ({"ratio": 0.2, "damping": -1.0}, "damping -1.0"),
        ({"ratio": 0.2, "damping": float("nan")}, "damping nan"),
        ({"ratio": 0.2, "step": 0}, "step 0"),
        ({"ratio": 0.2, "swaps": -1}, "swaps -1"),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused(options, why):
    with pytest.raises(RecipeError, match=f"osscar .*{why}"):
        Osscar(**options)


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
def test_what_a_model_of_this_shape_cannot_give_is_refused(name, subject, options, why):
    model, family = subject
    with pytest.raises(RecipeError, match=why):
        Osscar(**options).foresee(family.shape(model))


@pytest.mark.parametrize("name", tiny.WITHOUT_HEADS)
def test_heads_that_the_config_cannot_say_are_refused(name, subject):
    model, family = subject
    with pytest.raises(RecipeError, match="cannot say that there are fewer heads"):
        Osscar(head_ratio=0.5).foresee(family.shape(model))


def test_heads_must_divide_the_hidden_size_where_the_config_insists(plugins):
    sizes = {**tiny.SIZES, "hidden_size": 48, "num_attention_heads": 8, "num_key_value_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    family = find_family(model.config, plugins.families)
    shape = family.shape(model)
    # With 2 query heads for each key-value head, 2, 4, 6 and 8 query heads all but the last divide 48 evenly.
    assert shape.layers[0].possible_heads == tuple(heads for heads in (1, 2, 3, 4) if 48 % (2 * heads) == 0)
    sizes = {**sizes, "hidden_size": 40, "num_attention_heads": 10, "num_key_value_heads": 5}
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    shape = family.shape(model)
    assert shape.layers[0].possible_heads == (1, 2, 4, 5)
    with pytest.raises(RecipeError, match=r"keeps 3 of 5 key-value heads, .* allows 1, 2, 4"):
        Osscar(head_ratio=0.4).foresee(shape)
    conformance.pruned(Osscar(head_ratio=0.6), model.eval(), family, tiny.windows(2), plugins)
    assert (model.config.num_key_value_heads, model.config.num_attention_heads, model.config.head_dim) == (2, 4, 4)


@pytest.mark.parametrize("name", ["llama"])
@pytest.mark.parametrize(("ratio", "kept"), [(0.001, 1), (0.3, 1), (0.5, 1), (0.999, 1)])
def test_a_head_goes_and_a_head_stays_whatever_the_ratio(name, subject, ratio, kept):
    model, family = subject
    assert {layer.heads for layer in Osscar(head_ratio=ratio).foresee(family.shape(model)).layers} == {kept}


@pytest.mark.parametrize("name", ["llama", "gemma3-vision", "gpt2", "opt", "mixtral", "qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("options", [{}, {"multiple_of": 1}, {"head_ratio": 0.5}, {"protect": (0, 3)}], ids=str)
def test_no_other_width_comes_nearer_to_the_parameters_asked_for(name, subject, options):
    model, family = subject
    shape = family.shape(model)
    if "head_ratio" in options and name in tiny.WITHOUT_HEADS:
        options = {}
    others = [Osscar(ratio=ratio / 200, **options).foresee(shape).parameters for ratio in range(1, 200)]
    low, high = min(others) / shape.parameters, max(others) / shape.parameters
    for part in (0.0, 0.2, 0.5, 0.77, 1.0):
        wanted = low + part * (high - low)
        found = Osscar(params=wanted, **options).foresee(shape).parameters
        nearest = min(abs(other - wanted * shape.parameters) for other in others)
        assert abs(found - wanted * shape.parameters) <= nearest + 1e-6


@pytest.mark.parametrize("name", ["llama-tied", "phi3", "gpt2", "qwen3_moe", "deepseek_v2"])
@pytest.mark.parametrize(
    "options", [{"params": 0.85}, {"params": 0.8, "protect": (1,)}, {"ratio": 0.999}, {"ratio": 0.001}], ids=str
)
def test_what_is_foreseen_is_what_there_is(name, subject, options, plugins):
    model, family = subject
    step = Osscar(**options)
    foreseen = step.foresee(family.shape(model))
    dense = copy.deepcopy(model)
    conformance.pruned(step, model, family, tiny.windows(3), plugins)
    assert family.shape(model) == foreseen
    assert foreseen.parameters == parameters(model)["total"]
    assert all((layer.width or layer.expert_width) >= 1 for layer in foreseen.layers)
    for index in step.protect:
        for before, after in zip(
            family.layers_of(dense)[index].parameters(), family.layers_of(model)[index].parameters(), strict=True
        ):
            assert torch.equal(before, after)


# What is decided


@pytest.mark.parametrize("name", ["llama", "gemma3", "opt"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_each_layer_is_decided_by_the_stream_of_the_layers_cut_before_it(name, padded, plugins):
    model = tiny.model(name)
    family = find_family(model.config, plugins.families)
    windows = tiny.windows(5, padded=padded)
    step = Osscar(ratio=0.5, damping=0.01)
    path = family.feed_forward.output
    dense = copy.deepcopy(model)
    for index, decision in enumerate(step.decide(model, family, windows, Progress())):
        linear = family.linear(family.layers_of(model)[index], path)
        grams, means = [], []
        for whose in (model, dense):
            seen: list[Tensor] = []
            module = family.linear(family.layers_of(whose)[index], path).module
            handle = module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].flatten(0, -2)))
            conformance.logits(whose, windows)
            handle.remove()
            rows = seen[0][windows.mask.flatten()].double()
            means.append(rows.mean(0))
            rows = rows if linear.bias is None else rows - rows.mean(0)
            grams.append(rows.T @ rows)
        expected = eliminate(damped(grams[0], 0.01), linear.weight.detach(), tiny.WIDTH // 2)
        assert decision.cuts == Cuts(channels={index: expected.kept})
        name = f"{family.layers}.{index}.{path}"
        assert model.get_parameter(f"{name}.weight") is linear.module.weight
        assert_close(decision.weights[f"{name}.weight"], expected.weight, rtol=1e-3, atol=1e-4, check_dtype=False)
        if linear.bias is not None:  # the mean output stays what it was
            before = linear.weight.double() @ means[0] + linear.bias
            after = expected.weight @ means[0][list(expected.kept)] + decision.weights[f"{name}.bias"]
            assert_close(after, before, rtol=1e-3, atol=1e-4)
        assert decision.evidence["layer"] == index
        assert decision.evidence["width"] == tiny.WIDTH // 2
        assert decision.evidence["relative_error"] == pytest.approx(expected.relative_error, rel=1e-3)
        assert index == 0 or not torch.allclose(grams[0], grams[1], rtol=0.01)
        surgery.carry_out(model, family, decision)
    assert index == tiny.LAYERS - 1


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_osscar_stays_closer_to_the_dense_model_than_random_channels_do(name, plugins):
    dense = tiny.model(name)
    family = find_family(dense.config, plugins.families)
    calibration, held_out = tiny.windows(60), tiny.windows(20, seed=1)
    wanted = conformance.logits(dense, held_out)

    def distance(model) -> float:
        return (conformance.logits(model, held_out) - wanted).square().mean().item()

    model = copy.deepcopy(dense)
    conformance.pruned(Osscar(ratio=0.25), model, family, calibration, plugins)
    sizes = family.shape(model).layers
    widths = {
        "width": max(layer.width for layer in sizes) or None,
        "expert_width": max(layer.expert_width for layer in sizes) or None,
    }
    at_random = []
    for seed in range(3):
        other = copy.deepcopy(dense)
        conformance.cut(other, family, conformance.cuts_to(other, family, conformance.at_random(seed), **widths))
        assert family.shape(other) == family.shape(model)
        at_random.append(distance(other))
    assert distance(model) < 0.7 * min(at_random)


def test_weights_that_are_not_finite_are_named_as_the_cause(plugins):
    model = tiny.model("llama")
    family = find_family(model.config, plugins.families)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 3] = torch.nan
    with pytest.raises(NumericalError, match=r"layer 2 .*not finite"):
        conformance.pruned(Osscar(ratio=0.25), model, family, tiny.windows(), plugins)


@pytest.mark.parametrize("name", ["opt", "gpt2-wide", "gpt_neox"])
def test_the_bias_takes_over_the_mean_of_what_is_lost(name, plugins):
    """Better than the same cut whose bias stays."""
    model = tiny.model(name)
    family = find_family(model.config, plugins.families)
    windows = tiny.windows(8)
    expected = conformance.logits(model, windows)
    errors = []
    for with_bias in (True, False):
        cut = copy.deepcopy(model)
        for decision in Osscar(ratio=0.5).decide(cut, family, windows, Progress()):
            weights = {name: value for name, value in decision.weights.items() if with_bias or "bias" not in name}
            assert len(decision.weights) == 2
            surgery.carry_out(cut, family, Decision(decision.cuts, weights))
        errors.append((conformance.logits(cut, windows) - expected).square().mean())
    assert errors[0] < errors[1]


@pytest.mark.parametrize("name", ["llama", "phi3", "cohere", "qwen3", "mixtral"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_heads_are_decided_over_what_they_put_out_in_the_pruned_stream(name, subject, padded):
    model, family = subject
    windows = tiny.windows(5, padded=padded)
    path = family.attention_output
    for index, decision in enumerate(Osscar(head_ratio=0.5, damping=0.01).decide(model, family, windows, Progress())):
        linear = family.linear(family.layers_of(model)[index], path)
        rows = conformance.inputs_of(model, linear.module, windows)
        rows = rows if linear.bias is None else rows - rows.mean(0)
        counts = family.head_counts(family.layers_of(model)[index])
        expected = eliminate_groups(damped(rows.T @ rows, 0.01), linear.weight, 1, counts.queries * counts.size)
        assert decision.cuts == Cuts(heads={index: expected.kept})
        weight = decision.weights[f"{family.layers}.{index}.{path}.weight"]
        assert_close(weight, expected.weight, rtol=1e-3, atol=1e-4, check_dtype=False)
        surgery.carry_out(model, family, decision)
    assert index == tiny.LAYERS - 1


# Mixtures of experts


@pytest.mark.parametrize("name", tiny.MIXTURES)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_each_expert_is_decided_over_the_tokens_routed_to_it_as_the_router_weights_them(name, subject, padded):
    model, family = subject
    windows = tiny.windows(5, padded=padded)
    step = Osscar(ratio=0.5, damping=0.01)
    described = family.experts
    sets = []
    for decision in step.decide(model, family, windows, Progress()):
        index = decision.evidence["layer"]
        layer = family.layers_of(model)[index]
        experts = family.experts_of(layer)
        if experts is None:
            surgery.carry_out(model, family, decision)
            continue
        calls: list[tuple[Tensor, ...]] = []
        handle = experts.register_forward_pre_hook(
            lambda _, args, kwargs, calls=calls: calls.append((*args, *kwargs.values())), with_kwargs=True
        )
        conformance.logits(model, windows)
        handle.remove()
        ((hidden, chosen, weights),) = calls
        kept = decision.cuts.experts[index]
        assert len({len(each) for each in kept}) == 1
        inputs, output = getattr(experts, described.inputs).detach(), getattr(experts, described.output).detach()
        keep = len(kept[0])
        assert keep % 8 == 0
        for expert in range(tiny.EXPERTS):
            rows = []
            for token in range(len(hidden)):
                if not windows.mask.flatten()[token] or expert not in chosen[token]:
                    continue
                gate, up = (inputs[expert] @ hidden[token]).detach().double().chunk(2)
                share = weights[token][chosen[token] == expert].sum().detach().double()
                rows.append(share * torch.nn.functional.silu(gate) * up)
            rows = torch.stack(rows) if rows else torch.zeros(0, output.shape[2], dtype=torch.float64)
            assert decision.evidence["tokens"][expert] == len(rows)
            expected = eliminate(damped(rows.T @ rows, 0.01), output[expert], keep)
            assert kept[expert] == expected.kept
            found = decision.weights[f"{family.layers}.{index}.{described.module}.{described.output}"][expert]
            assert_close(found, expected.weight, rtol=1e-3, atol=1e-4)
        sets.append(kept)
        surgery.carry_out(model, family, decision)
    assert len(sets) >= 2
    assert any(len(set(kept)) > 1 for kept in sets)


def router_of(layer) -> torch.nn.Module:
    return layer.get_submodule("mlp.gate")


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3"])
@pytest.mark.parametrize("windows", [tiny.windows(5), tiny.windows(1, 2)], ids=["many tokens", "two tokens"])
def test_experts_that_no_token_reaches_are_pruned_to_the_same_width(name, subject, windows, plugins):
    model, family = subject
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = (
            100  # so it is positive in every hidden state, and the router sees no more
        )
        for layer in family.layers_of(model):
            if family.experts_of(layer) is not None:
                router_of(layer).weight.zero_()
                router_of(layer).weight[:, 0] = torch.tensor([1.5, 1.0, 0.5, 0.0])
    outcome = conformance.pruned(Osscar(ratio=0.5), model, family, windows, plugins)
    counts = [evidence["tokens"] for evidence in outcome.evidence if "tokens" in evidence]
    assert all(count == [windows.tokens.numel()] * 2 + [0, 0] for count in counts)
    assert len({layer.expert_width for layer in family.shape(model).layers if layer.expert_width}) == 1
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert conformance.logits(model, tiny.windows(3, seed=1)).isfinite().all()


@pytest.mark.parametrize("name", ["deepseek_v3"])
def test_an_expert_that_is_never_chosen_keeps_the_weights_of_its_largest_channels(name, subject):
    model, family = subject
    with torch.no_grad():
        for layer in family.layers_of(model)[2:]:
            router_of(layer).e_score_correction_bias[:] = torch.tensor([0.0, 0.0, 0.0, -100.0])
    for decision in Osscar(ratio=0.5).decide(model, family, tiny.windows(5), Progress()):
        index = decision.evidence["layer"]
        if index in decision.cuts.experts:
            assert decision.evidence["tokens"][3] == 0
            weight = family.experts_of(family.layers_of(model)[index]).down_proj[3].detach()
            kept = decision.cuts.experts[index][3]
            assert set(kept) == set(weight.norm(dim=0).topk(len(kept)).indices.tolist())
            found = decision.weights[f"{family.layers}.{index}.mlp.experts.down_proj"][3]
            assert_close(found.float(), weight[:, list(kept)])
        surgery.carry_out(model, family, decision)


# What cannot be computed with


LAYER_2 = r"layer 2 |\.(layers|h)\.2\."


def broken_at(path, value):
    def harm(model):
        parameter = model.get_parameter(path)
        with torch.no_grad():
            parameter.view(-1)[3] = value

    return harm


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=["nan", "inf"])
@pytest.mark.parametrize(
    ("name", "path", "what"),
    [
        *(
            ("llama", f"model.layers.2.{path}", LAYER_2)
            for path in (
                "self_attn.q_proj.weight",
                "self_attn.v_proj.weight",
                "self_attn.o_proj.weight",
                "self_attn.o_proj.bias",
                "mlp.gate_proj.weight",
                "mlp.down_proj.weight",
                "mlp.down_proj.bias",
                "input_layernorm.weight",
                "post_attention_layernorm.weight",
            )
        ),
        ("gpt2", "transformer.h.2.mlp.c_fc.weight", LAYER_2),
        ("gpt2", "transformer.h.2.mlp.c_proj.bias", LAYER_2),
        ("deepseek_v3", "model.layers.2.mlp.experts.gate_up_proj", LAYER_2),
        ("deepseek_v3", "model.layers.2.mlp.experts.down_proj", LAYER_2),
        ("deepseek_v3", "model.layers.2.mlp.gate.weight", LAYER_2),
        ("deepseek_v3", "model.layers.2.mlp.shared_experts.down_proj.weight", LAYER_2),
    ],
)
@pytest.mark.parametrize("options", [{"ratio": 0.5}, {"head_ratio": 0.5, "ratio": 0.5}], ids=["channels", "both"])
def test_weights_that_are_not_finite_are_traced_to_their_layer(name, subject, path, what, value, options, plugins):
    model, family = subject
    if name in tiny.WITHOUT_HEADS and "head_ratio" in options:
        options = {"ratio": 0.25}
    if path.endswith("mlp.gate.weight") and value == torch.inf:
        pytest.skip("scores of a sigmoid are finite nonetheless")
    broken_at(path, value)(model)
    with pytest.raises(OptimumPruneError, match=what):
        conformance.pruned(Osscar(**options), model, family, tiny.windows(), plugins)


@pytest.mark.parametrize("name", ["llama"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=["nan", "inf"])
def test_embeddings_that_are_not_finite_are_named(name, subject, value, plugins):
    model, family = subject
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(value)
    with pytest.raises(NumericalError, match="embeddings"):
        conformance.pruned(Osscar(ratio=0.5), model, family, tiny.windows(), plugins)


@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize("scale", [1e12, 1e20, 1e30], ids=str)
def test_activations_too_large_to_square_are_an_error_that_names_the_layer_or_are_solved(
    name, subject, scale, plugins
):
    model, family = subject
    with torch.no_grad():
        for path in family.feed_forward.inputs[-1:]:
            family.linear(family.layers_of(model)[2], path).weight[3] *= scale
        family.linear(family.layers_of(model)[2], family.feed_forward.output).weight[:, 3] /= scale
    try:
        conformance.pruned(Osscar(ratio=0.5), model, family, tiny.windows(), plugins)
    except NumericalError as error:
        assert "layer 2" in str(error)  # noqa: PT017 - either is right
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["llama", "gpt2", "deepseek_v3"])
def test_a_layer_of_zeros_is_pruned_like_any_other(name, subject, plugins, tmp_path):
    model, family = subject
    with torch.no_grad():
        for parameter in family.layers_of(model)[3].parameters():
            parameter.zero_()
    options = {} if name in tiny.WITHOUT_HEADS else {"head_ratio": 0.5}
    conformance.pruned(Osscar(ratio=0.5, **options), model, family, tiny.windows(), plugins)
    assert conformance.logits(model, tiny.windows(3)).isfinite().all()
    conformance.reloads_exactly(model, tmp_path, tiny.windows(3))


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "opt", "qwen3_moe", "deepseek_v3"])
def test_a_window_of_two_tokens_is_enough(name, subject, plugins, tmp_path):
    model, family = subject
    options = {} if name in tiny.WITHOUT_HEADS else {"head_ratio": 0.5}
    conformance.pruned(Osscar(ratio=0.5, **options), model, family, tiny.windows(1, 2), plugins)
    assert conformance.logits(model, tiny.windows(3)).isfinite().all()
    conformance.reloads_exactly(model, tmp_path, tiny.windows(3))


@pytest.mark.parametrize("name", ["llama"])
def test_nothing_is_written_of_a_model_that_cannot_be_computed_with(name, subject, tmp_path):
    model, _ = subject
    broken_at("model.layers.4.self_attn.o_proj.weight", torch.nan)(model)
    whole = Subject("broken", None, model.config, None, lambda _: model)
    with pytest.raises(OptimumPruneError, match="layer 4"):
        compress(
            Recipe(passes=(Osscar(head_ratio=0.5),)),
            tmp_path / "out",
            subject=whole,
            texts=Texts(tiny.windows(), None),
        )
    assert not list(tmp_path.iterdir())

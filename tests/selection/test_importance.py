from __future__ import annotations

import math

import conformance
import pytest
import tiny
import torch
from torch import Tensor

from optimum_prune import Calibration, Progress, importance
from optimum_prune.anatomy import find_family

SOME = ("llama", "llama-tied", "gemma2", "gemma3-vision", "gpt2", "gpt_neox", "opt", "qwen3", "deepseek_v2")


def counted(layer) -> dict[str, Tensor]:
    """Matrices and norms; biases left out."""
    return {name: weight for name, weight in layer.named_parameters() if not name.endswith("bias")}


def naive_taylor(model, family, windows) -> list[float]:
    """By the model's own loss and a gradient of everything."""
    for tokens, mask in zip(windows.tokens, windows.mask, strict=True):
        labels = tokens.masked_fill(~mask, -100)[None]
        model(input_ids=tokens[None], attention_mask=mask.long()[None], labels=labels, use_cache=False).loss.backward()
    scores = [
        sum(
            (weight * weight.grad).abs().double().sum().item()
            for weight in counted(layer).values()
            if weight.grad is not None
        )
        for layer in family.layers_of(model)
    ]
    model.zero_grad(set_to_none=True)
    return scores


def hidden_states(model, family, windows) -> list[Tensor]:
    """Before the first layer and behind each, in the model's own forward; `output_hidden_states` has a norm over the last."""
    seen: list[Tensor] = []

    def before(_, args, kwargs):
        seen.append(args[0] if args else kwargs["hidden_states"])

    def behind(_, __, output):
        seen.append(output[0] if isinstance(output, tuple) else output)

    layers = family.layers_of(model)
    handles = [layers[0].register_forward_pre_hook(before, with_kwargs=True)]
    handles += [layer.register_forward_hook(behind) for layer in layers]
    conformance.logits(model, windows)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_magnitude_is_the_sum_of_all_absolute_weights_but_biases(name, subject):
    model, family = subject
    expected = [
        sum(weight.double().abs().sum().item() for weight in counted(layer).values())
        for layer in family.layers_of(model)
    ]
    assert importance.magnitudes(model, family) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("score", ["magnitude", "taylor"])
def test_norms_count_and_biases_do_not(score, plugins):
    def scores(model) -> list[float]:
        family = find_family(model.config, plugins.families)
        if score == "magnitude":
            return importance.magnitudes(model, family)
        return importance.taylor(model, family, tiny.windows(2), Progress())

    model = tiny.model("llama")
    with torch.no_grad():
        model.model.layers[5].mlp.down_proj.bias.zero_()
    before = scores(model)
    with torch.no_grad():  # a large constant in one bias changes no magnitude
        model.model.layers[2].mlp.down_proj.bias.add_(3)
        if score == "magnitude":
            assert scores(model) == before
        model.model.layers[2].mlp.down_proj.bias.sub_(3)
        model.model.layers[3].input_layernorm.weight.mul_(-2)
    assert scores(model)[3] != pytest.approx(before[3], rel=1e-3)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_taylor_is_weight_times_gradient_of_the_mean_loss_of_each_window_summed_over_windows(name, subject, padded):
    model, family = subject
    windows = tiny.windows(4, padded=padded)
    expected = naive_taylor(model, family, windows)
    assert importance.taylor(model, family, windows, Progress()) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_taylor_of_a_mixture_counts_the_router_and_every_expert(name, subject):
    model, family = subject
    windows = tiny.windows(2, length=12)
    expected = naive_taylor(model, family, windows)
    assert importance.taylor(model, family, windows, Progress()) == pytest.approx(expected, rel=1e-3)


def test_each_window_counts_alike_in_taylor_however_little_of_it_is_text(plugins):
    """Mean loss of each window, not the mean over all tokens."""
    model = tiny.model("llama")
    family = find_family(model.config, plugins.families)
    windows = tiny.windows(2)
    windows.mask[1, 4:] = False
    windows.tokens[1, 4:] = tiny.PAD
    cut_short = Calibration.from_tokens(windows.tokens[1:, :4])
    of_both = importance.taylor(model, family, windows, Progress())
    with torch.enable_grad():
        for one in (Calibration.from_tokens(windows.tokens[:1]), cut_short):
            model(input_ids=one.tokens, labels=one.tokens, use_cache=False).loss.backward()
    expected = [
        sum((weight * weight.grad).abs().sum().item() for weight in counted(layer).values())
        for layer in model.model.layers
    ]
    assert of_both == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", ["llama", "opt", "mixtral"])
def test_taylor_leaves_nothing_behind(name, subject):
    model, family = subject
    for position, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(position % 3 != 0)
    asking = [parameter.requires_grad for parameter in model.parameters()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = importance.taylor(model, family, tiny.windows(2), Progress())
    assert [parameter.requires_grad for parameter in model.parameters()] == asking
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model.requires_grad_(True)
    assert importance.taylor(model, family, tiny.windows(2), Progress()) == found


def test_taylor_can_be_taken_where_gradients_are_switched_off(plugins):
    model = tiny.model("llama")
    family = find_family(model.config, plugins.families)
    expected = importance.taylor(model, family, tiny.windows(2), Progress())
    with torch.no_grad():
        assert importance.taylor(model, family, tiny.windows(2), Progress()) == expected


def test_a_failed_taylor_still_gives_the_parameters_their_flags_back(plugins, monkeypatch):
    model = tiny.model("llama")
    family = find_family(model.config, plugins.families)

    def fail(*_):
        raise RuntimeError("stop")

    model.model.norm.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        importance.taylor(model, family, tiny.windows(2), Progress())
    assert all(parameter.requires_grad for parameter in model.parameters())


# Distances


def rows(hidden: Tensor, windows: Calibration) -> list[list[Tensor]]:
    """Of each window, the hidden states of its tokens."""
    return [
        [row[position] for position in range(len(mask)) if mask[position]]
        for row, mask in zip(hidden, windows.mask, strict=True)
    ]


def cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return (a @ b / (a.norm() * b.norm())).item()


@pytest.mark.parametrize("name", [*SOME, "mixtral", "opt-post-norm"])
@pytest.mark.parametrize("span", [1, 3])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_distances_are_those_between_the_models_hidden_states(name, subject, span, padded):
    model, family = subject
    windows = tiny.windows(5, padded=padded)
    states = [rows(hidden, windows) for hidden in hidden_states(model, family, windows)]
    away, turned = [], []
    for before, behind in zip(states, states[span:], strict=False):
        pairs = [pair for window in zip(before, behind, strict=True) for pair in zip(*window, strict=True)]
        away.append(sum(1 - cosine(*pair) for pair in pairs) / len(pairs))
        lasts = [cosine(first[-1], second[-1]) for first, second in zip(before, behind, strict=True)]
        turned.append(sum(math.acos(last) / math.pi for last in lasts) / len(lasts))
    assert len(away) == tiny.LAYERS - span + 1
    assert importance.distances(model, family, windows, span, False, Progress()) == pytest.approx(away, rel=1e-4)
    assert importance.distances(model, family, windows, span, True, Progress()) == pytest.approx(turned, rel=1e-4)


@pytest.mark.parametrize("angular", [False, True], ids=["cosine", "angular"])
def test_layers_that_hand_on_what_they_are_given_turn_nothing(angular, plugins):
    model = tiny.model("llama")
    family = find_family(model.config, plugins.families)
    with torch.no_grad():
        for index in (2, 3):
            layer = model.model.layers[index]
            for part in (layer.self_attn.o_proj, layer.mlp.down_proj):
                part.weight.zero_()
                part.bias.zero_()
    found = importance.distances(model, family, tiny.windows(3), 2, angular, Progress())
    assert found[2] == pytest.approx(0, abs=1e-6)
    assert min(found[:2] + found[3:]) > 0.01


@pytest.mark.parametrize("angular", [False, True], ids=["cosine", "angular"])
def test_distances_do_not_depend_on_how_windows_are_batched(angular, plugins, monkeypatch):
    model = tiny.model("gemma3")
    family = find_family(model.config, plugins.families)
    windows = tiny.windows(5, padded=True)
    together = importance.distances(model, family, windows, 2, angular, Progress())
    monkeypatch.setattr("optimum_prune.layerwise.TOKENS_PER_BATCH", 2 * windows.tokens.shape[1])
    apart = importance.distances(model, family, windows, 2, angular, Progress())
    assert apart == pytest.approx(together, rel=1e-5)

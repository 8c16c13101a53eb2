from __future__ import annotations

import math

import pytest
import tiny
import torch
from torch import Tensor

from optimum_prune import Calibration, Decoder, Windows
from optimum_prune import testing as conformance
from optimum_prune.selection import importance

SOME = ("llama", "llama-tied", "gemma2", "gemma3-vision", "gpt2", "gpt_neox", "opt", "qwen3", "deepseek_v2")


def counted(layer) -> dict[str, Tensor]:
    """Matrices and norms; biases left out."""
    return {name: weight for name, weight in layer.named_parameters() if not name.endswith("bias")}


def taylor(decoder: Decoder, windows: Windows) -> list[float]:
    return importance.taylor(decoder, Calibration(windows))


def distances(decoder: Decoder, windows: Windows, span: int, *, angular: bool) -> list[float]:
    return importance.distances(decoder, Calibration(windows), span, angular=angular)


def naive_taylor(decoder: Decoder, windows: Windows) -> list[float]:
    """By the model's own loss and a gradient of everything."""
    model = decoder.model
    for tokens, mask in zip(windows.tokens, windows.mask, strict=True):
        labels = tokens.masked_fill(~mask, -100)[None]
        model(input_ids=tokens[None], attention_mask=mask.long()[None], labels=labels, use_cache=False).loss.backward()
    scores = [
        sum(
            (weight * weight.grad).abs().double().sum().item()
            for weight in counted(layer).values()
            if weight.grad is not None
        )
        for layer in decoder.modules
    ]
    model.zero_grad(set_to_none=True)
    return scores


def hidden_states(decoder: Decoder, windows: Windows) -> list[Tensor]:
    """Before the first layer and behind each, in the model's own forward; `output_hidden_states` has a norm over the last."""
    seen: list[Tensor] = []

    def before(_, args, kwargs):
        seen.append(args[0] if args else kwargs["hidden_states"])

    def behind(_, __, output):
        seen.append(output[0] if isinstance(output, tuple) else output)

    layers = decoder.modules
    handles = [layers[0].register_forward_pre_hook(before, with_kwargs=True)]
    handles += [layer.register_forward_hook(behind) for layer in layers]
    conformance.logits(decoder.model, windows)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_magnitude_is_the_sum_of_all_absolute_weights_but_biases(name, decoder):
    expected = [
        sum(weight.double().abs().sum().item() for weight in counted(layer).values()) for layer in decoder.modules
    ]
    assert importance.magnitudes(decoder) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["llama"])
@pytest.mark.parametrize("score", ["magnitude", "taylor"])
def test_norms_count_and_biases_do_not(name, decoder, score):
    def scores() -> list[float]:
        return importance.magnitudes(decoder) if score == "magnitude" else taylor(decoder, tiny.windows(2))

    layers = decoder.modules
    with torch.no_grad():
        layers[5].mlp.down_proj.bias.zero_()
    before = scores()
    with torch.no_grad():  # a large constant in one bias changes no magnitude
        layers[2].mlp.down_proj.bias.add_(3)
        if score == "magnitude":
            assert scores() == before
        layers[2].mlp.down_proj.bias.sub_(3)
        layers[3].input_layernorm.weight.mul_(-2)
    assert scores()[3] != pytest.approx(before[3], rel=1e-3)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_taylor_is_weight_times_gradient_of_the_mean_loss_of_each_window_summed_over_windows(name, decoder, padded):
    windows = tiny.windows(4, padded=padded)
    expected = naive_taylor(decoder, windows)
    assert taylor(decoder, windows) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_taylor_of_a_mixture_counts_the_router_and_every_expert(name, decoder):
    windows = tiny.windows(2, length=12)
    expected = naive_taylor(decoder, windows)
    assert taylor(decoder, windows) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", ["llama"])
def test_each_window_counts_alike_in_taylor_however_little_of_it_is_text(name, decoder):
    """Mean loss of each window, not the mean over all tokens."""
    windows = tiny.windows(2)
    windows.mask[1, 4:] = False
    windows.tokens[1, 4:] = tiny.PAD
    cut_short = Windows.from_tokens(windows.tokens[1:, :4])
    of_both = taylor(decoder, windows)
    with torch.enable_grad():
        for one in (Windows.from_tokens(windows.tokens[:1]), cut_short):
            decoder.model(input_ids=one.tokens, labels=one.tokens, use_cache=False).loss.backward()
    expected = [
        sum((weight * weight.grad).abs().sum().item() for weight in counted(layer).values())
        for layer in decoder.modules
    ]
    assert of_both == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", ["llama", "opt", "mixtral"])
def test_taylor_leaves_nothing_behind(name, decoder):
    model = decoder.model
    for position, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(position % 3 != 0)
    asking = [parameter.requires_grad for parameter in model.parameters()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = taylor(decoder, tiny.windows(2))
    assert [parameter.requires_grad for parameter in model.parameters()] == asking
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model.requires_grad_(True)
    assert taylor(decoder, tiny.windows(2)) == found


@pytest.mark.parametrize("name", ["llama"])
def test_taylor_can_be_taken_where_gradients_are_switched_off(name, decoder):
    expected = taylor(decoder, tiny.windows(2))
    with torch.no_grad():
        assert taylor(decoder, tiny.windows(2)) == expected


@pytest.mark.parametrize("name", ["llama"])
def test_a_failed_taylor_still_gives_the_parameters_their_flags_back(name, decoder):
    def fail(*_):
        raise RuntimeError("stop")

    decoder.model.model.norm.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        taylor(decoder, tiny.windows(2))
    assert all(parameter.requires_grad for parameter in decoder.model.parameters())


# Distances


def rows(hidden: Tensor, windows: Windows) -> list[list[Tensor]]:
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
def test_distances_are_those_between_the_models_hidden_states(name, decoder, span, padded):
    windows = tiny.windows(5, padded=padded)
    states = [rows(hidden, windows) for hidden in hidden_states(decoder, windows)]
    away, turned = [], []
    for before, behind in zip(states, states[span:], strict=False):
        pairs = [pair for window in zip(before, behind, strict=True) for pair in zip(*window, strict=True)]
        away.append(sum(1 - cosine(*pair) for pair in pairs) / len(pairs))
        lasts = [cosine(first[-1], second[-1]) for first, second in zip(before, behind, strict=True)]
        turned.append(sum(math.acos(last) / math.pi for last in lasts) / len(lasts))
    assert len(away) == tiny.LAYERS - span + 1
    assert distances(decoder, windows, span, angular=False) == pytest.approx(away, rel=1e-4)
    assert distances(decoder, windows, span, angular=True) == pytest.approx(turned, rel=1e-4)


@pytest.mark.parametrize("name", ["llama"])
@pytest.mark.parametrize("angular", [False, True], ids=["cosine", "angular"])
def test_layers_that_hand_on_what_they_are_given_turn_nothing(name, decoder, angular):
    with torch.no_grad():
        for index in (2, 3):
            layer = decoder.modules[index]
            for part in (layer.self_attn.o_proj, layer.mlp.down_proj):
                part.weight.zero_()
                part.bias.zero_()
    found = distances(decoder, tiny.windows(3), 2, angular=angular)
    assert found[2] == pytest.approx(0, abs=1e-6)
    assert min(found[:2] + found[3:]) > 0.01


@pytest.mark.parametrize("name", ["gemma3"])
@pytest.mark.parametrize("angular", [False, True], ids=["cosine", "angular"])
def test_distances_do_not_depend_on_how_windows_are_batched(name, decoder, angular, monkeypatch):
    windows = tiny.windows(5, padded=True)
    together = distances(decoder, windows, 2, angular=angular)
    monkeypatch.setattr("optimum_prune.calibration.stream.TOKENS_PER_BATCH", 2 * windows.tokens.shape[1])
    apart = distances(decoder, windows, 2, angular=angular)
    assert apart == pytest.approx(together, rel=1e-5)

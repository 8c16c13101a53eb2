"""The hidden size: features or directions in which nothing happens leave without a trace, and what is refitted is nearer than what is not."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from torch.testing import assert_close

from optimum_prune import Cuts, Decoder
from optimum_prune.anatomy.norms import gain, neutral, scaled
from optimum_prune.builtin.prune.hidden import HiddenPruner
from optimum_prune.errors import RecipeError
from optimum_prune.testing import check_pass, cut, pruned
from optimum_prune.testing.models import logits

WITHOUT = ("gpt2", "gpt2-wide", "gpt_neox", "gpt_neox-sequential", "opt", "opt-post-norm")
WITH = tuple(name for name in tiny.FAMILIES if name not in WITHOUT)
TURNED = ("llama", "mistral", "qwen3", "phi3", "mixtral", "qwen3_moe", "deepseek_v3")
"""Families without norms behind blocks, and whose tiny models have an output head of its own."""
SIZE, DEAD = 24, (1, 4, 5, 11, 17, 20, 28, 31)
ALIVE = tuple(index for index in range(32) if index not in DEAD)


def without_dead_features(decoder: Decoder) -> Decoder:
    """Lets nothing be written into some features of the hidden states."""
    axis = decoder.hidden()
    assert axis is not None
    for member in axis.members:
        value = decoder.model.get_parameter(member.path).data
        module = decoder.model.get_submodule(member.path.rpartition(".")[0])
        if value.ndim == 1 or module is decoder.model.get_output_embeddings():
            if value.ndim == 1 and member.path.endswith("bias"):
                value[list(DEAD)] = 0
            continue
        writes = isinstance(module, torch.nn.Embedding) or member.dim < value.ndim - 1
        if writes:
            value.index_fill_(member.dim, torch.tensor(DEAD), 0)
    return decoder


def turned(decoder: Decoder) -> Decoder:
    """The same model with its hidden states rotated: norms' weights are folded into what reads behind them."""
    torch.manual_seed(5)
    rotation = torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64)).Q
    axis, model = decoder.hidden(), decoder.model
    norms = {"input_layernorm": "self_attn", "post_attention_layernorm": "mlp"}
    for member in axis.members:
        value, (path, _, _) = model.get_parameter(member.path).data, member.path.rpartition(".")
        if value.ndim == 1:
            continue
        new = value.double()
        if member.dim == value.ndim - 1 and not isinstance(model.get_submodule(path), torch.nn.Embedding):
            behind = next((norm for norm, block in norms.items() if f".{block}." in f".{path}."), None)
            layer = ".".join(path.split(".")[:3])
            norm = model.get_submodule(f"{layer}.{behind}" if behind else "model.norm")
            new = new * gain(norm).double()
        value.copy_(((new.movedim(member.dim, -1)) @ rotation).movedim(-1, member.dim))
    for member in axis.members:
        value = model.get_parameter(member.path).data
        module = model.get_submodule(member.path.rpartition(".")[0])
        if value.ndim == 1 and isinstance(module, torch.nn.Linear):
            value.copy_(value.double() @ rotation)
        elif value.ndim == 1:
            value.copy_(neutral(module, len(value)))
    return decoder


@pytest.mark.parametrize("name", [name for name in WITH if not name.startswith("cohere")])
@pytest.mark.parametrize("refit", [True, False])
def test_features_into_which_nothing_is_written_leave_without_a_trace(name, decoder, refit, plugins):
    """Norms divide by the mean over fewer features then, and are rescaled."""
    windows = tiny.windows(6, padded=True)
    without_dead_features(decoder)
    before = logits(decoder.model, windows)
    pruned(HiddenPruner(size=SIZE, keep="energy", refit=refit, damping=1e-6), decoder, windows, plugins)
    assert decoder.config.hidden_size == SIZE
    assert_close(logits(decoder.model, windows)[windows.mask], before[windows.mask], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", TURNED)
def test_a_rotation_changes_nothing_of_what_a_model_computes(name, decoder):
    windows = tiny.windows(2)
    before = logits(decoder.model, windows)
    assert_close(logits(turned(decoder).model, windows), before, rtol=5e-4, atol=5e-4)


@pytest.mark.parametrize("name", TURNED)
def test_directions_in_which_nothing_varies_leave_without_a_trace(name, decoder, plugins):
    windows = tiny.windows(6)
    turned(without_dead_features(decoder))
    before, energy = logits(decoder.model, windows), copy.deepcopy(decoder)
    pruned(HiddenPruner(size=SIZE, keep="directions", damping=1e-6), decoder, windows, plugins)
    assert_close(logits(decoder.model, windows), before, rtol=5e-3, atol=5e-3)
    pruned(HiddenPruner(size=SIZE, keep="energy", damping=1e-6), energy, windows, plugins)
    assert (logits(energy.model, windows) - before).abs().max() > 0.05


@pytest.mark.parametrize("name", WITH)
def test_it_leaves_what_it_foresees_decides_the_same_and_reloads(name, decoder, tmp_path):
    check_pass(HiddenPruner(ratio=0.25), decoder.model, tmp_path)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_directions_reload_too(name, decoder, tmp_path):
    check_pass(HiddenPruner(params=0.8, keep="directions"), decoder.model, tmp_path)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "gemma3", "cohere", "mixtral"])
def test_what_is_refitted_is_nearer_and_what_was_chosen_by_position_is_farther(name, decoder, plugins):
    windows = tiny.windows(60)
    before = logits(decoder.model, windows).log_softmax(-1)
    lost = {}
    for refit in (True, False):
        smaller = copy.deepcopy(decoder)
        pruned(HiddenPruner(size=24, keep="energy", damping=0.02, refit=refit), smaller, windows, plugins)
        lost[refit] = (before - logits(smaller.model, windows).log_softmax(-1)).square().mean().item()
    first = copy.deepcopy(decoder)
    cut(first, Cuts.along("hidden", {None: tuple(range(24))}))
    raw = (before - logits(first.model, windows).log_softmax(-1)).square().mean().item()
    assert lost[True] < 0.97 * lost[False]
    assert lost[True] < raw


@pytest.mark.parametrize("name", ["llama-tied", "qwen2"])
def test_tied_embeddings_stay_tied(name, decoder, plugins):
    pruned(HiddenPruner(size=SIZE), decoder, tiny.windows(4), plugins)
    assert decoder.model.get_input_embeddings().weight is decoder.model.get_output_embeddings().weight


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_norms_are_scaled_by_what_they_multiply_by(name, decoder):
    norm = decoder.layers[0].part("input_layernorm")
    before = gain(norm)
    norm.weight.data.copy_(scaled(norm, 1.5))
    assert_close(gain(norm), 1.5 * before)
    norm.weight.data.copy_(neutral(norm, 32))
    assert_close(gain(norm), torch.ones(32))


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        ("llama", {"size": 32}, "has size 32, and there are 32 features of hidden states. Ask for fewer"),
        ("llama", {"size": 21}, "The nearest that it can say: 20 and 24"),
        ("gpt2", {"ratio": 0.5}, "cannot say another size"),
    ],
)
def test_what_a_model_cannot_give_is_refused(name, decoder, options, why):
    with pytest.raises(RecipeError, match=why):
        HiddenPruner(**options).foresee(decoder.shape())


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("llama-tied", "embeddings are its output head too"),
        ("cohere", "embeddings are its output head too"),
        ("glm4", "cannot be rotated"),
    ],
)
def test_a_model_that_cannot_be_rotated_is_refused(name, decoder, why, plugins):
    with pytest.raises(RecipeError, match=why):
        pruned(HiddenPruner(size=SIZE, keep="directions"), decoder, tiny.windows(3), plugins)


@pytest.mark.parametrize("options", [{}, {"size": 8, "ratio": 0.5}, {"ratio": 0.0}, {"size": 0}])
def test_options_that_cannot_be_are_refused(options):
    with pytest.raises(RecipeError, match="hidden"):
        HiddenPruner(**options)

"""The check of a family accepts those that are right, and no others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch

from optimum_prune import Decoder, Heads, OptimumPruneError
from optimum_prune import testing as conformance
from optimum_prune.anatomy.family import FeedForward
from optimum_prune.hooks.plugins import load
from optimum_prune.testing import families

FAMILIES = load().families


def family_of(name):
    return Decoder.of(tiny.model(name), FAMILIES).family


@pytest.mark.parametrize(
    "name",
    [
        "llama-tied",
        "gemma3-vision",
        "phi3",
        "cohere2",
        "gpt2",
        "gpt_neox",
        "opt",
        "mixtral",
        "qwen3_moe",
        "deepseek_v3",
    ],
)
def test_families_that_are_right_pass_and_their_models_stay_as_they_are(name, decoder, tmp_path):
    before = {path: value.clone() for path, value in decoder.model.named_parameters()}
    conformance.check_family(decoder.model, decoder.family, tmp_path)
    assert all(torch.equal(value, before[path]) for path, value in decoder.model.named_parameters())


LLAMA, QWEN2, PHI3, COHERE = map(family_of, ("llama", "qwen2", "phi3", "cohere"))
GPT2, QWEN3_MOE, DEEPSEEK = map(family_of, ("gpt2", "qwen3_moe", "deepseek_v3"))
PLANTED = {
    "layers are elsewhere": ("llama", replace(LLAMA, layers="model.blocks")),
    "attention is elsewhere": ("llama", replace(LLAMA, attention="attn")),
    "another attention": ("llama", replace(LLAMA, attention="self_attn.q_proj")),
    "another output": ("llama", replace(LLAMA, attention_output="mlp.down_proj")),
    "another FFN": ("llama", replace(LLAMA, feed_forward=FeedForward(module="mlp.up_proj"))),
    "an input is missing": ("llama", replace(LLAMA, feed_forward=FeedForward(inputs=("mlp.gate_proj",)))),
    "an output that is an input": ("llama", replace(LLAMA, feed_forward=FeedForward(output="mlp.up_proj"))),
    "another field of the width": ("llama", replace(LLAMA, feed_forward=FeedForward(width="vocab_size"))),
    "another field of the heads": ("llama", replace(LLAMA, heads=Heads(query_heads="num_hidden_layers"))),
    "values without keys": (
        "llama",
        replace(LLAMA, heads=Heads({"self_attn.q_proj": ("query",), "self_attn.v_proj": ("value",)})),
    ),
    "half of a fused input": ("phi3", replace(PHI3, feed_forward=FeedForward(inputs=("mlp.gate_up_proj",)))),
    "roles in another order": ("phi3", replace(PHI3, heads=Heads({"self_attn.qkv_proj": ("key", "value", "query")}))),
    "norms of heads are missing": ("cohere", replace(COHERE, heads=Heads(norms={}))),
    "heads that the config cannot say": (
        "gpt2",
        replace(GPT2, heads=Heads({"attn.c_attn": ("query", "key", "value")}, "n_head", "n_head")),
    ),
    "lists by layer are missing": ("qwen2", replace(QWEN2, per_layer=())),
    "a threshold is missing": ("deepseek_v3", replace(DEEPSEEK, thresholds=())),
    "a stride is missing": ("qwen3_moe", replace(QWEN3_MOE, strides={})),
    "experts are not said to be there": ("qwen3_moe", replace(QWEN3_MOE, experts=None)),
    "shared experts are missing": ("deepseek_v3", replace(DEEPSEEK, experts=replace(DEEPSEEK.experts, shared=None))),
    "another router": ("qwen3_moe", replace(QWEN3_MOE, experts=replace(QWEN3_MOE.experts, router="mlp.experts"))),
    "another count of experts": (
        "qwen3_moe",
        replace(QWEN3_MOE, experts=replace(QWEN3_MOE.experts, count="num_experts_per_tok")),
    ),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_family_with_a_fault_does_not_pass(fault, tmp_path):
    name, wrong = PLANTED[fault]
    with pytest.raises((AssertionError, OptimumPruneError)):
        conformance.check_family(tiny.model(name), wrong, tmp_path)


def test_parameters_that_are_counted_twice_are_noticed(tmp_path, monkeypatch):
    count = Decoder.shape
    monkeypatch.setattr(Decoder, "shape", lambda self: replace(count(self), rest=count(self).layers[0]))
    with pytest.raises(AssertionError, match="By its axes the model has"):
        conformance.check_family(tiny.model("llama"), LLAMA, tmp_path)


def test_a_cut_that_computes_something_else_is_noticed(tmp_path, monkeypatch):
    def cut_others(decoder, cuts):
        moved = {key: tuple(sorted((index + 1) % 64 for index in kept)) for key, kept in cuts.units.items()}
        conformance.cut(decoder, replace(cuts, units={key: moved[key] for key in moved}))

    monkeypatch.setattr(families, "cut", cut_others)
    only_channels = replace(LLAMA, heads=None)
    with pytest.raises(AssertionError, match="not close"):
        conformance.check_family(tiny.model("llama"), only_channels, tmp_path)

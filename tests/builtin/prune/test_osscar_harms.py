"""OSSCAR on models and windows with which little or nothing can be computed."""

from __future__ import annotations

import pytest
import tiny
import torch

from optimum_prune import Osscar, compress
from optimum_prune import testing as conformance
from optimum_prune.errors import NumericalError, OptimumPruneError
from optimum_prune.plan.source import ModelSource
from optimum_prune.recipe import Recipe
from optimum_prune.text.windows import Texts


@pytest.mark.parametrize("name", ["llama"])
def test_weights_that_are_not_finite_are_named_as_the_cause(name, decoder, plugins):
    with torch.no_grad():
        decoder.modules[2].mlp.up_proj.weight[3, 3] = torch.nan
    with pytest.raises(NumericalError, match=r"layer 2 .*not finite"):
        conformance.pruned(Osscar(ratio=0.25), decoder, tiny.windows(), plugins)


LAYER_2 = r"layer 2 |\.(layers|h)\.2\."


def break_at(model: torch.nn.Module, path: str, value: float) -> None:
    with torch.no_grad():
        model.get_parameter(path).view(-1)[3] = value


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
def test_weights_that_are_not_finite_are_traced_to_their_layer(name, decoder, path, what, value, options, plugins):
    if name in tiny.WITHOUT_HEADS and "head_ratio" in options:
        options = {"ratio": 0.25}
    if path.endswith("mlp.gate.weight") and value == torch.inf:
        pytest.skip("scores of a sigmoid are finite nonetheless")
    break_at(decoder.model, path, value)
    with pytest.raises(OptimumPruneError, match=what):
        conformance.pruned(Osscar(**options), decoder, tiny.windows(), plugins)


@pytest.mark.parametrize("name", ["llama"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=["nan", "inf"])
def test_embeddings_that_are_not_finite_are_named(name, decoder, value, plugins):
    with torch.no_grad():
        decoder.model.get_input_embeddings().weight.fill_(value)
    with pytest.raises(NumericalError, match="embeddings"):
        conformance.pruned(Osscar(ratio=0.5), decoder, tiny.windows(), plugins)


@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize("scale", [1e12, 1e20, 1e30], ids=str)
def test_activations_too_large_to_square_are_an_error_that_names_the_layer_or_are_solved(
    name, decoder, scale, plugins
):
    with torch.no_grad():
        for path in decoder.family.feed_forward.inputs[-1:]:
            decoder.family.linear(decoder.modules[2], path).weight[3] *= scale
        decoder.family.linear(decoder.modules[2], decoder.family.feed_forward.output).weight[:, 3] /= scale
    try:
        conformance.pruned(Osscar(ratio=0.5), decoder, tiny.windows(), plugins)
    except NumericalError as error:
        assert "layer 2" in str(error)  # noqa: PT017 - either is right
    assert all(parameter.isfinite().all() for parameter in decoder.model.parameters())


@pytest.mark.parametrize("name", ["llama", "gpt2", "deepseek_v3"])
def test_a_layer_of_zeros_is_pruned_like_any_other(name, decoder, plugins, tmp_path):
    with torch.no_grad():
        for parameter in decoder.modules[3].parameters():
            parameter.zero_()
    options = {} if name in tiny.WITHOUT_HEADS else {"head_ratio": 0.5}
    conformance.pruned(Osscar(ratio=0.5, **options), decoder, tiny.windows(), plugins)
    assert conformance.logits(decoder.model, tiny.windows(3)).isfinite().all()
    conformance.reloads_exactly(decoder.model, tmp_path, tiny.windows(3))


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "opt", "qwen3_moe", "deepseek_v3"])
def test_a_window_of_two_tokens_is_enough(name, decoder, plugins, tmp_path):
    options = {} if name in tiny.WITHOUT_HEADS else {"head_ratio": 0.5}
    conformance.pruned(Osscar(ratio=0.5, **options), decoder, tiny.windows(1, 2), plugins)
    assert conformance.logits(decoder.model, tiny.windows(3)).isfinite().all()
    conformance.reloads_exactly(decoder.model, tmp_path, tiny.windows(3))


@pytest.mark.parametrize("name", ["llama"])
def test_nothing_is_written_of_a_model_that_cannot_be_computed_with(name, decoder, tmp_path):
    model = decoder.model
    break_at(model, "model.layers.4.self_attn.o_proj.weight", torch.nan)
    whole = ModelSource("broken", None, model.config, None, lambda _: model)
    with pytest.raises(OptimumPruneError, match="layer 4"):
        compress(
            Recipe(passes=(Osscar(head_ratio=0.5),)),
            tmp_path / "out",
            source=whole,
            texts=Texts(tiny.windows(), None),
        )
    assert not list(tmp_path.iterdir())

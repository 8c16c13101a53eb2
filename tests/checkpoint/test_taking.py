"""Models in memory, as a caller may hand them over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertForMaskedLM, LlamaForSequenceClassification, LlamaModel

from optimum_prune import Depth, Progress, Recipe, Settings, compress
from optimum_prune.checkpoint.quiet import in_float32
from optimum_prune.checkpoint.taking import taken
from optimum_prune.errors import CheckpointError, NumericalError
from optimum_prune.plan.source import ModelSource
from optimum_prune.text.windows import Texts

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # by torch.compile
UP = "model.layers.0.mlp.up_proj.weight"


def llama():
    return tiny.model("llama")


def pruned(model, out: Path):
    """The output folder of a model in memory."""
    texts = Texts(tiny.windows(3, 16), tiny.windows(2, 16, seed=1))
    recipe = Recipe(passes=(Depth(drop=(1,)),), settings=Settings(device="cpu"))
    compress(recipe, out, source=ModelSource.of_model(model, None), texts=texts)
    return out


class Adapted(nn.Module):
    """Wraps a model as peft does, which need not be installed."""

    def __init__(self, model):
        super().__init__()
        self.base_model = model
        self.peft_config = {"default": object()}

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_model"), name)


def wrapped_in_an_adapter():
    return Adapted(llama())


def with_an_adapter_inside():
    model = llama()
    model.model.layers[2].mlp.up_proj.lora_A = nn.Linear(32, 2)
    return model


def with_weight(value):
    model = llama()
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(value, requires_grad=False)
    return model


def of_int8():
    return with_weight(torch.zeros(64, 32, dtype=torch.int8))


def of_float8():
    return with_weight(torch.zeros(64, 32).to(torch.float8_e4m3fn))


class Packed(torch.Tensor):
    """A tensor as libraries make them for weights of their own."""


def of_a_class_of_tensors():
    return with_weight(torch.zeros(64, 32).as_subclass(Packed))


def with_a_quantization_config():
    model = llama()
    model.config.quantization_config = {"quant_method": "fancy"}
    return model


def compiled_in_place():
    model = llama()
    model.compile()
    return model


def compiled_in_a_layer():
    model = llama()
    model.model.layers[1] = torch.compile(model.model.layers[1])
    return model


def compiled_forward():
    model = llama()
    model.forward = torch.compile(model.forward)
    return model


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (wrapped_in_an_adapter, "merge_and_unload"),
        (with_an_adapter_inside, "merge_and_unload"),
        (of_int8, f"quantized: its weights, such as '{UP}'.*Load it unquantized"),
        (of_float8, f"quantized: its weights, such as '{UP}'.*Load it unquantized"),
        (of_a_class_of_tensors, f"'{UP}', are no plain tensors but of the class Packed"),
        (with_a_quantization_config, "Load it unquantized"),
        (compiled_in_place, "Prune it first, and compile"),
        (compiled_in_a_layer, "compiled at model.layers.1.*Prune it first, and compile"),
        (compiled_forward, "Prune it first, and compile"),
        (lambda: LlamaModel(llama().config), "Load it with AutoModelForCausalLM"),
        (lambda: LlamaForSequenceClassification(llama().config), "Load it with AutoModelForCausalLM"),
        (
            lambda: BertForMaskedLM(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)),
            "predicts no tokens",
        ),
        (lambda: nn.Linear(2, 2), "which is no model of transformers"),
        (lambda: None, "which is no model of transformers"),
    ],
)
def test_what_cannot_be_pruned_as_it_is_is_refused_with_the_remedy(make, remedy):
    with pytest.raises(CheckpointError, match=remedy) as caught:
        taken(make())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, lambda model: torch.compile(nn.DataParallel(model))])
def test_what_is_wrapped_around_a_model_is_taken_off(wrap):
    model = llama()
    assert taken(wrap(model)) is model


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_model_of_a_family_is_taken_as_it_is(family):
    model = tiny.model(family)
    said = model.config.to_json_string()
    assert ModelSource.of_model(model, None).load(None) is model
    assert model.config.to_json_string() == said


def test_what_cannot_be_saved_is_found_before_anything_is_done():
    model = llama()
    model.config.remarks = {"a set"}
    with pytest.raises(CheckpointError, match=r"The config of .* cannot be saved and read again"):
        ModelSource.of_model(model, None)


def test_a_weight_that_is_not_finite_is_named():
    model = llama()
    model.model.embed_tokens.weight.data[-1, 3] = float("inf")
    with pytest.raises(NumericalError, match=r"'model\.embed_tokens\.weight'"):
        ModelSource.of_model(model, None).load(None)


@pytest.mark.parametrize("tied", [True, False])
def test_the_config_says_of_the_head_what_it_is(tied, tmp_path):
    model = tiny.model("llama" if tied else "llama-tied")
    model.lm_head.weight = model.model.embed_tokens.weight if tied else nn.Parameter(torch.randn(tiny.VOCABULARY, 32))
    out = pruned(model, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is tied
    assert ("lm_head.weight" in load_file(out / "model.safetensors")) is not tied


def test_a_model_without_a_generation_config_or_with_one_that_is_not_valid_is_saved_with_a_valid_one(tmp_path):
    for number, change in enumerate(({"temperature": 0.5, "do_sample": False}, None)):
        model = llama()
        if change is None:
            model.generation_config = None
        else:
            model.generation_config.update(**change)
        out = pruned(model, tmp_path / f"out-{number}")
        assert "temperature" not in json.loads((out / "generation_config.json").read_text())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_moe"])
def test_a_default_dtype_of_the_process_changes_nothing_of_a_model_that_is_loaded(family, dtype, checkpoints):
    from optimum_prune.checkpoint import loading, opening

    def loaded():
        return loading.load(opening.open_checkpoint(str(checkpoints(family))), "auto", "cpu", Progress())

    expected = loaded()
    torch.set_default_dtype(dtype)
    try:
        found = loaded()
        assert torch.get_default_dtype() is dtype
        with in_float32():
            assert torch.get_default_dtype() is torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    for (name, value), (_, other) in zip(
        [*expected.named_parameters(), *expected.named_buffers()],
        [*found.named_parameters(), *found.named_buffers()],
        strict=True,
    ):
        assert value.dtype is other.dtype, name
        assert torch.equal(value, other), name

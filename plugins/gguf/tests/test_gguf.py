"""The pass `gguf`: what llama.cpp computes from its files is what torch computes, with the same tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from optimum_prune_gguf import Gguf
from optimum_prune_gguf.form import FORMS, LIKE_LLAMA
from transformers import AutoTokenizer

from optimum_prune import Cuts, Decision, Progress, load_model
from optimum_prune.anatomy.decoder import Decoder
from optimum_prune.checkpoint import saving
from optimum_prune.errors import RecipeError, VerificationError
from optimum_prune.options import build
from optimum_prune.report.serving import ENGINES
from optimum_prune.surgery import config, operation

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:llama_cpp.*")

EXACT = 2e-3
"""llama.cpp keeps its cache in half precision."""


def edit(folder: Path, **changes) -> Path:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for name in ("rope_theta", "rope_scaling"):
        config.pop(name, None)
    file.write_text(json.dumps({**config, **changes}))
    return folder


def with_rope(folder: Path, **rope) -> Path:
    tiny.save("llama", folder)
    return edit(folder, rope_parameters={"rope_theta": 500.0, **rope})


# What is computed


@pytest.mark.parametrize("family", ["llama", "llama-tied", "mistral", "phi3", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_llama_cpp_computes_what_torch_computes(family, tmp_path, convert):
    source = tiny.save(family, tmp_path / "source")
    if family in ("mistral", "qwen2", "qwen3"):
        edit(source, sliding_window=64)
    _, conversion = convert(Gguf(outtype="f32"), source)
    assert conversion.comparison.difference < EXACT
    assert conversion.comparison.with_cache < 0.01


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_attention_of_gemma_is_scaled_as_its_config_says(family, tmp_path, convert):
    source = edit(tiny.save(family, tmp_path / "source"), query_pre_attn_scalar=32)
    assert convert(Gguf(outtype="f32"), source)[1].comparison.difference < EXACT


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_scaled_rotary_embeddings(rope, tmp_path, convert):
    source = with_rope(tmp_path / "source", **rope)
    assert convert(Gguf(outtype="f32"), source)[1].comparison.difference < EXACT


def test_a_sliding_window_that_llama_cpp_lacks_bounds_the_context(tmp_path, convert):
    source = tiny.save("mistral", tmp_path / "source")  # its window is 6
    with pytest.raises(VerificationError, match="6 tokens at most"):
        convert(Gguf(outtype="f32"), source)


def test_windows_of_any_number_and_length(small, convert):
    folder, _ = convert(Gguf(outtype="f32"), small)
    runtime, torchs = Gguf(outtype="f32").open(folder, "cpu"), load_model(small)
    for count, length in ((1, 1), (3, 17), (2, 100)):
        tokens = tiny.windows(count, length).tokens
        with torch.no_grad():
            expected = torchs(tokens).logits
        assert (runtime.logits(tokens) - expected).std() < EXACT * expected.std()


# Layers that differ


def test_heterogeneous_layers(heterogeneous, convert):
    _, conversion = convert(Gguf(outtype="f32"), heterogeneous)
    assert conversion.evidence["architecture"] == "deci"
    assert conversion.comparison.difference < EXACT


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_a_first_layer_without_attention_a_last_without_ffn_and_fewer_heads(family, tmp_path, plugins, convert):
    model = tiny.model(family)
    model.config.sliding_window, model.config.layer_types = None, ["full_attention"] * tiny.LAYERS
    decoder = Decoder.of(model, plugins.families)
    units = {(1, "heads"): (0,), (0, "channels"): tuple(range(40))}
    cuts = Cuts(blocks={0: ("feed_forward",), 5: ("attention",)}, units=units)
    operation.carry_out(decoder, Decision(cuts))
    config.sync_config(decoder)
    saving.save(model, tiny.tokenizer(), tmp_path / "source", Progress())
    edit(tmp_path / "source")
    _, conversion = convert(Gguf(outtype="f32"), tmp_path / "source")
    assert conversion.evidence["architecture"] == "deci"
    assert conversion.comparison.difference < EXACT


@pytest.mark.parametrize("outtype", ["q8_0", "q4_k_m"])
def test_heterogeneous_layers_quantized(outtype, heterogeneous, convert):
    assert convert(Gguf(outtype=outtype), heterogeneous)[1].comparison.difference < 0.6


# Types


@pytest.mark.parametrize(("outtype", "difference"), [("f16", 0.01), ("bf16", 0.03), ("q8_0", 0.05), ("q6_k", 0.1)])
def test_finer_types(outtype, difference, small, convert):
    assert convert(Gguf(outtype=outtype), small)[1].comparison.difference < difference


@pytest.mark.parametrize("outtype", ["q5_k_m", "q5_0", "q4_k_m", "q4_k_s", "q4_0"])
def test_coarser_types(outtype, small, convert):
    folder, conversion = convert(Gguf(outtype=outtype), small)
    assert conversion.comparison.difference < 0.4
    assert [file.name for file in folder.glob("*.gguf")] == [f"model-{outtype}.gguf"]


def test_what_f16_cannot_hold_is_refused(tmp_path, convert):
    model = tiny.model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = 1e5
    saving.save(model, tiny.tokenizer(), tmp_path / "source", Progress())
    with pytest.raises(RecipeError, match="bf16"):
        convert(Gguf(outtype="f16"), tmp_path / "source")


# What lies in the folder


def test_the_folder_has_a_tokenizer_and_an_example_that_runs(small, convert, run_example):
    folder, _ = convert(Gguf(), small)
    text = tiny.text(30, seed=3)
    assert (
        AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
        == AutoTokenizer.from_pretrained(small)(text)["input_ids"]
    )
    assert run_example(folder, text).startswith(text)


def test_llama_cpp_prints_nothing(small, convert, capfd):
    capfd.readouterr()
    convert(Gguf(outtype="f16"), small)
    printed = capfd.readouterr()
    assert "llama" not in printed.out + printed.err


# What is refused beforehand


@pytest.mark.parametrize("family", ["opt", "gpt2", "mixtral", "gemma3-vision", "glm4"])
def test_architectures_that_cannot_be_written_are_refused(family, tmp_path, spec_of):
    with pytest.raises(RecipeError, match="cannot write; it writes llama"):
        Gguf().check(spec_of(tiny.save(family, tmp_path)))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        (
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0] * 4,
                    "long_factor": [2.0] * 4,
                }
            },
            "longrope",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "part of each head",
        ),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(changes, what, tmp_path, spec_of):
    source = edit(tiny.save("llama", tmp_path), **changes)
    with pytest.raises(RecipeError, match=what):
        Gguf().check(spec_of(source))


def test_heterogeneous_layers_of_other_architectures_are_refused(tmp_path, plugins, spec_of):
    decoder = Decoder.of(tiny.model("qwen3"), plugins.families)
    operation.carry_out(decoder, Decision(Cuts.along("channels", {0: tuple(range(32))})))
    config.sync_config(decoder)
    saving.save(decoder.model, tiny.tokenizer(), tmp_path / "source", Progress())
    with pytest.raises(RecipeError, match="has no form of 'qwen3' for that"):
        Gguf().check(spec_of(tmp_path / "source"))


def test_report_and_card_foretell_which_architectures_can_be_written():
    (engine,) = (each for each in ENGINES if each.name == "llama.cpp")
    assert (engine.of_stock, engine.of_differing) == (set(FORMS), set(LIKE_LLAMA))


def test_an_unknown_type_is_refused():
    with pytest.raises(RecipeError, match="q4_0"):
        build(Gguf, {"outtype": "q4"}, "the recipe")

"""The pass `gguf`: what llama.cpp computes from its files is what torch computes, with the same tokens."""

from __future__ import annotations

import json
from pathlib import Path

import llama_cpp
import pytest
import tiny
import torch
from optimum_prune_gguf import Gguf
from optimum_prune_gguf.vocabulary import find_vocabulary
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from optimum_prune import Cuts, Decision, Progress, checkpoint, load_model, surgery
from optimum_prune.anatomy import find_family
from optimum_prune.errors import RecipeError, VerificationError
from optimum_prune.options import build

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


def test_odd_layers(odd, convert):
    _, conversion = convert(Gguf(outtype="f32"), odd)
    assert conversion.evidence["architecture"] == "deci"
    assert conversion.comparison.difference < EXACT


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_a_first_layer_without_attention_a_last_without_ffn_and_fewer_heads(family, tmp_path, plugins, convert):
    model = tiny.model(family)
    model.config.sliding_window, model.config.layer_types = None, ["full_attention"] * tiny.LAYERS
    found = find_family(model.config, plugins.families)
    cuts = Cuts(blocks={0: ("feed_forward",), 5: ("attention",)}, heads={1: (0,)}, channels={0: tuple(range(40))})
    surgery.carry_out(model, found, Decision(cuts))
    surgery.settle(model, found)
    checkpoint.save(model, tiny.tokenizer(), tmp_path / "source", Progress())
    edit(tmp_path / "source")
    _, conversion = convert(Gguf(outtype="f32"), tmp_path / "source")
    assert conversion.evidence["architecture"] == "deci"
    assert conversion.comparison.difference < EXACT


@pytest.mark.parametrize("outtype", ["q8_0", "q4_k_m"])
def test_odd_layers_quantized(outtype, odd, convert):
    assert convert(Gguf(outtype=outtype), odd)[1].comparison.difference < 0.6


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
    checkpoint.save(model, tiny.tokenizer(), tmp_path / "source", Progress())
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


# Tokens

LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEXT = [
    tiny.text(400),
    "12 345 6789 1000 don't I'M we'll x += 1;\n\n  if (a != b) {\n\treturn;\n}\n" * 20,
    "été naïve 你好 世界 " * 20,
]


def bytewise(split=None, normalizer=None) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None or not isinstance(split, str))
    first = pre_tokenizers.Split(Regex(split), "isolated") if isinstance(split, str) else split
    backend.pre_tokenizer = plain if first is None else pre_tokenizers.Sequence([first, plain])
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    train(backend, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return wrap(backend)


def sentence_piece() -> PreTrainedTokenizerFast:
    """As Llama 2 has it: spaces are letters, and what is unknown falls back on bytes."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    train(backend, initial_alphabet=[chr(code) for code in range(33, 127)] + ["▁"])
    plain = json.loads(backend.to_str())
    vocabulary, merges = plain["model"]["vocab"], [tuple(pair) for pair in plain["model"]["merges"]]
    for byte in range(256):
        vocabulary.setdefault(f"<0x{byte:02X}>", len(vocabulary))
    pieces = [a + b for a, b in merges]  # sentencepiece merges wherever the outcome is a piece
    merges = [
        (word[:i], word[i:]) for word in pieces for i in range(1, len(word)) if {word[:i], word[i:]} <= set(vocabulary)
    ]
    backend.model = models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    backend.pre_tokenizer = None
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return wrap(backend)


def train(backend: Tokenizer, **arguments) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<unk>", "<s>", "</s>", "<|user|>"], show_progress=False, **arguments
    )
    backend.train_from_iterator(TEXT, trainer)


def wrap(backend: Tokenizer) -> PreTrainedTokenizerFast:
    special = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "additional_special_tokens": ["<|user|>"],
    }
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@pytest.mark.parametrize(
    ("tokenizer", "kind"),
    [
        (bytewise, "gpt2"),
        (lambda: bytewise(pre_tokenizers.Digits(individual_digits=True)), "gpt2"),
        (lambda: bytewise(LLAMA_3), "gpt2"),
        (lambda: bytewise(LLAMA_3.replace("{1,3}", "")), "gpt2"),
        (sentence_piece, "llama"),
    ],
    ids=["GPT-2", "SmolLM", "Llama 3", "Qwen 2", "Llama 2"],
)
def test_llama_cpp_finds_the_tokens_of_the_tokenizer(tokenizer, kind, tmp_path, convert):
    found = tokenizer()
    found.chat_template = "{% for m in messages %}<|user|>{{ m['content'] }}</s>{% endfor %}"
    base = tiny.model("llama-tied")
    base.resize_token_embeddings(1400, mean_resizing=False)
    checkpoint.save(base, found, tmp_path / "source", Progress())
    folder, _ = convert(Gguf(outtype="f32"), tmp_path / "source")
    llama = llama_cpp.Llama(str(folder / "model-f32.gguf"), verbose=False)
    assert llama.metadata["tokenizer.ggml.model"] == kind
    assert llama.metadata["tokenizer.chat_template"] == found.chat_template
    text = tiny.text(200, seed=7) + " It's 2025, naïve 世界!\n\n  x = 12345;\t<|user|>hello</s>"
    assert llama.tokenize(text.encode(), add_bos=True, special=True) == found(text)["input_ids"]


@pytest.mark.parametrize(
    "tokenizer",
    [
        lambda: bytewise(normalizer=normalizers.Lowercase()),
        lambda: bytewise(r"\n+"),
        lambda: PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
        ),
    ],
    ids=["normalized", "words not split", "unigram"],
)
def test_a_tokenizer_that_llama_cpp_cannot_have_is_refused(tokenizer):
    with pytest.raises(RecipeError, match="another runtime"):
        find_vocabulary(tokenizer(), 1400, [])


# What is refused beforehand


@pytest.mark.parametrize("family", ["opt", "gpt2", "mixtral", "gemma3-vision", "glm4"])
def test_architectures_that_cannot_be_written_are_refused(family, tmp_path, prospect_of):
    with pytest.raises(RecipeError, match="cannot write; it writes llama"):
        Gguf().check(prospect_of(tiny.save(family, tmp_path)))


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
def test_what_llama_cpp_computes_otherwise_is_refused(changes, what, tmp_path, prospect_of):
    source = edit(tiny.save("llama", tmp_path), **changes)
    with pytest.raises(RecipeError, match=what):
        Gguf().check(prospect_of(source))


def test_odd_layers_of_other_architectures_are_refused(tmp_path, plugins, prospect_of):
    model = tiny.model("qwen3")
    found = find_family(model.config, plugins.families)
    surgery.carry_out(model, found, Decision(Cuts(channels={0: tuple(range(32))})))
    surgery.settle(model, found)
    checkpoint.save(model, tiny.tokenizer(), tmp_path / "source", Progress())
    with pytest.raises(RecipeError, match="has no form of 'qwen3' for that"):
        Gguf().check(prospect_of(tmp_path / "source"))


def test_an_unknown_type_is_refused():
    with pytest.raises(RecipeError, match="q4_0"):
        build(Gguf, {"outtype": "q4"}, "the recipe")

"""llama.cpp finds the tokens in a file that the checkpoint's own tokenizer finds, or the file is refused."""

from __future__ import annotations

import json

import llama_cpp
import pytest
import tiny
from optimum_prune_gguf import Gguf
from optimum_prune_gguf.vocabulary import find_vocabulary
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from optimum_prune import Progress
from optimum_prune.checkpoint import saving
from optimum_prune.errors import RecipeError

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:llama_cpp.*")

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
    saving.save(base, found, tmp_path / "source", Progress())
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

from __future__ import annotations

import pytest
import tiny
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from optimum_prune.text import tokenization


def byte_level():
    return tiny.tokenizer().backend_tokenizer


def of_one_word():
    """As Llama 2: a mark in front of the text and in place of each space, and nothing that would cut the text into words."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("_"), normalizers.Replace(" ", "_")])
    words = [f"_{word}" for word in tiny.text(3000).split()]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False)
    backend.train_from_iterator(words, trainer)
    return backend


def metaspace():
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    backend.train_from_iterator([tiny.text(3000)], trainer)
    return backend


@pytest.fixture(params=[byte_level, of_one_word, metaspace], ids=lambda kind: kind.__name__)
def any_tokenizer(request):
    return PreTrainedTokenizerFast(tokenizer_object=request.param())


@pytest.fixture
def pieces(monkeypatch):
    """Texts are tokenized in pieces of 2,000 characters; how many were is counted."""
    monkeypatch.setattr(tokenization, "PIECE", 2000)
    monkeypatch.setattr(tokenization, "OVERLAP", 600)
    seen, encoded = [], tokenization._encoded

    def counted(text, tokenizer):
        seen.append(len(text))
        return encoded(text, tokenizer)

    monkeypatch.setattr(tokenization, "_encoded", counted)
    return seen


@pytest.mark.parametrize("extra", [0, 1, 599, 600, 601, 1399, 1400, 1401, 20000])
def test_a_text_tokenized_in_pieces_has_the_tokens_of_the_whole(any_tokenizer, pieces, extra):
    text = (tiny.text(12000) + "\n\n  \u00e4\u4f60 ")[-2000 - extra :]
    expected = any_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenization.tokenize(text, any_tokenizer).tolist() == expected
    assert len(pieces) > 1 or not extra
    assert max(pieces) <= 2000


def test_a_text_whose_pieces_never_agree_is_tokenized_whole(pieces, monkeypatch):
    monkeypatch.setattr(tokenization, "OVERLAP", 601)  # so that pairs of one piece lie across those of the next
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0, "aa": 1}, merges=[("a", "a")]))
    )
    text = "a" * 4001
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenization.tokenize(text, tokenizer).tolist() == expected
    assert pieces[-1] == 4001

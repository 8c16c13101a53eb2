from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import tiny
import torch

import optimum_prune.evaluation.losses as losses_module
import optimum_prune.evaluation.perplexity as perplexity_module
from optimum_prune import Progress, TransformersRuntime, Windows
from optimum_prune.errors import NumericalError
from optimum_prune.evaluation.perplexity import Perplexity, perplexity, perplexity_of_runtime


@torch.no_grad()
def independent(model, windows):
    """By the model's own loss, window by window."""
    total = count = 0
    for tokens, mask in zip(windows.tokens, windows.mask, strict=True):
        labels = tokens.masked_fill(~mask, -100)[None]
        loss = model(input_ids=tokens[None], attention_mask=mask.long()[None], labels=labels).loss
        predicted = int((labels[:, 1:] != -100).sum())
        total, count = total + loss.item() * predicted, count + predicted
    return math.exp(total / count), count


@pytest.mark.parametrize("name", tiny.FAMILIES)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_perplexity_is_what_the_models_own_loss_says(name, padded):
    model, windows = tiny.model(name), tiny.windows(7, padded=padded)
    expected, count = independent(model, windows)
    found = perplexity(model, windows, Progress())
    assert found.value == pytest.approx(expected, rel=1e-5)
    assert found.tokens == count


def test_perplexity_does_not_depend_on_batches_and_chunks(monkeypatch):
    model, windows = tiny.model("gemma3"), tiny.windows(7, padded=True)
    expected = perplexity(model, windows, Progress()).value
    monkeypatch.setattr(perplexity_module, "TOKENS_PER_BATCH", 2 * windows.tokens.shape[1])
    monkeypatch.setattr(losses_module, "LOGITS_PER_CHUNK", 5 * tiny.VOCABULARY)
    assert perplexity(model, windows, Progress()).value == pytest.approx(expected, rel=1e-6)


def test_a_model_that_knows_nothing_is_as_perplexed_as_its_vocabulary_is_large():
    model = tiny.model("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert perplexity(model, tiny.windows(3), Progress()).value == pytest.approx(tiny.VOCABULARY, rel=1e-5)


def test_a_perplexity_carries_its_protocol():
    windows = Windows.from_tokens(tiny.windows(3).tokens, "a text", bos=True)
    found = perplexity(tiny.model("llama").to(torch.bfloat16), windows, Progress())
    assert found.protocol() == {
        "text": "a text",
        "windows": 3,
        "length": 24,
        "tokens": 69,
        "bos": True,
        "dtype": "bfloat16",
    }
    assert found.tokens_per_second > 0
    assert found.describe() == (
        "a text: 3 windows of 24 tokens, with a beginning-of-sequence token, mean over 69 predicted tokens, bfloat16"
    )


@pytest.mark.parametrize("value", [12.5, math.inf])
def test_a_perplexity_goes_through_json_and_back(value):
    found = replace(perplexity(tiny.model("llama"), tiny.windows(2), Progress()), value=value)
    assert Perplexity.from_plain(json.loads(json.dumps(found.to_plain()))) == found
    in_json = {name: None if figure == math.inf else figure for name, figure in found.to_plain().items()}
    assert Perplexity.from_plain(json.loads(json.dumps(in_json, allow_nan=False))) == found


def test_a_runtime_has_the_perplexity_of_the_model_in_it():
    model, windows = tiny.model("llama"), tiny.windows(3)
    found = perplexity_of_runtime(TransformersRuntime(model), windows, Progress())
    expected = perplexity(model, windows, Progress())
    assert found.value == pytest.approx(expected.value, rel=1e-6)
    assert found.protocol() == expected.protocol()


def test_a_perplexity_beyond_all_numbers_is_infinite():
    model = tiny.model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    assert perplexity(model, tiny.windows(3), Progress()).value == math.inf


def test_logits_that_are_not_finite_are_an_error():
    model = tiny.model("llama")
    with torch.no_grad():
        model.lm_head.weight[5, 5] = torch.nan
    with pytest.raises(NumericalError, match=r"random tokens is nan.*not finite"):
        perplexity(model, tiny.windows(3), Progress())

from __future__ import annotations

import pytest
import tiny
import torch
from torch.testing import assert_close

from optimum_prune import Windows
from optimum_prune import testing as conformance
from optimum_prune.calibration import own_text as module
from optimum_prune.calibration.own_text import own_text


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "gpt2", "opt", "mixtral", "deepseek_v3"])
def test_a_model_writes_windows_like_those_given(name, decoder):
    given = tiny.windows(6)
    found = own_text(decoder, given, 3)
    assert found.tokens.shape == (3, given.length)
    assert found.mask.all()
    assert found.tokens.dtype == torch.int64
    assert torch.equal(own_text(decoder, given, 3).tokens, found.tokens)
    other = Windows.from_tokens(given.tokens.flip(0))
    assert not torch.equal(own_text(decoder, other, 3).tokens, found.tokens)


@pytest.mark.parametrize("name", ["llama"])
def test_pieces_begin_with_tokens_of_the_given_text_or_as_all_windows_do(name, decoder, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 5)
    given = Windows.from_tokens(torch.randint(40, 60, (4, 12)))
    starts = own_text(decoder, given, 8).tokens[:, [0, 5, 10]]
    assert set(starts.flatten().tolist()) <= set(given.tokens.flatten().tolist())
    assert len(starts.unique()) > 3
    begun = Windows.from_tokens(torch.cat([torch.full((4, 1), tiny.BOS), given.tokens], 1), bos=True)
    assert (own_text(decoder, begun, 8).tokens[:, [0, 5, 10]] == tiny.BOS).all()


@pytest.mark.parametrize("name", ["llama"])
def test_tokens_are_drawn_as_they_are_predicted(name, decoder):
    """Of many pieces that begin alike, the second tokens come as often as the model says, however many are written at a time."""
    given = Windows.from_tokens(torch.full((2, 2), 7))
    found = own_text(decoder, given, 4000).tokens
    shares = torch.bincount(found[:, 1], minlength=tiny.VOCABULARY) / len(found)
    expected = conformance.logits(decoder.model, given)[0, 0].float().softmax(-1)
    assert_close(shares, expected, rtol=0, atol=0.03)


@pytest.mark.parametrize("name", ["llama"])
def test_pieces_that_are_written_one_by_one_make_as_many_windows(name, decoder, monkeypatch):
    given = tiny.windows(4)
    whole = own_text(decoder, given, 5)
    monkeypatch.setattr(module, "MEMORY", 1)
    assert own_text(decoder, given, 5).tokens.shape == whole.tokens.shape


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("bos", [False, True])
def test_a_piece_may_continue_a_passage_of_the_given_text(name, bos, decoder):
    """The first quarter of each is found in the text, without its padding; what follows is most likely not."""
    given = tiny.windows(6, 40, padded=not bos)
    tokens = given.tokens.clone()
    if bos:
        tokens[:, 0] = tiny.BOS
    given = Windows(tokens, given.mask, "random tokens", bos)
    found = own_text(decoder, given, 8, continuing=True).tokens
    assert found.shape == (8, 40)
    assert len(found.unique(dim=0)) == 8
    size = 10 - bos
    passages = {tuple(each) for row in given.tokens.unfold(1, size, 1) for each in row.tolist()}
    padded = {
        tuple(each)
        for row, mask in zip(given.tokens.unfold(1, size, 1), given.mask.unfold(1, size, 1), strict=True)
        for each in row[~mask.all(-1)].tolist()
    }
    for piece in found:
        assert tuple(piece[int(bos) : 10].tolist()) in passages - padded
        assert tuple(piece[11 : 11 + size].tolist()) not in passages
        assert not bos or piece[0] == tiny.BOS


@pytest.mark.parametrize("name", ["llama"])
def test_windows_shorter_than_a_passage_are_begun_by_a_token(name, decoder):
    given = Windows(torch.full((3, 8), 7), torch.arange(8) < torch.tensor([[1], [1], [1]]), "short")
    assert (own_text(decoder, given, 4, continuing=True).tokens[:, 0] == 7).all()

"""Conversations: written by the chat template, with the answers alone trained on."""

from __future__ import annotations

import json

import pyarrow
import pyarrow.parquet
import pytest
import tiny
import torch
from texts import LIMIT

from optimum_prune import Text, Training
from optimum_prune.errors import TextError
from optimum_prune.text.conversations import conversation_in
from optimum_prune.text.domains import Chosen, TrainingReader
from optimum_prune.text.drawing import Reader, draw
from optimum_prune.text.training import DomainText

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}> {{ message.content }} . {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
CHANGING = "{{ messages | length }} {% for message in messages %}{{ message.content }} {% endfor %}"


def said(*turns):
    return [{"role": ("user", "assistant")[number % 2], "content": turn} for number, turn in enumerate(turns)]


ROWS = [said(tiny.text(20, seed=2 * n), tiny.text(15, seed=2 * n + 1), "Gou fanfan.", "Tis tis.") for n in range(30)]


@pytest.fixture
def chatting(tokenizer):
    tokenizer.chat_template = TEMPLATE
    yield tokenizer
    tokenizer.chat_template = None


def write(folder, suffix, rows=ROWS):
    file = folder / f"chat{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"messages": rows}), file)
    else:
        file.write_text("\n".join(json.dumps({"messages": row}) for row in rows))
    return file


def domains_of(file, tokenizer, sources, chosen=None, length=16):
    reader = Reader(tokenizer, sources, LIMIT)
    if chosen is None:
        drawn = draw(Text(text=str(file), column="messages", length=length), Text(samples=0), reader, 0)
        chosen = Chosen(drawn.text, drawn.tokens, length, drawn.conversations)
    training = Training(text=str(file), column="messages", length=length)
    return TrainingReader(reader, chosen, None).domains(training)[0]


@pytest.fixture
def other(tmp_path):
    """What passes choose by."""
    file = tmp_path / "other.txt"
    file.write_text("Gou fanfan.")
    return Chosen(Text(text=str(file)), torch.zeros(0), 16)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_answers_alone_count_with_what_ends_them(suffix, tmp_path, chatting, sources, other):
    found = domains_of(write(tmp_path, suffix), chatting, sources, other)
    every = [found.windows, found.held_out]
    counted = torch.cat([windows.tokens[windows.predicted] for windows in every])
    told = chatting.decode(counted.tolist()).replace(" ", "")
    assert "".join(ROWS[3][1]["content"].split()[:2]) in told
    assert "".join(ROWS[3][0]["content"].split()[:2]) not in told
    assert "<user>" not in told
    assert all(bool(windows.predicted.any(1).all()) for windows in every)


def test_tokens_are_those_of_the_parts_and_each_is_told_once(chatting):
    conversation = conversation_in(said("Gou fanfan", "ki vinoulis ku", "lis", "Tis tis"), "Row 1")
    tokens, answered = conversation.tokens(chatting)
    assert len(tokens) == len(answered)
    asked = chatting("<user> Gou fanfan . <assistant> ", add_special_tokens=False)["input_ids"]
    answer = chatting("ki vinoulis ku . ", add_special_tokens=False)["input_ids"]
    assert not answered[: len(asked)].any()
    assert answered[len(asked) : len(asked) + len(answer)].all()
    assert tokens[len(asked) : len(asked) + len(answer)].tolist() == answer
    assert answered[-1]


def test_passes_choose_by_all_that_was_said(tmp_path, chatting, sources):
    text = Text(text=str(write(tmp_path, ".jsonl")), column="messages", length=16)
    drawn = draw(text, Text(samples=0), Reader(chatting, sources, LIMIT), 0)
    assert drawn.calibration.counted is None
    assert len(drawn.calibration) > 20


@pytest.mark.parametrize(
    ("template", "rows", "why"),
    [
        (None, ROWS, "tokenizer has no chat template"),
        ("{{ raise_exception('no') }}", ROWS, "cannot be written by the tokenizer's chat template"),
        (CHANGING, ROWS, "what comes later changes what was said before"),
        (TEMPLATE, [[{"role": "user", "content": 7}]], "has a list in 'messages'"),
        (TEMPLATE, [[{"from": "user", "value": "Gou"}]], "has a list in 'messages'"),
        (TEMPLATE, [said("Gou fanfan")], "have no answers to train on"),
        (TEMPLATE, [said("Gou fanfan", "")], "have no answers to train on"),
    ],
)
def test_what_is_no_conversation_to_train_on_is_said(template, rows, why, tmp_path, tokenizer, sources, other):
    tokenizer.chat_template = template
    with pytest.raises(TextError, match=why):
        domains_of(write(tmp_path, ".jsonl", rows), tokenizer, sources, other)
    tokenizer.chat_template = None


def test_conversations_that_passes_choose_by_are_not_trained_on_as_text(tmp_path, chatting, sources):
    with pytest.raises(TextError, match="of which answers alone are trained on"):
        domains_of(write(tmp_path, ".jsonl"), chatting, sources)


def test_a_domain_of_conversations_is_mixed_with_text(tmp_path, chatting, sources, other):
    file = tmp_path / "text.txt"
    file.write_text(tiny.text(600))
    training = Training(
        domains=(DomainText(text=str(file)), DomainText(text=str(write(tmp_path, ".jsonl")), column="messages")),
        length=16,
    )
    domains = TrainingReader(Reader(chatting, sources, LIMIT), other, None).domains(training)
    assert domains[0].windows.counted is None
    assert domains[1].windows.counted is not None

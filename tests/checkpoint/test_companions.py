"""What is carried along, and what is not."""

from __future__ import annotations

import pytest

from optimum_prune.checkpoint import opening
from optimum_prune.checkpoint.companions import belongs_beside, carry


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.model",
        "tokenizer.model.v3",
        "tekken.json",
        "vocab.json",
        "merges.txt",
        "o200k.tiktoken",
        "chat_template.jinja",
    ],
)
def test_a_tokenizers_files_are_companions_unless_another_tokenizer_is_saved(name):
    assert belongs_beside(name)
    assert not belongs_beside(name, tokenizer=False)


@pytest.mark.parametrize("name", ["preprocessor_config.json", "chat_template.json", "LICENSE", "LICENSE.md", "NOTICE"])
def test_processors_and_terms_are_companions_in_any_case(name):
    assert belongs_beside(name, tokenizer=False)


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "README.md", ".env", "training_args.bin", "notes.txt"]
)
def test_other_files_are_none(name):
    assert not belongs_beside(name)


def test_what_was_written_already_is_not_replaced(folder, tmp_path):
    for name in ("chat_template.jinja", "tokenizer.model"):
        (folder / name).write_text("of the source")
    out = tmp_path / "out"
    out.mkdir()
    (out / "chat_template.jinja").write_text("of the output")
    carry(opening.open_checkpoint(str(folder)).companions(), out)
    assert (out / "chat_template.jinja").read_text() == "of the output"
    assert (out / "tokenizer.model").read_text() == "of the source"

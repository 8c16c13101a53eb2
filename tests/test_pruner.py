"""The Pruner takes models, tokenizers and windows as people have them, or says in a sentence what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer

from optimum_prune import Depth, OptimumPruneError, Osscar, Pruner, Report, Text, Windows
from optimum_prune.builtin.prune.block_pruner import BlockPruner
from optimum_prune.errors import RecipeError, TextError

DROP = Depth(drop=(1,), heal=False)


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A model's folder without a tokenizer."""
    folder = tmp_path_factory.mktemp("bare") / "model"
    tiny.model("llama").save_pretrained(folder)
    return folder


def names(folder):
    return {entry.name for entry in Path(folder).iterdir()}


def of(values, dtype=torch.long):
    return Windows.from_tokens(torch.tensor(values, dtype=dtype))


class Slow:
    """A tokenizer that is not written in Rust, and does not know where its tokens begin."""

    bos_token_id = 0

    def __init__(self):
        self.rust = tiny.tokenizer()

    def __call__(self, text, **asked):
        if asked.get("return_offsets_mapping"):
            raise NotImplementedError
        return {"input_ids": self.rust(text, add_special_tokens=asked.get("add_special_tokens", True))["input_ids"]}

    def save_pretrained(self, folder):
        self.rust.save_pretrained(folder)


@pytest.mark.parametrize("tokenizer", [tiny.tokenizer(bos=False), Slow()], ids=["fast", "slow"])
def test_the_tokenizer_that_is_given_is_used_and_saved_also_where_the_folder_has_none(
    tokenizer, bare, llama, text_file, tmp_path
):
    text = Text(text=str(text_file), samples=2, length=16)
    for number, folder in enumerate((bare, llama)):
        out = tmp_path / str(number)
        pruner = Pruner.from_pretrained(folder, tokenizer=tokenizer, device="cpu")
        pruner.prune(DROP, calibration=text, evaluation=Text(samples=1), save_dir=out)
        assert AutoTokenizer.from_pretrained(out)("a b")["input_ids"] == list(tokenizer("a b")["input_ids"])
        assert Report.read(out).calibration["bos"] is isinstance(tokenizer, Slow)


@pytest.mark.parametrize(
    ("step", "given"), [(DROP, None), (DROP, tiny.windows(1)), (Depth(layers=1), tiny.windows(2))]
)
def test_no_tokenizer_is_needed_where_no_text_is_read(step, given, bare, tmp_path):
    out = Pruner.from_pretrained(bare, device="cpu").prune(step, calibration=given, save_dir=tmp_path / "out")
    assert "tokenizer.json" not in names(out)
    assert Report.read(out).perplexity is None


def test_a_text_that_nobody_can_read_is_refused(bare, tmp_path):
    pruner = Pruner.from_pretrained(bare, device="cpu")
    with pytest.raises(RecipeError, match="has no tokenizer to read a text with"):
        pruner.prune(Depth(layers=1), save_dir=tmp_path / "out")
    assert names(tmp_path) == set()


@pytest.mark.parametrize(
    "tokenizer", ["gpt2", 5, type(tiny.tokenizer()), lambda text: [1]], ids=["name", "number", "class", "function"]
)
def test_what_is_no_tokenizer_is_refused(tokenizer, bare):
    with pytest.raises(RecipeError, match="Give one as AutoTokenizer"):
        Pruner.from_pretrained(bare, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("windows", "why"),
    [
        (of([[-1, 1]]), "the token -1"),
        (of([[0.5, 1]], torch.float32), "no matrix of whole numbers"),
        (of([1, 2]), "no matrix of whole numbers"),
        (Windows.from_tokens(torch.ones(0, 8, dtype=torch.long)), "are 0 of 8 tokens"),
        (of([[1], [2]]), "are 2 of 1 tokens"),
        (tiny.windows(1, 300), "of 300 tokens, and the model takes at most 128"),
        (Windows(torch.ones(1, 4, dtype=torch.long), torch.ones(1, 2, dtype=torch.bool), ""), "have a mask"),
        (Windows(torch.ones(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.bool), ""), "nothing but padding"),
        (of([[1, 999]]), "the token 999"),
        (torch.ones(2, 8, dtype=torch.long), "which is none|Give both as windows"),
        (["some text"], "which is none|Give both as windows"),
        (3, "which is none|Give both as windows"),
    ],
)
def test_what_are_no_windows_is_refused(windows, why, tmp_path):
    for given in ({"calibration": windows}, {"calibration": tiny.windows(2), "evaluation": windows}):
        with pytest.raises((TextError, RecipeError), match=why) as caught:
            Pruner.from_pretrained(tiny.model("llama")).prune(DROP, save_dir=tmp_path / "out", **given)
        assert str(caught.value).isprintable()
    assert names(tmp_path) == set()


def test_a_model_in_memory_is_not_asked_to_be_what_it_is_not():
    model = tiny.model("llama")
    Pruner.from_pretrained(model, dtype="float32", device="cpu")
    for asked in ({"dtype": "bfloat16"}, {"device": "cuda"}):
        with pytest.raises(RecipeError, match="A model in memory is pruned as it is"):
            Pruner.from_pretrained(model, **asked)


@pytest.mark.filterwarnings("ignore")
def test_what_is_made_quantized_or_for_inference_only_is_refused():
    with torch.inference_mode():
        made = tiny.model("llama")
    quantized = torch.ao.quantization.quantize_dynamic(tiny.model("llama"), {nn.Linear})
    for model, why in ((made, "Load it outside of that"), (quantized, "Load it unquantized"), (None, "no model")):
        with pytest.raises(OptimumPruneError, match=why):
            Pruner.from_pretrained(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_default_dtype_of_the_process_changes_nothing(dtype, tmp_path):
    steps = (Osscar(ratio=0.25, allocation="global"), BlockPruner(blocks=1), Depth(layers=1))

    def pruned(model, folder):
        out = Pruner.from_pretrained(model).prune(*steps, calibration=tiny.windows(6), save_dir=folder)
        return load_file(out / "model.safetensors")

    expected, model = pruned(tiny.model("llama"), tmp_path / "expected"), tiny.model("llama")
    torch.set_default_dtype(dtype)
    try:
        found = pruned(model, tmp_path / "found")
        assert torch.get_default_dtype() is dtype
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.keys() == expected.keys()
    assert all(
        torch.equal(found[name], value) and found[name].dtype is value.dtype for name, value in expected.items()
    )

import json
from dataclasses import replace

import pytest
import tiny
import torch
from optimum_prune_auto_round import AutoRound, whole_windows
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_prune import load_model
from optimum_prune.errors import RecipeError
from optimum_prune.evaluation.comparison import relative_difference
from optimum_prune.evaluation.runtime import TransformersRuntime

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
NEAREST = {"iters": 0, "disable_opt_rtn": True}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "options", [{"format": "auto_round"}, {"format": "auto_gptq"}, {"format": "auto_awq", "sym": False}]
)
def test_each_format_reloads_in_stock_transformers_with_its_tokenizer(convert, small, options):
    folder, conversion = convert(AutoRound(**NEAREST, **options), small)
    assert conversion.comparison.difference < 0.5
    assert {type(m).__name__ for m in AutoModelForCausalLM.from_pretrained(folder).model.layers.modules()} & {
        "QuantLinear",
        "TorchAtenLinear",
        "TorchAtenAwqLinear",
    }
    assert json.loads((folder / "config.json").read_text())["rope_theta"] == 50_000.0
    text = tiny.text(20)
    assert (
        AutoTokenizer.from_pretrained(folder)(text).input_ids == AutoTokenizer.from_pretrained(small)(text).input_ids
    )


def test_heterogeneous_checkpoint_reloads(convert, heterogeneous):
    _, conversion = convert(AutoRound(**NEAREST), heterogeneous)
    assert conversion.comparison.difference < 0.5


def test_weights_follow_from_the_windows_and_from_nothing_else(small, tmp_path, quantize):
    first = quantize(AutoRound(iters=0), small, tmp_path / "first", tiny.windows(8, 32))
    torch.randn(7)  # the state of random numbers is not part of it
    assert same(first, quantize(AutoRound(iters=0), small, tmp_path / "again", tiny.windows(8, 32)))
    assert not same(first, quantize(AutoRound(iters=0), small, tmp_path / "other", tiny.windows(8, 32, seed=1)))


def test_padding_is_left_out():
    windows = tiny.windows(8, 32, padded=True)
    assert torch.equal(whole_windows(windows), windows.tokens[windows.mask.all(1)])
    some = replace(windows, tokens=windows.tokens[::2], mask=windows.mask[::2])
    shortest = int(some.mask.sum(1).min())
    assert torch.equal(whole_windows(some)[1], some.tokens[1][some.mask[1]][:shortest])


@pytest.mark.parametrize("family", ["qwen3", "opt"])
def test_other_architectures(family, tmp_path, quantize):
    source, windows = tiny.save(family, tmp_path / "source"), tiny.windows(8, 32)
    expected = TransformersRuntime(load_model(source)).logits(windows.tokens)
    step = AutoRound(group_size=16, **NEAREST)
    quantize(step, source, tmp_path / "target", windows)
    assert relative_difference(step.open(tmp_path / "target", "cpu").logits(windows.tokens), expected) < 0.6


def test_process_stays_as_it_was(small, tmp_path, quantize, process):
    tokens = tiny.windows(2, 16).tokens
    before, logits = process(), TransformersRuntime(load_model(small)).logits(tokens)
    quantize(AutoRound(**NEAREST), small, tmp_path / "target", tiny.windows(4, 32))
    assert process() == before
    assert torch.equal(TransformersRuntime(load_model(small)).logits(tokens), logits)


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"bits": 5}, "2, 3, 4 or 8"),
        ({"bits": 8, "format": "auto_awq"}, "bits 4"),
        ({"group_size": 8}, "at least 16, or -1"),
        ({"group_size": 40}, "multiple of 16, or -1"),
        ({"iters": -1}, "at least 0"),
    ],
)
def test_impossible_options_are_refused(options, remedy):
    with pytest.raises(RecipeError, match=remedy):
        AutoRound(**options)


def test_groups_must_divide_the_widths(spec_of, small):
    with pytest.raises(RecipeError, match="group_size"):
        AutoRound(group_size=256).check(spec_of(small))

import json
from dataclasses import replace

import pytest
import tiny
import torch
from optimum_prune_gptq import Gptq
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig, OPTForCausalLM, Qwen3Config, Qwen3ForCausalLM

from optimum_prune import load_model
from optimum_prune.errors import RecipeError
from optimum_prune.evaluation.comparison import relative_difference
from optimum_prune.evaluation.runtime import TransformersRuntime

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def test_result_reloads_in_stock_transformers_with_its_tokenizer(convert, small):
    folder, conversion = convert(Gptq(), small)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model.model.layers[0].mlp.down_proj).__module__.startswith("gptqmodel")
    assert conversion.comparison.difference < 0.35
    text = tiny.text(20)
    assert (
        AutoTokenizer.from_pretrained(folder)(text).input_ids == AutoTokenizer.from_pretrained(small)(text).input_ids
    )


def test_config_says_how_weights_are_packed_and_holds_no_text(convert, small):
    folder, _ = convert(Gptq(), small)
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["format"] == "gptq"
    assert config["quantization_config"]["dataset"] is None
    assert config["rope_theta"] == 50_000.0


def test_asymmetric_ranges_reload(convert, small):
    folder, conversion = convert(Gptq(sym=False), small)
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["format"] == "gptq_v2"
    assert conversion.comparison.difference < 0.35


def test_heterogeneous_checkpoint_reloads(convert, heterogeneous):
    _, conversion = convert(Gptq(), heterogeneous)
    assert conversion.comparison.difference < 0.35


def test_weights_follow_from_the_windows_and_from_nothing_else(small, tmp_path, quantize):
    first = quantize(Gptq(), small, tmp_path / "first", tiny.windows(8, 32))
    assert same(first, quantize(Gptq(), small, tmp_path / "again", tiny.windows(8, 32)))
    assert not same(first, quantize(Gptq(), small, tmp_path / "other", tiny.windows(8, 32, seed=1)))


def test_padding_is_left_out(small, tmp_path, quantize):
    windows = tiny.windows(8, 32, padded=True)
    garbage = replace(windows, tokens=torch.where(windows.mask, windows.tokens, 7))
    assert same(
        quantize(Gptq(), small, tmp_path / "padded", windows), quantize(Gptq(), small, tmp_path / "garbage", garbage)
    )


SIZES = {**tiny.SIZES, "hidden_size": 64, "num_hidden_layers": 2}
OPT = {k: v for k, v in SIZES.items() if k not in ("intermediate_size", "num_key_value_heads")}


@pytest.mark.parametrize(
    "model",
    [
        lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16)),
        lambda: OPTForCausalLM(OPTConfig(**OPT, ffn_dim=64, word_embed_proj_dim=64)),
    ],
    ids=["qwen3", "opt"],
)
def test_other_architectures(model, tmp_path, quantize):
    source, windows = tmp_path / "source", tiny.windows(8, 32)
    torch.manual_seed(0)
    model().save_pretrained(source)
    tiny.tokenizer().save_pretrained(source)
    expected = TransformersRuntime(load_model(source)).logits(windows.tokens)
    step = Gptq(group_size=32)
    quantize(step, source, tmp_path / "target", windows)
    assert relative_difference(step.open(tmp_path / "target", "cpu").logits(windows.tokens), expected) < 0.5


@pytest.mark.parametrize(("family", "reason"), [("qwen3", "multiple"), ("gpt2", "GPT-2")])
def test_what_cannot_be_packed_is_refused_beforehand(family, reason, tmp_path, spec_of):
    with pytest.raises(RecipeError, match=reason):
        Gptq(group_size=-1).check(spec_of(tiny.save(family, tmp_path / "source")))


def test_process_stays_as_it_was(small, tmp_path, quantize, process):
    tokens = tiny.windows(2, 16).tokens
    before, logits = process(), TransformersRuntime(load_model(small)).logits(tokens)
    quantize(Gptq(), small, tmp_path / "target", tiny.windows(4, 32))
    assert process() == before
    assert torch.equal(TransformersRuntime(load_model(small)).logits(tokens), logits)


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"bits": 5}, "gptq has bits 5. Give 2, 3, 4 or 8: Bits"),
        ({"group_size": 48}, "Give -1, 32, 64, 128"),
        ({"damp_percent": 2.0}, "gptq has damp_percent 2.0. Give a number above 0 and below 1: Damping"),
        ({"mse": -1.0}, "Give a number of at least 0"),
    ],
)
def test_impossible_options_are_refused(options, remedy):
    with pytest.raises(RecipeError, match=remedy):
        Gptq(**options)


def test_groups_must_divide_the_widths(spec_of, small):
    with pytest.raises(RecipeError, match="group_size"):
        Gptq(group_size=256).check(spec_of(small))

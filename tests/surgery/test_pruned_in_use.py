"""Models whose layers differ in shape, in the hands of whoever has never heard of them: caches, trainers, other heads."""

from __future__ import annotations

import copy
import json
import sys
import types
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    StaticCache,
    Trainer,
    TrainingArguments,
)

from optimum_prune import Cuts
from optimum_prune import testing as conformance
from optimum_prune.surgery import configuration_pruned

WINDOWS = tiny.windows(2)
GONE = Cuts(blocks={0: ("feed_forward",), 2: ("attention",), 4: ("feed_forward",)})
UNEVEN = Cuts.along("channels", {1: tuple(range(24)), 3: tuple(range(40))})
FEWER = Cuts.along("heads", {1: (0,), 3: (1,)})
KINDS = {"widths": UNEVEN, "heads": FEWER, "blocks": GONE, "all": UNEVEN.merge(FEWER).merge(GONE)}
NAMES = ["llama", "qwen3", "gemma3"]


@pytest.fixture(params=list(KINDS))
def uneven(request, name, decoder, tmp_path):
    """A model, and a folder with it."""
    conformance.cut(decoder, KINDS[request.param])
    decoder.model.save_pretrained(tmp_path / "saved")
    return decoder.model, tmp_path / "saved"


@pytest.mark.parametrize("name", NAMES)
def test_whoever_only_reads_the_config_is_not_troubled(uneven):
    _, folder = uneven
    plain = PreTrainedConfig.from_pretrained(folder)
    assert plain.dtype == torch.float32
    assert plain.model_type == "optimum_prune"


@pytest.mark.parametrize("name", NAMES)
def test_in_memory_and_on_disk_no_stock_class_is_claimed(uneven):
    model, folder = uneven
    plain = json.loads((folder / "config.json").read_text())
    for found in (
        model.config.architectures,
        AutoConfig.from_pretrained(folder).architectures,
        plain["architectures"],
    ):
        (named,) = found
        assert named == type(model).__name__ != type(model).__bases__[1].__name__
        assert getattr(transformers, named) is type(model)


@pytest.mark.parametrize("name", NAMES)
def test_a_static_cache_fits_each_layer(uneven):
    model, _ = uneven
    asked = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(WINDOWS.tokens)}
    expected = model.generate(WINDOWS.tokens, **asked)
    assert torch.equal(model.generate(WINDOWS.tokens, **asked, cache_implementation="static"), expected)
    cache = StaticCache(config=model.config, max_cache_len=WINDOWS.length + 2)
    assert len(cache.layers) == tiny.LAYERS
    found = model(input_ids=WINDOWS.tokens, past_key_values=cache).logits
    assert_close(found, conformance.logits(model, WINDOWS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_that_has_read_too_much_goes_back(uneven):
    model, _ = uneven
    tokens = tiny.windows(1, 12).tokens[
        :, :5
    ]  # no longer than what a sliding attention sees: behind that nobody's cache goes back
    cache = model(input_ids=tokens, use_cache=True).past_key_values
    length = cache.get_seq_length()
    cache.crop(-2)
    assert cache.get_seq_length() == length - 2
    again = model(input_ids=tokens[:, -2:], past_key_values=cache).logits
    assert_close(again, model(input_ids=tokens).logits[:, -2:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "asked", [{"num_beams": 3}, {"prefill_chunk_size": 4}, {"prompt_lookup_num_tokens": 3}], ids=str
)
def test_prompts_in_pieces_beams_and_lookups_give_what_no_cache_gives(uneven, asked):
    model, _ = uneven
    half = tiny.windows(1, 12).tokens
    tokens = torch.cat([half, half], dim=1)
    asked = {**asked, "max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    plain = {
        name: value for name, value in asked.items() if name not in ("prefill_chunk_size", "prompt_lookup_num_tokens")
    }
    assert torch.equal(model.generate(tokens, **asked), model.generate(tokens, **plain, use_cache=False))


@pytest.mark.parametrize("name", ["llama"])
def test_a_pipeline_writes_what_the_model_writes(uneven):
    model, folder = uneven
    tiny.tokenizer().save_pretrained(folder)
    write = transformers.pipeline("text-generation", str(folder))
    text = tiny.text(8)
    tokens = write.tokenizer(text, return_tensors="pt").input_ids
    asked = {"max_new_tokens": 6, "do_sample": False}
    expected = write.tokenizer.decode(model.generate(tokens, **asked)[0, tokens.shape[1] :], skip_special_tokens=True)
    assert write(text, return_full_text=False, **asked)[0]["generated_text"] == expected


@pytest.mark.parametrize("name", NAMES)
def test_shorter_prompts_of_a_batch_are_padded(uneven):
    model, _ = uneven
    tokens = tiny.windows(2, 10).tokens
    tokens[1, :4] = 0
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    asked = {"max_new_tokens": 5, "do_sample": False}
    together = model.generate(tokens, attention_mask=mask, **asked)
    alone = model.generate(tokens[1:, 4:], attention_mask=mask[1:, 4:], **asked)
    assert torch.equal(together[1, 10:], alone[0, 6:])


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_and_a_device_map(uneven):
    _, folder = uneven
    found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu").eval()
    assert found.dtype == torch.bfloat16
    assert found(input_ids=WINDOWS.tokens).logits.isfinite().all()
    pipe = transformers.pipeline("text-generation", model=found, tokenizer=tiny.tokenizer())
    assert pipe("a", max_new_tokens=3)[0]["generated_text"].startswith("a")


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_the_same_where_activations_are_made_anew(uneven):
    model, _ = uneven
    found = []
    for checkpointing in (False, True):
        each = copy.deepcopy(model).train()
        if checkpointing:
            enable = getattr(each, "activation_checkpointing_enable", None) or each.gradient_checkpointing_enable
            enable()
        each(input_ids=WINDOWS.tokens, labels=WINDOWS.tokens, use_cache=False).loss.backward()
        found.append([parameter.grad for parameter in each.parameters()])
    for one, other in zip(*found, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_attention_are_put_out_where_there_are_any(uneven):
    model, _ = uneven
    model.set_attn_implementation("eager")
    found = model(input_ids=WINDOWS.tokens, output_attentions=True, output_hidden_states=True)
    assert len(found.hidden_states) == tiny.LAYERS + 1
    attending = ["attention" not in own.get("without", ()) for own in model.config.pruned["own"]]
    assert len(found.attentions) == sum(attending)  # as of layers of other kinds, transformers tells none


@pytest.mark.parametrize("name", NAMES)
def test_the_vocabulary_can_grow(uneven, tmp_path):
    model, _ = uneven
    model.resize_token_embeddings(tiny.VOCABULARY + 8)
    found = conformance.reloads_exactly(model, tmp_path / "grown", WINDOWS)
    assert found.get_input_embeddings().weight.shape[0] == tiny.VOCABULARY + 8


@pytest.mark.parametrize("name", NAMES)
def test_without_a_head_and_with_another_one(uneven, tmp_path):
    model, folder = uneven
    base, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    hidden = model(input_ids=WINDOWS.tokens, output_hidden_states=True).hidden_states[-1]
    assert_close(base.eval()(input_ids=WINDOWS.tokens).last_hidden_state, hidden, rtol=1e-5, atol=1e-5)
    judge = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, pad_token_id=0).eval()
    expected = judge(input_ids=WINDOWS.tokens).logits
    assert expected.shape == (2, 3)
    judge.save_pretrained(tmp_path / "judge")
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "judge").eval()
    assert torch.equal(found(input_ids=WINDOWS.tokens).logits, expected)


class Tokens(torch.utils.data.Dataset):
    """Windows, to be predicted."""

    def __len__(self):
        return len(WINDOWS.tokens)

    def __getitem__(self, index):
        return {"input_ids": WINDOWS.tokens[index], "labels": WINDOWS.tokens[index]}


@pytest.mark.parametrize("name", ["llama"])
def test_it_is_trained_on_shifted_labels_and_training_goes_on_where_it_stopped(name, uneven, tmp_path):
    model, _ = uneven
    plain = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": 2}

    def trainer(steps, smoothing=0.0):
        options = TrainingArguments(
            str(tmp_path / "run"), max_steps=steps, save_steps=1, label_smoothing_factor=smoothing, **plain
        )
        return Trainer(model, options, train_dataset=Tokens())

    batch = {"input_ids": WINDOWS.tokens, "labels": WINDOWS.tokens}
    smoothed = trainer(1, 1e-9).compute_loss(model, dict(batch))
    assert_close(smoothed, model(**batch).loss, rtol=1e-4, atol=1e-4)
    trainer(1).train()
    resumed = trainer(2)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 2


@pytest.mark.parametrize("name", NAMES)
def test_what_each_layer_keeps_is_told_in_the_place_of_its_cache(uneven):
    """As vLLM asks."""
    model, _ = uneven
    config = model.config
    assert config.is_heterogeneous
    cache = model(input_ids=WINDOWS.tokens, use_cache=True).past_key_values
    for layer, told in zip(cache.layers, config.per_layer_config, strict=True):
        if layer.keys is not None and layer.keys.numel():
            assert told.num_key_value_heads == layer.keys.shape[1]
        else:
            assert told.num_key_value_heads == told.num_attention_heads == 1


class Older(types.ModuleType):
    """transformers 4."""

    __version__ = "4.57.1"


def test_older_transformers_refuse_it_in_a_sentence(monkeypatch):
    source = Path(configuration_pruned.__file__).read_text()
    monkeypatch.setitem(sys.modules, "transformers", Older("transformers"))
    with pytest.raises(ImportError, match=r"needs transformers 5\.6 or later, and this is 4\.57\.1"):
        exec(compile(source, "configuration_pruned.py", "exec"), {"__name__": "older"})

"""Situations that users of other tools for pruning, merging and quantizing have reported in public, each as a property of what this one writes.

Where a report is named, it is by repository and number. These situations are tested elsewhere:

- peremartra/optipfair 20, `layer_types` is as long as before layers were dropped; vllm-project/vllm 15705, `max_window_layers` beyond
  the layers: tests/test_conformance.py.
- VainF/Torch-Pruning 439 and 495, NVIDIA/Model-Optimizer 105, microsoft/fastformers 12, a pruned model that stock transformers does
  not load, or with another size of a head; huggingface/transformers 30508, an IndexError of the cache when layers are gone:
  tests/test_conformance.py.
- vllm-project/llm-compressor 997, a pruned model is loaded with random weights and no error: tests/checkpoint/test_verification.py.
- vllm-project/llm-compressor 2798, ml-explore/mlx-lm 1298, an output head that is the embedding is stored twice, or was:
  tests/trust/test_models.py. AutoGPTQ/AutoGPTQ 536, such a model cannot be saved: tests/run/test_compress.py.
- safetensors/safetensors 493, two other modules share a weight; vllm-project/llm-compressor 1432, casper-hansen/AutoAWQ 222, weights
  that `device_map` left on no device: tests/checkpoint/test_taking.py.
- huggingface/transformers 29988, hiyouga/LlamaFactory 2545, a generation config that is not valid ends the run when it saves;
  huggingface/transformers 34744 and 38873, a tokenizer that reads otherwise when it was saved: tests/trust/test_models.py.
- meta-pytorch/gpt-fast 186, vllm-project/llm-compressor 1305, the tokenizer's model and the processor's config are not there after
  quantizing: tests/conversion/test_completion.py. ModelCloud/GPTQModel 302, nor is the model's own code: tests/trust/test_models.py.
- neuralmagic/sparseml 2091, fewer windows in a text than are asked for; vllm-project/llm-compressor 1957, none; arcee-ai/mergekit 360, a
  model that would have no layers left: tests/cli/test_refusals.py.
- vllm-project/llm-compressor 1421, another result each time: tests/run/test_compress.py.
- OpenGVLab/EfficientQAT 17, all is lost when a server goes down; facebookresearch/fastText 1200, a full disk is no error:
  tests/run/test_resume.py.
- sgl-project/sglang 32279, a file of weights that the index names is missing, and nobody says so: tests/checkpoint/test_loading.py.
  Blaizzy/mlx-vlm 1464, Neph0s/CoSER 3, a further file of weights, or an index, that is not the model's: tests/trust/test_models.py.
- ggml-org/llama.cpp 9483, egesabanci/reap-mlx 115, layers of different widths, which an exporter cannot say, are found at its end:
  tests/conversion/test_late_failure.py, tests/test_recipe.py.
- huggingface/transformers 46279, the config of a tokenizer names a file elsewhere: tests/trust/test_models.py; one of the current folder:
  here.
"""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import tiny
import torch
from folder_passes import Halve
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from optimum_prune import Depth, Osscar, Pruner, Text, Windows, compress
from optimum_prune.errors import OptimumPruneError

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
DROP = Depth(drop=(1,))


@pytest.fixture
def model(llama, tmp_path):
    """The folder of a model, to be changed."""
    return shutil.copytree(llama, tmp_path / "model")


@pytest.fixture
def done(recipe, tmp_path):
    """A model's folder and passes -> the output."""

    def done(model, *passes, **settings):
        compress(recipe(*passes, model=model, **settings), tmp_path / "out", overwrite=True)
        return tmp_path / "out"

    return done


@pytest.fixture
def tokenizer(model):
    """Puts a tokenizer with these attributes into the model's folder."""

    def tokenizer(**attributes):
        made = tiny.tokenizer()
        for name, value in attributes.items():
            setattr(made, name, value)
        made.save_pretrained(model)

    return tokenizer


def one_line(caught):
    assert str(caught.value).isprintable()
    return str(caught.value)


def config_of(folder):
    return json.loads((folder / CONFIG).read_text())


def edit(file, **changes):
    file.write_text(json.dumps({**(json.loads(file.read_text()) if file.exists() else {}), **changes}))


BOTH = pytest.mark.parametrize("passes", [(DROP,), (DROP, Halve())], ids=["pruned", "quantized"])


# What generation and chat need


@BOTH
def test_where_generation_ends_is_known_as_before(passes, model, done):
    """ModelCloud/GPTQModel 1291, arcee-ai/mergekit 275: no generation_config.json, so that answers do not end."""
    given = {"bos_token_id": 0, "eos_token_id": [1, 2], "do_sample": True, "temperature": 0.6, "top_p": 0.9}
    (model / "generation_config.json").write_text(json.dumps(given))
    found = GenerationConfig.from_pretrained(done(model, *passes))
    assert {name: getattr(found, name) for name in given} == given


@BOTH
def test_several_tokens_that_end_a_text_stay_in_the_config(passes, model, done):
    """JustVugg/colibri 1478: `eos_token_id` is not in the config that was converted."""
    edit(model / CONFIG, eos_token_id=[1, 2])
    (model / "generation_config.json").unlink()
    out = done(model, *passes)
    assert config_of(out)["eos_token_id"] == [1, 2]
    assert GenerationConfig.from_pretrained(out).eos_token_id == [1, 2]


@BOTH
def test_a_chat_template_is_kept(passes, tokenizer, model, done):
    """hiyouga/LlamaFactory 8399: the tokenizer that was saved has none."""
    tokenizer(chat_template="{% for each in messages %}[{{ each.content }}]{% endfor %}")
    chat = AutoTokenizer.from_pretrained(done(model, *passes))
    assert chat.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "[hi]"


@BOTH
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_stays_on_its_side(side, passes, model, done):
    """unslothai/unsloth 1006: it is on the other side in what was saved."""
    edit(model / "tokenizer_config.json", padding_side=side, truncation_side=side)
    found = AutoTokenizer.from_pretrained(done(model, *passes))
    assert (found.padding_side, found.truncation_side) == (side, side)


@BOTH
def test_a_tokenizer_without_padding_calibrates_and_gets_none(passes, tokenizer, model, done):
    """lemonade-sdk/lemonade 68: quantizing asks to pad, and there is no padding token."""
    tokenizer(pad_token=None)
    assert AutoTokenizer.from_pretrained(done(model, *passes)).pad_token is None


@BOTH
def test_a_padding_token_that_was_chosen_stays(passes, tokenizer, model, done):
    """huggingface/transformers 26500: it is gone when the tokenizer is loaded again."""
    tokenizer(pad_token="</s>")
    assert AutoTokenizer.from_pretrained(done(model, *passes)).pad_token == "</s>"


@BOTH
def test_the_tokenizers_own_end_of_text_goes_before_that_of_the_config(passes, tokenizer, model, done):
    """unslothai/unsloth 5386: merging replaces the end of a turn by that of the base model, and answers do not end."""
    tokenizer(eos_token="<pad>")
    out = done(model, *passes)
    assert AutoTokenizer.from_pretrained(out).eos_token == "<pad>"
    assert config_of(out)["eos_token_id"] == tiny.EOS


def test_what_prepares_images_is_there_after_pruning_and_quantizing(model, done):
    """jundot/omlx 1386, kekzl/imp 1429: without processor_config.json, a model that sees is taken for one that does not."""
    names = ("processor_config.json", "preprocessor_config.json")
    for name in names:
        (model / name).write_text('{"image_size": 8}')
    out = done(model, DROP, Halve())
    assert [(out / name).read_text() for name in names] == ['{"image_size": 8}'] * 2


# Weights, and the config that describes them


@pytest.mark.parametrize(("family", "dtype"), [("llama", torch.bfloat16), ("opt", torch.float16)])
def test_weights_stay_in_their_dtype_and_the_config_says_so(family, dtype, done, tmp_path):
    """intel/auto-round 2385, hiyouga/LlamaFactory 9152, huggingface/transformers 21681: they are stored in float32, twice as large."""
    tiny.model(family).to(dtype).save_pretrained(tmp_path / "half")
    tiny.tokenizer().save_pretrained(tmp_path / "half")
    out = done(tmp_path / "half")
    assert {weight.dtype for weight in load_file(out / WEIGHTS).values()} == {dtype}
    assert config_of(out)["dtype"] == str(dtype).removeprefix("torch.")


def test_half_precision_is_pruned_on_a_cpu(model, done):
    """horseee/LLM-Pruner 22: "addmm_impl_cpu_" not implemented for 'Half'."""
    out = done(model, Osscar(ratio=0.25), dtype="float16")
    weights = load_file(out / WEIGHTS)
    assert all(weight.dtype == torch.float16 and weight.isfinite().all() for weight in weights.values())


def test_rows_of_the_embedding_that_no_token_has_stay(model, done):
    """unslothai/unsloth-zoo 923, huggingface/transformers 20043: the embedding is cut to the tokenizer's length."""
    before, after = load_file(model / WEIGHTS), load_file(done(model) / WEIGHTS)
    assert len(tiny.tokenizer()) < tiny.VOCABULARY
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(after[name], before[name])


def test_a_tokenizer_with_more_tokens_than_the_model_is_named(model, recipe, tmp_path):
    """EuroEval/EuroEval 52: an IndexError of the embedding, in the middle of a run."""
    small = LlamaForCausalLM(LlamaConfig(**{**tiny.SIZES, "vocab_size": 40}))
    small.save_pretrained(model)
    with pytest.raises(OptimumPruneError, match=r"the model knows 40\. Use the tokenizer that belongs") as caught:
        compress(recipe(model=model), tmp_path / "out")
    one_line(caught)


def test_rotary_frequencies_that_older_versions_stored_do_no_harm(model, done):
    """horseee/LLM-Pruner 11: warnings of weights that were not used or are new, for `rotary_emb.inv_freq` of each layer."""
    weights = load_file(model / WEIGHTS)
    weights |= {f"model.layers.{index}.self_attn.rotary_emb.inv_freq": torch.ones(4) for index in range(tiny.LAYERS)}
    save_file(weights, model / WEIGHTS, metadata={"format": "pt"})
    assert not [name for name in load_file(done(model) / WEIGHTS) if "inv_freq" in name]


def test_a_model_with_one_key_value_head_keeps_it(recipe, done, tmp_path):
    """horseee/LLM-Pruner 64 and 69: heads that share keys and values are cut to shapes that do not go together."""
    sizes = {**tiny.SIZES, "num_key_value_heads": 1}
    tiny.filled(LlamaForCausalLM(LlamaConfig(**sizes))).save_pretrained(tmp_path / "one")
    tiny.tokenizer().save_pretrained(tmp_path / "one")
    assert config_of(done(tmp_path / "one", Osscar(ratio=0.25)))["num_key_value_heads"] == 1
    with pytest.raises(OptimumPruneError, match="head") as caught:
        compress(recipe(Osscar(ratio=0.25, head_ratio=0.5), model=tmp_path / "one"), tmp_path / "again")
    one_line(caught)


def test_of_a_model_that_sees_only_the_layers_that_read_are_counted_anew(checkpoints, done):
    """arcee-ai/mergekit 537: the number of layers is set nowhere, or for the part that sees."""
    source = checkpoints("gemma3-vision")
    before, after = config_of(source), config_of(done(source))
    assert after["vision_config"]["num_hidden_layers"] == before["vision_config"]["num_hidden_layers"]
    assert after["text_config"]["num_hidden_layers"] == tiny.LAYERS - 1
    assert len(after["text_config"]["layer_types"]) == tiny.LAYERS - 1


@pytest.mark.parametrize("family", tiny.MIXTURES)
def test_of_a_mixture_nothing_is_lost_but_the_layer(family, checkpoints, done):
    """arcee-ai/mergekit 445: 7 GB become 1 GB, because the experts are not among the weights that are copied."""
    source = checkpoints(family)
    before = AutoModelForCausalLM.from_pretrained(source)
    dropped = sum(parameter.numel() for parameter in before.model.layers[1].parameters())
    after, info = AutoModelForCausalLM.from_pretrained(done(source), output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert after.num_parameters() == before.num_parameters() - dropped


@pytest.mark.parametrize("use_cache", [False, True])
def test_whether_a_cache_is_used_stays_as_it_is(use_cache, model, done):
    """lm-sys/FastChat 1890, VainF/Torch-Pruning 461: the cache is off in what was saved, since the tool had turned it off for itself."""
    edit(model / CONFIG, use_cache=use_cache)
    assert config_of(done(model)).get("use_cache", True) is use_cache


def test_weights_that_are_not_packed_though_the_config_says_so_are_not_cut(model, recipe, tmp_path):
    """unslothai/unsloth 1601: `quantization_config` is left in the config of merged weights, which then cannot be loaded."""
    edit(model / CONFIG, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(OptimumPruneError, match=r"already quantized \(bitsandbytes\)") as caught:
        compress(recipe(model=model), tmp_path / "out")
    assert "if they are not packed, take 'quantization_config' out of its config.json" in one_line(caught)


def test_no_files_of_an_earlier_output_stay_beside_the_new_ones(model, done, tmp_path):
    """Blaizzy/mlx-vlm 1827: an index, and files that it names, of what lay there before."""
    tiny.save("llama", tmp_path / "out", max_shard_size="60KB")
    assert (tmp_path / "out" / INDEX).exists()
    assert [file.name for file in done(model).glob("*.safetensors*")] == [WEIGHTS]


# Texts


def test_windows_are_as_many_and_as_long_as_asked_for_and_no_longer(recipe, model, tmp_path):
    """vllm-project/llm-compressor 2648: the number and the length of samples are passed over for data that is given."""
    given = compress(recipe(model=model), tmp_path / "out").calibration
    assert (given["windows"], given["length"]) == (2, 16)


@pytest.mark.parametrize("text", ["one line", "one word"])
def test_a_text_of_one_endless_line_is_cut_into_windows(text, recipe, model, tmp_path):
    """vllm-project/llm-compressor 3011: one long sample takes all memory."""
    words = tiny.text(4000).replace("\n", " ")
    (tmp_path / "text.txt").write_text(words if text == "one line" else words.replace(" ", ""))
    endless = Text(text=str(tmp_path / "text.txt"), samples=3, length=32)
    compress(dataclasses.replace(recipe(model=model), calibration=endless), tmp_path / "out")
    assert (tmp_path / "out" / WEIGHTS).is_file()


def test_a_data_set_that_cannot_be_reached_is_named(recipe, model, tmp_path):
    """locuslab/wanda 23: couldn't reach 'allenai/c4' on the Hub."""
    given = dataclasses.replace(recipe(model=model), calibration=Text(dataset="allenai/c4", samples=2, length=16))
    with pytest.raises(OptimumPruneError, match="allenai/c4") as caught:
        compress(given, tmp_path / "out")
    one_line(caught)
    assert not (tmp_path / "out").exists()


def test_what_needs_no_text_asks_for_none(model, tmp_path):
    """vllm-project/llm-compressor 1510 and 1589: an error of what is None, where no data is given, or none is needed."""
    Pruner.from_pretrained(model, device="cpu").prune(
        DROP, calibration=Windows.from_tokens(torch.arange(3, 35)[None]), save_dir=tmp_path / "out"
    )
    assert config_of(tmp_path / "out")["num_hidden_layers"] == tiny.LAYERS - 1


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "BertTokenizer", "EsmTokenizer", "LlamaTokenizer", "T5Tokenizer"])
def test_no_vocabulary_is_made_of_a_file_of_the_current_folder(kind, recipe, model, tmp_path, monkeypatch):
    """huggingface/transformers 46279: a tokenizer's config names `.env`, which is read, saved as its vocabulary, and published."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    (tmp_path / "work" / ".env").write_text("SECRET=abc123xyz\n")
    (model / "tokenizer.json").unlink()
    edit(model / "tokenizer_config.json", tokenizer_class=kind, vocab_file=".env", tokenizer_file=".env")
    with pytest.raises(OptimumPruneError, match="tokenizer") as caught:
        compress(recipe(model=model), tmp_path / "work" / "out")
    one_line(caught)
    assert not (tmp_path / "work" / "out").exists()

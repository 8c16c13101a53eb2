from __future__ import annotations

import json

import pytest
import tiny
import torch
from harms import opened
from transformers import AutoTokenizer

from optimum_prune import Progress
from optimum_prune.anatomy.counts import count_parameters
from optimum_prune.checkpoint import saving
from optimum_prune.errors import OutputError
from optimum_prune.testing import logits


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral"])
def test_the_rotary_frequency_stands_where_older_transformers_look(name, tmp_path):
    model = tiny.model(name)
    saving.save(model, None, tmp_path, Progress())
    plain = json.loads((tmp_path / "config.json").read_text())
    assert plain["rope_theta"] == model.config.rope_parameters["rope_theta"]
    assert name != "llama" or plain["rope_theta"] == 50_000


@pytest.mark.parametrize("name", ["gemma3", "gemma3-vision"])
def test_both_rotary_frequencies_stand_where_older_transformers_look(name, tmp_path):
    model = tiny.model(name)
    saving.save(model, None, tmp_path, Progress())
    plain = json.loads((tmp_path / "config.json").read_text())
    text = plain.get("text_config", plain)
    rope = model.config.get_text_config().rope_parameters
    assert text["rope_theta"] == rope["full_attention"]["rope_theta"]
    assert text["rope_local_base_freq"] == rope["sliding_attention"]["rope_theta"]
    assert text["rope_theta"] != text["rope_local_base_freq"]


def test_scaled_rotary_frequencies_stand_where_older_transformers_look(tmp_path):
    scaled = {"rope_type": "linear", "factor": 4.0, "rope_theta": 20_000.0}
    model = tiny.model("llama")
    config = type(model.config)(**{**model.config.to_dict(), "rope_parameters": scaled})
    type(model)(config).save_pretrained(tmp_path / "made")
    model = opened(tmp_path / "made")
    saving.save(model, None, tmp_path / "saved", Progress())
    plain = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert plain["rope_theta"] == 20_000
    assert plain["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    assert torch.equal(logits(opened(tmp_path / "saved"), tiny.windows(2)), logits(model, tiny.windows(2)))


@pytest.mark.parametrize("bos", [True, False], ids=["bos", "no-bos"])
def test_the_tokenizer_is_saved_with_the_model_under_a_class_that_older_transformers_know(bos, tmp_path):
    tokenizer = tiny.tokenizer(bos)
    saving.save(tiny.model("llama"), tokenizer, tmp_path, Progress())
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    found = AutoTokenizer.from_pretrained(tmp_path)
    assert found(tiny.text(50))["input_ids"] == tokenizer(tiny.text(50))["input_ids"]


def test_a_place_that_cannot_be_written_is_an_error_of_the_output(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        saving.save(tiny.model("llama"), None, tmp_path / "file" / "model", Progress())


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_sizes_are_those_of_the_files(name, checkpoints):
    folder = checkpoints(name)
    model = tiny.model(name)
    size = (folder / "model.safetensors").stat().st_size
    assert saving.bytes_on_disk(folder) == size
    assert saving.weight_bytes(model) == 4 * count_parameters(model).total
    assert size - 20_000 < saving.weight_bytes(model) < size

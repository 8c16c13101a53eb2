"""Older fields: only where a config that is read back says what it said."""

from __future__ import annotations

import json

import pytest
import tiny
from transformers import AutoConfig

from optimum_prune import Progress
from optimum_prune.checkpoint import saving
from optimum_prune.checkpoint.transformers4 import add_older_fields, with_older_fields

HALF = 4
ROPES = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16.0},
    "yarn, of a length that is the longest": {"factor": 4.0},
    "longrope": {"short_factor": [1.5] * HALF, "long_factor": [2.0] * HALF, "original_max_position_embeddings": 32},
    "longrope, with a factor": {"short_factor": [1.5] * HALF, "long_factor": [2.0] * HALF, "factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
ROTARY = [name for name in tiny.FAMILIES if not name.startswith(("opt", "gpt2", "gemma3-vision"))]


def scaled(family, kind, **more):
    """A config, in plain data, with rotary frequencies of a kind; None if the architecture has no such."""
    config = tiny.FAMILIES[family]().config
    plain = json.loads(config.to_json_string())
    rope = plain["rope_parameters"]
    inner = rope.get("full_attention", rope)
    new = {"rope_type": kind.split(",")[0], "rope_theta": 54_321.0, **ROPES[kind]}
    if "partial_rotary_factor" in inner:
        new["partial_rotary_factor"] = inner["partial_rotary_factor"]
    plain["rope_parameters"] = {**rope, "full_attention": new} if "full_attention" in rope else new
    try:
        return json.loads(type(config).from_dict({**plain, **more}).to_json_string())
    except Exception:  # as Phi-3, which knows longrope only
        return None


def read(plain, folder):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(plain))
    return AutoConfig.from_pretrained(folder)


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("family", ROTARY)
@pytest.mark.filterwarnings("ignore")
def test_a_config_with_older_fields_says_what_it_said(family, kind, tmp_path):
    plain = scaled(family, kind)
    if plain is None:
        return
    older = with_older_fields(plain)
    assert older.items() >= plain.items()
    before, after = read(plain, tmp_path / "before"), read(older, tmp_path / "after")
    if family == "phi3" and after.rope_parameters.get("type") == "longrope":  # as Phi-3 wants it
        del after.rope_parameters["type"]
    assert after.rope_parameters == before.rope_parameters
    said, found = before.to_dict(), after.to_dict()
    assert {name for name in said if found[name] != said[name]} <= {"_name_or_path"}


@pytest.mark.parametrize("kind", ROPES)
def test_llama_says_all_of_them_in_the_words_of_transformers_4(kind):
    plain = scaled("llama", kind)
    older = with_older_fields(plain)
    assert older["rope_theta"] == 54_321.0
    assert older["rope_scaling"].items() >= {"rope_type": kind.split(",")[0], **ROPES[kind]}.items()


def test_phi3_says_longrope_in_the_three_fields_that_it_takes():
    lengths = {"original_max_position_embeddings": 32, "max_position_embeddings": 128}
    plain = scaled("phi3", "longrope", **lengths)
    older = with_older_fields(plain)
    assert set(older["rope_scaling"]) == {"type", "short_factor", "long_factor"}
    assert older["original_max_position_embeddings"] == 32


def test_what_cannot_be_said_so_is_left_out():
    plain = scaled("llama", "linear")
    assert with_older_fields({**plain, "model_type": "never_heard_of"}) == {**plain, "model_type": "never_heard_of"}
    assert with_older_fields({"model_type": "llama", "rope_parameters": "fancy"}) == {
        "model_type": "llama",
        "rope_parameters": "fancy",
    }


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_what_was_added_once_stays_as_it_is(family, tmp_path):
    saving.save(tiny.model(family), None, tmp_path, Progress())
    once = (tmp_path / "config.json").read_text()
    add_older_fields(tmp_path)
    assert (tmp_path / "config.json").read_text() == once

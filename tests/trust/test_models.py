"""Models as a hostile or careless person may give them, through the command line: taken as they are, or refused in one sentence."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig

from optimum_prune.cli.main import main
from optimum_prune.run.ownership import foreign

WEIGHTS, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"
UP = "model.layers.3.mlp.up_proj.weight"


@pytest.fixture
def model(llama, tmp_path) -> Path:
    """The folder of a model, to be changed."""
    return shutil.copytree(llama, tmp_path / "model")


@pytest.fixture
def sharded(model) -> Path:
    """The same, its weights in several files."""
    (model / WEIGHTS).unlink()
    return tiny.save("llama", model, max_shard_size="60KB")


def edit(file, **changes):
    plain = json.loads(file.read_text()) if file.exists() else {}
    plain.update(changes)
    file.write_text(json.dumps({key: value for key, value in plain.items() if value is not ...}))


def change_weights(folder, change):
    weights = load_file(folder / WEIGHTS)
    save_file(change(weights) or weights, folder / WEIGHTS, metadata={"format": "pt"})


def digests(folder):
    files = (file for file in folder.iterdir() if file.is_file() and file.name != "README.md")
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture
def prune(text_file, tmp_path, capfd, monkeypatch):
    """Prunes a model on the command line: exit code, stderr, and the output folder. Somebody answers every question with yes."""
    reader, writer = os.pipe()
    os.write(writer, b"y\n" * 10)
    os.close(writer)
    count = iter(range(100))

    def run(model, *more):
        out = tmp_path / f"out-{next(count)}"
        flags = {"--text": text_file, "--samples": 2, "--length": 16, "--eval-samples": 1, "--device": "cpu"}
        flags |= {"--model": model, "--output": out}
        capfd.readouterr()
        code = main(["prune", "depth", "--drop", "1", *(str(part) for flag in flags.items() for part in flag), *more])
        return code, capfd.readouterr().err, out

    with os.fdopen(reader) as answers:
        monkeypatch.setattr("sys.stdin", answers)
        yield run


@pytest.fixture
def refused(prune, tmp_path):
    """What is said of a model that is refused, in memory and on disk."""

    def run(model, *more, alike=True):
        said = set()
        for where in ([], ["--offload"]) if alike else ([],):
            code, error, out = prune(model, *where, *more)
            lines = error.strip().splitlines()
            assert code == 1, error
            assert len(lines) == 1, error
            assert "Something went wrong" not in error
            assert not out.exists()
            said.add(lines[0].split("error: ", 1)[1])
        assert len(said) == 1
        assert not (tmp_path / "ran").exists()
        return said.pop()

    return run


@pytest.fixture
def taken(prune, tmp_path):
    """The output of a model that is taken; it is the same in memory and on disk, and nothing is said."""

    def run(model, *more, alike=True, said=""):
        outs = []
        for where in ([], ["--offload"]) if alike else ([],):
            code, error, out = prune(model, *where, *more)
            assert code == 0, error
            assert error.strip() == said
            outs.append(out)
        assert all(digests(out) == digests(outs[0]) for out in outs)
        return outs[0]

    return run


# Nobody gets in


CODE = """
open({ran!r}, "w").close()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = {model_type!r}
class Model(LlamaForCausalLM):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


def bring_code(folder, model_type):
    (folder / "own.py").write_text(CODE.format(ran=str(folder.parent / "ran"), model_type=model_type))
    edit(
        folder / CONFIG,
        model_type=model_type,
        auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
    )


def test_code_of_a_model_is_not_run_unasked_whatever_stdin_says(model, refused):
    bring_code(model, "own")
    assert "--trust-remote-code" in refused(model)


def test_code_of_a_tokenizer_is_not_run_unasked(model, refused):
    bring_code(model, "llama")
    edit(
        model / "tokenizer_config.json",
        tokenizer_class="Tokenizer",
        auto_map={"AutoTokenizer": [None, "own.Tokenizer"]},
    )
    assert "--trust-remote-code" in refused(model)


def test_code_on_the_hub_that_a_config_names_is_not_fetched(model, refused):
    edit(model / CONFIG, model_type="own", auto_map={"AutoConfig": "somebody/else--own.Config"})
    assert "--trust-remote-code" in refused(model)
    edit(model / CONFIG, model_type="llama", auto_map=..., attn_implementation="somebody/kernel")
    assert "'somebody/kernel'" in refused(model)


def test_a_model_that_needs_no_code_of_its_own_is_pruned_without_and_names_none(model, taken):
    bring_code(model, "llama")
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(CODE.format(ran=str(model.parent / "ran"), model_type=""))
    out = taken(model)
    assert "auto_map" not in json.loads((out / CONFIG).read_text())
    assert not (model.parent / "ran").exists()


def test_code_that_is_trusted_is_run_in_memory_and_on_disk_and_saved_with_the_model(model, taken):
    bring_code(model, "llama")
    out = taken(model, "--trust-remote-code")
    assert json.loads((out / CONFIG).read_text())["auto_map"]["AutoModelForCausalLM"] == "own.Model"
    assert (out / "own.py").is_file()


@pytest.fixture
def with_processor(model):
    """The folder of a model that brings code to prepare images, in two files, and a third that nothing names."""
    (model / "processing_own.py").write_text("from .parts_own import part\n")
    for name in ("parts_own", "stray"):
        (model / f"{name}.py").write_text("part = 1\n")
    named = {"AutoImageProcessor": "processing_own.Processor", "AutoProcessor": "somebody/else--processing.Other"}
    edit(model / "preprocessor_config.json", size=3, auto_map=named)
    return model


def test_code_of_a_processor_that_is_trusted_is_carried_along(with_processor, taken):
    out = taken(with_processor, "--trust-remote-code")
    named = json.loads((out / "preprocessor_config.json").read_text())
    assert named == {"size": 3, "auto_map": {"AutoImageProcessor": "processing_own.Processor"}}
    assert sorted(file.name for file in out.glob("*.py")) == ["parts_own.py", "processing_own.py"]
    assert foreign(out) == []


def test_code_of_a_processor_that_is_not_trusted_is_neither_carried_along_nor_named(with_processor, taken):
    out = taken(with_processor)
    assert json.loads((out / "preprocessor_config.json").read_text()) == {"size": 3}
    assert list(out.glob("*.py")) == []


LINKED = [WEIGHTS, CONFIG, "tokenizer.json", "generation_config.json", "preprocessor_config.json", "LICENSE"]


@pytest.mark.parametrize("name", [*LINKED, "chat_template.jinja", "tokenizer.model"])
def test_a_link_that_leads_outside_of_the_folder_is_not_followed(name, model, refused, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    if (model / name).exists():
        (model / name).rename(elsewhere)
    else:
        elsewhere.write_text("{}")
    (model / name).symlink_to(elsewhere)
    assert "leads outside of its folder" in refused(model)


def test_a_folder_of_templates_elsewhere_is_not_read(model, refused, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret.jinja").write_text("secret")
    (model / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    assert "leads outside of its folder" in refused(model)


@pytest.mark.parametrize("name", ["../{name}", "{folder}/{name}", "..\\{name}", ".", ""])
def test_an_index_names_no_files_outside(name, sharded, refused):
    index = json.loads((sharded / INDEX).read_text())
    first = min(index["weight_map"].values())
    shutil.move(sharded / first, sharded.parent / first)
    named = name.format(name=first, folder=sharded.parent)
    index["weight_map"] = {key: named if file == first else file for key, file in index["weight_map"].items()}
    (sharded / INDEX).write_text(json.dumps(index))
    assert "no file of its folder" in refused(sharded)


def test_links_within_a_folder_and_shards_below_it_are_followed(sharded, taken):
    index = json.loads((sharded / INDEX).read_text())
    first, second = sorted(set(index["weight_map"].values()))[:2]
    (sharded / "below").mkdir()
    (sharded / first).rename(sharded / "below" / first)
    (sharded / second).rename(sharded / "below" / second)
    (sharded / second).symlink_to(f"below/{second}")
    index["weight_map"] = {
        key: f"below/{file}" if file == first else file for key, file in index["weight_map"].items()
    }
    (sharded / INDEX).write_text(json.dumps(index))
    taken(sharded)


def test_a_snapshot_of_the_hubs_cache_is_a_folder_like_any_other(model, taken, tmp_path):
    blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/1234"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(model.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    taken(snapshot)


@pytest.mark.parametrize("field", ["tokenizer_file", "vocab_file"])
def test_a_tokenizer_is_not_made_of_a_file_elsewhere_that_its_config_names(field, model, refused, tmp_path):
    shutil.copy(model / "tokenizer.json", tmp_path / "elsewhere.json")
    edit(model / "tokenizer_config.json", **{field: str(tmp_path / "elsewhere.json")})
    assert f"'{field}'" in refused(model)


def test_where_a_tokenizer_was_once_read_from_is_nobodys_concern(model, taken):
    edit(model / "tokenizer_config.json", tokenizer_file="/nowhere/tokenizer.json", special_tokens_map_file=__file__)
    taken(model)


def test_a_tokenizer_is_read_from_its_folder_and_not_from_the_current_one(model, taken, tmp_path, monkeypatch):
    expected = AutoTokenizer.from_pretrained(model)(tiny.text(20))
    tiny.tokenizer(bos=False).save_pretrained(tmp_path / "here")
    edit(model / "tokenizer_config.json", tokenizer_file="tokenizer.json")
    monkeypatch.chdir(tmp_path / "here")
    assert AutoTokenizer.from_pretrained(taken(model))(tiny.text(20)) == expected


@pytest.mark.parametrize("field", ["transformers_weights", "configuration_files"])
def test_a_config_names_no_files_outside(field, model, refused):
    edit(model / CONFIG, **{field: "../config.4.0.json"})
    assert f"'{field}'" in refused(model)


def test_a_tokenizer_names_no_files_outside(model, refused):
    edit(model / "tokenizer_config.json", fast_tokenizer_files=["../tokenizer.4.0.json"])
    assert "'fast_tokenizer_files'" in refused(model)


def test_the_file_that_a_config_names_for_its_weights_is_read_in_memory_and_on_disk(model, taken):
    (model / WEIGHTS).rename(model / "other.safetensors")
    edit(model / CONFIG, transformers_weights="other.safetensors")
    taken(model)


class Runs:
    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_not_opened(zipped, model, prune, tmp_path):
    weights = load_file(model / WEIGHTS)
    (model / WEIGHTS).unlink()
    torch.save(
        {**weights, "evil": Runs(tmp_path / "ran")},
        model / "pytorch_model.bin",
        _use_new_zipfile_serialization=zipped,
    )
    code, error, _ = prune(model)
    assert code == 1
    assert "pytorch_model.bin is damaged, or a pickle with more in it than tensors" in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "ran").exists()


def test_a_pickle_of_tensors_is_read_but_not_left_on_disk(model, prune, taken):
    torch.save(load_file(model / WEIGHTS), model / "pytorch_model.bin")
    (model / WEIGHTS).unlink()
    taken(model, alike=False)
    code, error, _ = prune(model, "--offload")
    assert code == 1
    assert "its weights are in pytorch_model.bin" in error
    assert "leave --offload out" in error


def test_a_model_without_weights_is_to_be_fetched_and_not_to_be_saved_anew(model, refused):
    (model / WEIGHTS).unlink()
    assert refused(model).endswith("nor an index of such. Fetch them, or name another folder.")


def test_a_folder_whose_weights_are_of_another_program_names_their_file(model, refused):
    (model / WEIGHTS).rename(model / "model-q4.gguf")
    assert refused(model).endswith("nor an index of such. Name its file model-q4.gguf instead.")


def test_a_file_of_weights_that_a_config_names_and_that_is_not_there_is_named(model, refused):
    edit(model / CONFIG, transformers_weights="other.safetensors")
    assert "has no file other.safetensors, which its config names" in refused(model)


# Nothing is silently wrong


def test_layers_that_a_config_leaves_out_are_not_lost(model, refused):
    edit(model / CONFIG, num_hidden_layers=5)
    assert "fewer layers than the weights, which would be lost, such as model.layers.5." in refused(model)


def test_layers_that_guess_ahead_may_be_left_out(model, taken):
    def ahead(weights):
        last = {name: weight for name, weight in weights.items() if ".5." in name}
        return weights | {name.replace(".5.", ".6."): weight.clone() for name, weight in last.items()}

    change_weights(model, ahead)
    edit(model / CONFIG, num_nextn_predict_layers=1)
    taken(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("name", "place"),
    [
        (UP, (0, 0)),
        ("model.layers.1.mlp.down_proj.weight", (3, 5)),
        ("model.embed_tokens.weight", (tiny.VOCABULARY - 1, 3)),
        ("model.norm.weight", (3,)),
        ("model.layers.5.self_attn.k_proj.bias", (0,)),
    ],
    ids=["in a layer", "in the layer that goes", "of a token in no text", "in a norm", "in a bias"],
)
def test_a_weight_that_is_not_finite_is_named(name, place, value, model, refused):
    def poison(weights):
        weights[name][place] = value

    change_weights(model, poison)
    assert f"'{name}'" in refused(model, "--eval-samples", "0")


def test_a_weight_that_is_not_finite_in_a_smaller_dtype_is_named_with_the_dtype(model, refused):
    def enlarge(weights):
        weights[UP][0, 0] = 1e6

    change_weights(model, enlarge)
    said = refused(model, "--dtype", "float16")
    assert f"'{UP}'" in said
    assert "bfloat16" in said


def test_two_matrices_that_a_config_calls_tied_are_saved_as_two(model, taken):
    edit(model / CONFIG, tie_word_embeddings=True)
    out = taken(model)
    assert json.loads((out / CONFIG).read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in load_file(out / WEIGHTS)


def test_one_matrix_that_is_stored_twice_stays_tied(checkpoints, tmp_path, taken):
    model = shutil.copytree(checkpoints("llama-tied"), tmp_path / "model")
    change_weights(model, lambda weights: weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()})
    out = taken(model)
    assert json.loads((out / CONFIG).read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(out / WEIGHTS)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_is_refused_with_the_remedy(name, model, refused):
    (model / name).write_text('{"base_model_name_or_path": "somebody/model"}')
    assert "merge_and_unload" in refused(model)
    (model / CONFIG).unlink()
    assert "merge_and_unload" in refused(model)


def test_an_adapter_among_the_weights_is_not_left_out(model, refused):
    change_weights(
        model, lambda weights: weights | {"model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.zeros(2, 32)}
    )
    assert "merge_and_unload" in refused(model)


def test_weights_of_a_dtype_that_no_config_names_are_loaded_as_they_are(model, taken):
    change_weights(model, lambda weights: {name: weight.bfloat16() for name, weight in weights.items()})
    edit(model / CONFIG, dtype=...)
    assert {weight.dtype for weight in load_file(taken(model) / WEIGHTS).values()} == {torch.bfloat16}


@pytest.mark.parametrize("behind", [b"x", b"\0" * 64])
def test_a_file_with_something_behind_its_tensors_is_damaged(behind, model, refused):
    with (model / WEIGHTS).open("ab") as file:
        file.write(behind)
    assert "damaged" in refused(model)


def test_a_config_that_asks_for_tuples_is_no_obstacle(model, llama, taken):
    edit(model / CONFIG, return_dict=False)
    assert digests(taken(model)) == digests(taken(llama))


def test_files_and_tensors_that_are_not_the_models_do_no_harm(model, taken):
    change_weights(model, lambda weights: weights | {"stray": torch.ones(3).to(torch.float8_e4m3fn)})
    (model / "consolidated.safetensors").write_bytes(b"no weights")
    (model / "optimizer.bin").write_bytes(b"nothing")
    taken(model)


def test_one_file_of_weights_goes_before_an_index_in_memory_and_on_disk(sharded, llama, taken):
    shutil.copy(llama / WEIGHTS, sharded)
    taken(sharded)


# One sentence for everything else


FLAWS = {
    "an unknown activation": {"hidden_act": "fancy"},
    "an unknown rope type": {"rope_parameters": {"rope_type": "fancy", "rope_theta": 1e4}},
    "no hidden size": {"hidden_size": 0},
    "no channels": {"intermediate_size": 0},
    "no layers": {"num_hidden_layers": 0},
    "less than no layers": {"num_hidden_layers": -1},
    "a million layers": {"num_hidden_layers": 1_000_000},
    "layers in words": {"num_hidden_layers": "six"},
    "more layers than weights": {"num_hidden_layers": 9},
    "heads that do not divide": {"num_attention_heads": 5},
    "key-value heads that do not divide": {"num_key_value_heads": 3},
    "no vocabulary": {"vocab_size": 0},
    "a hidden size that no machine holds": {"hidden_size": 10**12},
    "no attention that is installed": {"attn_implementation": "flash_attention_2"},
    "no attention that there is": {"attn_implementation": "fancy"},
    "float8": {"dtype": "float8_e4m3fn"},
    "integers": {"dtype": "int64"},
    "no dtype at all": {"dtype": "fancy"},
    "an attribute of torch that is no dtype": {"dtype": "nn"},
    "a list of model types": {"model_type": ["llama"]},
    "packed weights of no kind": {"quantization_config": "fancy"},
    "its size in a text": {"max_position_embeddings": "many"},
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_config_that_cannot_be_is_refused(flaw, model, refused):
    edit(model / CONFIG, **FLAWS[flaw])
    assert str(model) in refused(model)


def test_a_folder_of_which_only_the_config_and_the_index_were_fetched_can_be_planned(sharded, tmp_path, capfd):
    for file in [*sharded.glob("*.safetensors"), *sharded.glob("token*")]:
        file.unlink()
    (tmp_path / "recipe.yaml").write_text("passes: [depth: {layers: 1}]")
    assert main(["compress", "plan", str(tmp_path / "recipe.yaml"), "--model", str(sharded), "--device", "cpu"]) == 0
    assert "depth" in capfd.readouterr().out


def test_a_sliding_window_that_cannot_be_is_found_before_the_passes(checkpoints, tmp_path, prune):
    model = shutil.copytree(checkpoints("gemma3"), tmp_path / "model")
    edit(model / CONFIG, sliding_window=0)
    code, error, _ = prune(model)
    assert code == 1
    assert "does not run" in error


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b'"model"', b"\xff\xfe", b'{"a": ' + b"[" * 100_000])
def test_what_is_no_config_is_refused(text, model, refused):
    (model / CONFIG).write_bytes(text)
    assert str(model) in refused(model)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": [1]}', '{"weight_map": {"a": 1}}', "[" * 100_000],
)
def test_what_is_no_index_is_refused(text, sharded, refused):
    (sharded / INDEX).write_text(text)
    assert "The index of the weights" in refused(sharded)


FILES = [
    CONFIG,
    WEIGHTS,
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "preprocessor_config.json",
]


@pytest.mark.parametrize("kind", ["a folder", "a pipe", "a link that leads nowhere", "a link to itself", "a device"])
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_is_refused_before_it_is_opened(name, kind, model, refused):
    file = model / name
    file.unlink(missing_ok=True)
    if kind == "a folder":
        file.mkdir()
    elif kind == "a pipe":
        os.mkfifo(file)
    else:
        file.symlink_to({"a device": "/dev/zero", "a link to itself": name}.get(kind, "nowhere"))
    said = refused(model)
    assert str(file) in said
    assert "--output" not in said


@pytest.mark.skipif(os.geteuid() == 0, reason="who may read everything is refused nothing")
@pytest.mark.parametrize("name", FILES)
def test_of_a_file_that_may_not_be_read_the_model_is_to_blame(name, model, refused):
    (model / name).touch()
    (model / name).chmod(0)
    said = refused(model)
    assert str(model / name) in said
    assert "--output" not in said


@pytest.mark.parametrize(
    "change",
    [
        {"version": "9"},
        {"model": None},
        {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": ["a b c"]}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}},
    ],
    ids=["a version", "no model", "no vocabulary", "no regular expression"],
)
def test_a_tokenizer_that_cannot_be_read_is_refused(change, model, refused):
    edit(model / "tokenizer.json", **change)
    assert f"The tokenizer of {model} cannot be read" in refused(model)


# What is found before the passes, and what is carried along


GENERATION = {
    "sampling that nothing asks for": ({"temperature": 0.6, "top_p": 0.9}, "do_sample", True),
    "sampling that is switched off": ({"do_sample": False, "temperature": 0.6}, "temperature", None),
    "a token that is none": ({"pad_token_id": -1}, "pad_token_id", None),
    "beams without beams": ({"num_beams": 1, "length_penalty": 2.0}, "length_penalty", None),
    "a temperature in words": ({"do_sample": False, "temperature": "hot"}, "temperature", None),
}


@pytest.mark.parametrize("case", GENERATION)
def test_a_generation_config_that_is_not_valid_is_saved_valid_and_that_is_said(case, model, taken):
    given, field, value = GENERATION[case]
    (model / "generation_config.json").write_text(json.dumps(given))
    shown = "left out" if value is None else value
    said = f"The generation_config.json of {model} is not valid; as it is saved, '{field}' is {shown}."
    out = taken(model, said=said)
    found = GenerationConfig.from_pretrained(out)
    found.validate(strict=True)
    assert getattr(found, field) == value
    if value:
        assert (found.temperature, found.top_p) == (0.6, 0.9)


@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"max_new_tokens": -1}', '{"watermarking_config": {"bias": "x"}, "streamer": 1}']
)
def test_a_generation_config_that_cannot_be_made_valid_is_refused(text, model, refused):
    (model / "generation_config.json").write_text(text)
    assert "generation_config.json" in refused(model)


def test_companions_are_carried_along_and_nothing_else(model, taken):
    carried = [
        "tokenizer.model",
        "tekken.json",
        "chat_template.json",
        "processor_config.json",
        "preprocessor_config.json",
    ]
    carried += ["vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json", "LICENSE", "NOTICE.txt"]
    for name in carried:
        (model / name).write_text("{}")
    (model / "chat_template.jinja").write_text("{{ messages }}")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    for name in (".env", "notes.txt", "training_args.bin"):
        (model / name).write_text("secret")
    out = taken(model)
    assert all((out / name).read_text() == "{}" for name in carried)
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (out / "additional_chat_templates" / "tools.jinja").read_text() == "{{ tools }}"
    assert not any((out / name).exists() for name in (".env", "notes.txt", "training_args.bin"))
    text = tiny.text(50)
    assert AutoTokenizer.from_pretrained(out)(text) == AutoTokenizer.from_pretrained(model)(text)

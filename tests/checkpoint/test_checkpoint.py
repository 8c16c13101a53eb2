from __future__ import annotations

import json
import shutil

import conformance
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoTokenizer

from optimum_prune import Depth, Progress, checkpoint
from optimum_prune.anatomy import find_family, parameters
from optimum_prune.errors import CheckpointError, FamilyError, OutputError, VerificationError

CPU = "cpu"
TOKENS = tiny.windows(3, length=40).tokens


def opened(folder, dtype="auto"):
    return checkpoint.load(checkpoint.open_checkpoint(str(folder)), dtype, CPU, Progress())


@pytest.fixture
def folder(llama, tmp_path):
    """A copy to break."""
    return shutil.copytree(llama, tmp_path / "copy")


def edit(file, **changes):
    plain = json.loads(file.read_text())
    plain.update(changes)
    file.write_text(json.dumps({key: value for key, value in plain.items() if value is not None}))


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_a_checkpoint_loads_as_it_was_saved(name, checkpoints):
    model = opened(checkpoints(name))
    windows = tiny.windows(2)
    assert torch.equal(conformance.logits(model, windows), conformance.logits(tiny.model(name), windows))
    assert not model.training


def test_a_sharded_checkpoint_loads_like_a_single_file(llama, tmp_path):
    tiny.save("llama", tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    sharded, single = opened(tmp_path).state_dict(), opened(llama).state_dict()
    assert all(torch.equal(sharded[name], single[name]) for name in single)


@pytest.mark.parametrize(
    ("asked", "dtype"), [("auto", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)]
)
def test_a_checkpoint_loads_in_the_dtype_that_is_asked_for(asked, dtype, llama):
    assert {parameter.dtype for parameter in opened(llama, asked).parameters()} == {dtype}


def test_a_quantized_checkpoint_is_refused_before_its_weights_are_read(folder):
    edit(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(CheckpointError, match=r"already quantized \(gptq\)"):
        checkpoint.open_checkpoint(str(folder))


def shard_missing(folder):
    tiny.save("llama", folder, max_shard_size="50KB")
    (folder / "model.safetensors").unlink()
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def header_broken(folder):
    (folder / "model.safetensors").write_bytes(b"\x00" * 5000)


def emptied(folder):
    (folder / "model.safetensors").write_bytes(b"")


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def tensor_missing(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.2.self_attn.q_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def tensor_of_another_shape(folder):
    edit(folder / "config.json", intermediate_size=48)


def too_many_layers(folder):
    edit(folder / "config.json", num_hidden_layers=7)


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (shard_missing, "cannot be read"),
        (truncated, "model.safetensors is damaged"),
        (header_broken, "model.safetensors is damaged"),
        (emptied, "model.safetensors is damaged"),
        (no_weights, "cannot be read"),
        (tensor_missing, r"1 weights missing, such as model\.layers\.2\.self_attn\.q_proj\.weight"),
        (tensor_of_another_shape, None),
        (too_many_layers, "weights missing"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_checkpoint_that_is_not_whole_is_refused_in_one_line(harm, why, folder):
    harm(folder)
    with pytest.raises(CheckpointError, match=why) as caught:
        opened(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("/nowhere/model", "does not exist"),
        ("./nowhere", "does not exist"),
        ("~/nowhere/at/all", "does not exist"),
        ("nowhere/at/all", "does not exist"),
        ("", "is no model"),
        ("/tmp/nowhere.gguf", "does not exist"),
        ("nobody/no-such-model", "cannot be opened from the Hub, and no folder is called so"),
    ],
)
def test_a_model_that_is_not_there_is_refused_in_one_line(name, why):
    with pytest.raises(CheckpointError, match=why) as caught:
        checkpoint.open_checkpoint(name)
    assert "\n" not in str(caught.value)


def test_what_is_no_model_is_refused(folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"is no model: it has no config\.json"):
        checkpoint.open_checkpoint(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"is a file, but no \.gguf file"):
        checkpoint.open_checkpoint(str(folder / "model.safetensors"))
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be opened as a model"):
        checkpoint.open_checkpoint(str(folder))


def test_an_architecture_that_transformers_does_not_know_is_named(folder):
    edit(folder / "config.json", model_type="never_heard_of")
    with pytest.raises(FamilyError, match="does not know the architecture 'never_heard_of'"):
        checkpoint.open_checkpoint(str(folder))


def test_an_architecture_that_no_family_knows_gets_the_lines_of_a_plugin(folder, plugins):
    edit(folder / "config.json", model_type="bloom")
    with pytest.raises(FamilyError, match=r"'bloom'.*Known: .*llama") as caught:
        find_family(checkpoint.open_checkpoint(str(folder)).config, plugins.families)
    assert 'model_types=("bloom",)' in str(caught.value)
    assert "[project.entry-points.optimum_prune]" in str(caught.value)


def test_a_tokenizer_that_cannot_be_read_is_refused(folder):
    for file in folder.glob("token*"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"The tokenizer of .* cannot be read") as caught:
        checkpoint.open_checkpoint(str(folder)).tokenizer()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_what_is_saved_verifies(name, plugins, tmp_path):
    model = tiny.model(name)
    conformance.pruned(Depth(layers=2), model, find_family(model.config, plugins.families), tiny.windows(2), plugins)
    checkpoint.save(model, None, tmp_path, Progress())
    found, verified = checkpoint.verify(
        tmp_path, checkpoint.probe(model, TOKENS), torch.float32, CPU, False, Progress()
    )
    assert verified.max_logit_difference == verified.max_logit_difference_with_cache == 0
    assert verified.cached_against_uncached < 1e-4
    assert parameters(found) == parameters(model)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "opt"])
def test_half_precision_verifies_too(name, dtype, checkpoints, tmp_path):
    model = opened(checkpoints(name), dtype)
    checkpoint.save(model, None, tmp_path, Progress())
    found, verified = checkpoint.verify(tmp_path, checkpoint.probe(model, TOKENS), model.dtype, CPU, False, Progress())
    assert found.dtype == model.dtype == getattr(torch, dtype)
    assert verified.max_logit_difference == 0


def drop_tensor(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.2.self_attn.o_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def add_tensor(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.stray.weight"] = torch.zeros(3)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_tensor(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"][0, 0] += 0.05
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def swap_layers(folder):
    weights = load_file(folder / "model.safetensors")
    a, b = "model.layers.2.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"
    weights[a], weights[b] = weights[b], weights[a]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def other_rope(folder):
    edit(folder / "config.json", rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0})


def silence_attention(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.3.self_attn.o_proj.weight"].zero_()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def fewer_layers(folder):
    edit(folder / "config.json", num_hidden_layers=5)


def no_weights_at_all(folder):
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (drop_tensor, r"missing, such as model\.layers\.2\.self_attn\.o_proj\.weight"),
        (add_tensor, r"unexpected, such as model\.layers\.2\.stray\.weight"),
        (change_tensor, "logits differ"),
        (swap_layers, "logits differ"),
        (silence_attention, "logits differ"),
        (other_rope, "logits differ"),
        (fewer_layers, "unexpected"),
        (tensor_of_another_shape, None),
        (truncated, "cannot be loaded again"),
        (no_weights_at_all, "cannot be loaded again"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_what_does_not_survive_saving_fails_verification(harm, why, folder):
    probe = checkpoint.probe(tiny.model("llama"), TOKENS)
    harm(folder)
    with pytest.raises(VerificationError, match=why):
        checkpoint.verify(folder, probe, torch.float32, CPU, False, Progress())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("harm", [swap_layers, other_rope, silence_attention])
def test_half_precision_hides_no_wrong_weights_from_verification(harm, dtype, folder):
    probe = checkpoint.probe(opened(folder, dtype), TOKENS)
    harm(folder)
    with pytest.raises(VerificationError, match="logits differ"):
        checkpoint.verify(folder, probe, getattr(torch, dtype), CPU, False, Progress())


def test_a_model_that_is_wrong_with_a_cache_fails_verification(tmp_path):
    """As when surviving layers keep the numbers they had."""
    model = tiny.model("llama")
    model.model.layers[3].self_attn.layer_idx = 2
    checkpoint.save(model, None, tmp_path, Progress())
    with pytest.raises(VerificationError, match="logits differ"):
        checkpoint.verify(tmp_path, checkpoint.probe(model, TOKENS), torch.float32, CPU, False, Progress())


@pytest.mark.parametrize("length", [2, 3, 200])
def test_windows_of_any_length_can_be_probed(length):
    model = tiny.model("llama")
    probe = checkpoint.probe(
        model, torch.randint(3, 300, (1, min(length, 128)), generator=torch.Generator().manual_seed(0))
    )
    assert probe.plain.shape == probe.cached.shape
    assert_close(probe.plain, probe.cached, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral"])
def test_the_rotary_frequency_stands_where_older_transformers_look(name, tmp_path):
    model = tiny.model(name)
    checkpoint.save(model, None, tmp_path, Progress())
    plain = json.loads((tmp_path / "config.json").read_text())
    assert plain["rope_theta"] == model.config.rope_parameters["rope_theta"]
    assert name != "llama" or plain["rope_theta"] == 50_000


@pytest.mark.parametrize("name", ["gemma3", "gemma3-vision"])
def test_both_rotary_frequencies_stand_where_older_transformers_look(name, tmp_path):
    model = tiny.model(name)
    checkpoint.save(model, None, tmp_path, Progress())
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
    checkpoint.save(model, None, tmp_path / "saved", Progress())
    plain = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert plain["rope_theta"] == 20_000
    assert plain["rope_scaling"] == {"type": "linear", "rope_type": "linear", "factor": 4.0}
    assert torch.equal(
        conformance.logits(opened(tmp_path / "saved"), tiny.windows(2)), conformance.logits(model, tiny.windows(2))
    )


@pytest.mark.parametrize("bos", [True, False], ids=["bos", "no-bos"])
def test_the_tokenizer_is_saved_with_the_model_under_a_class_that_older_transformers_know(bos, tmp_path):
    tokenizer = tiny.tokenizer(bos)
    checkpoint.save(tiny.model("llama"), tokenizer, tmp_path, Progress())
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    found = AutoTokenizer.from_pretrained(tmp_path)
    assert found(tiny.text(50))["input_ids"] == tokenizer(tiny.text(50))["input_ids"]


def test_a_place_that_cannot_be_written_is_an_error_of_the_output(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        checkpoint.save(tiny.model("llama"), None, tmp_path / "file" / "model", Progress())


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_sizes_are_those_of_the_files(name, checkpoints):
    folder = checkpoints(name)
    model = tiny.model(name)
    size = (folder / "model.safetensors").stat().st_size
    assert checkpoint.bytes_on_disk(folder) == size
    assert checkpoint.weight_bytes(model) == 4 * parameters(model)["total"]
    assert size - 20_000 < checkpoint.weight_bytes(model) < size

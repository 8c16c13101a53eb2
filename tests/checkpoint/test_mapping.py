"""Models mapped from checkpoints that hold other tensors than the model does: the same to the bit, and never all in memory."""

import hashlib
import sys
import weakref
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny
import torch
from harms import opened, stored
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.core_model_loading import Chunk, ConversionOps, Transpose, WeightConverter

from optimum_prune import Progress
from optimum_prune.checkpoint import mapping, saving
from optimum_prune.checkpoint.loading import Loading, reload
from optimum_prune.checkpoint.saving import bytes_on_disk, weight_bytes
from optimum_prune.errors import CheckpointError
from optimum_prune.machine.mapped_weights import MappedWeights


@pytest.fixture
def weights(tmp_path):
    return MappedWeights(tmp_path / "changed")


def assert_equal(model, expected):
    found, expected = model.state_dict(), expected.state_dict()
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    assert {name: value.dtype for name, value in found.items()} == {n: value.dtype for n, value in expected.items()}


def in_memory(parameters, weights):
    return sum(each.nbytes for each in parameters if weights.lies_in_memory(each))


@contextmanager
def noted(look):
    """Calls a function whenever a parameter that lies in memory is put into a module, with all that were before."""
    put = weakref.WeakSet()

    def note(_, __, parameter):
        if parameter is not None and parameter.device.type == "cpu":
            look(list(put))
            put.add(parameter)

    handle = register_module_parameter_registration_hook(note)
    try:
        yield
    finally:
        handle.remove()


# Loaded


@pytest.mark.parametrize("at_once", [1, mapping.AT_ONCE])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("family", [*tiny.MIXTURES, "llama-tied", "gpt2"])
def test_a_mapped_model_is_the_one_that_transformers_loads(family, dtype, at_once, checkpoints, weights, monkeypatch):
    monkeypatch.setattr(mapping, "AT_ONCE", at_once)
    expected = AutoModelForCausalLM.from_pretrained(
        checkpoints(family), dtype=dtype if dtype == "auto" else torch.bfloat16
    )
    model = opened(checkpoints(family), dtype, weights)
    assert_equal(model, expected)
    assert in_memory(model.parameters(), weights) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [*tiny.MIXTURES, "llama"])
def test_what_is_converted_lies_in_files_before_the_next_is(family, dtype, checkpoints, weights, monkeypatch):
    monkeypatch.setattr(mapping, "AT_ONCE", 1)
    folder, held = checkpoints(family), []
    with noted(lambda put: held.append(in_memory(put, weights))):
        reload(folder, Loading(dtype, "cpu", weights=weights))
    assert len(held) > tiny.LAYERS
    assert max(held) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="which memory lies in files is known on Linux only")
def test_little_memory_is_taken_that_lies_in_no_file(weights, tmp_path, monkeypatch):
    sizes = {**tiny.SIZES, "hidden_size": 256, "num_experts": 16, "moe_intermediate_size": 256}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, head_dim=8)).bfloat16()
    model.save_pretrained(tmp_path / "model")
    del model
    monkeypatch.setattr(mapping, "AT_ONCE", 2**20)
    before, taken = anonymous(), []
    with noted(lambda _: taken.append(anonymous() - before)):
        loaded = reload(tmp_path / "model", Loading(torch.float32, "cpu", weights=weights))  # converted, and cast
    assert max(taken) < 0.5 * weight_bytes(loaded)
    assert weight_bytes(loaded) > 7e7
    assert bytes_on_disk(tmp_path / "changed") < 1.01 * weight_bytes(loaded)  # each was written once


def anonymous():
    """Bytes of this process's memory that lie in no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def test_what_transformers_makes_itself_is_not_written_before_it_has_its_values(folder, weights, monkeypatch):
    monkeypatch.setattr(mapping, "AT_ONCE", 1)
    name = "model.layers.2.input_layernorm.weight"
    kind = AutoModelForCausalLM.from_pretrained(folder).__class__
    monkeypatch.setattr(kind, "_keys_to_ignore_on_load_missing", [name])
    with stored(folder) as tensors:
        del tensors[name]
    model = opened(folder, weights=weights)
    weights.release(model)
    assert torch.equal(model.get_parameter(name), torch.ones(32))


def test_a_disk_that_is_full_is_no_fault_of_the_checkpoint(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(mapping, "AT_ONCE", 1)

    class Full(MappedWeights):
        def keep(self, tensors, written=None):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left") as caught:
        opened(checkpoints("mixtral"), "bfloat16", Full(tmp_path / "changed"))
    assert not isinstance(caught.value, CheckpointError)


# Saved


def digest(folder):
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@contextmanager
def written(weights, monkeypatch):
    """The bytes of the tensors that lie in memory when they are about to be written, one number for each file."""
    found, write = [], mapping.write

    def look(tensors, *arguments):
        found.append(in_memory(tensors.values(), weights))
        write(tensors, *arguments)

    monkeypatch.setattr(mapping, "write", look)
    yield found


@pytest.mark.parametrize("family", [*tiny.MIXTURES, "llama"])
def test_what_is_saved_of_a_mapped_model_lies_in_files(family, checkpoints, weights, tmp_path, monkeypatch):
    model = opened(checkpoints(family), "bfloat16", weights)
    files = len(list((tmp_path / "changed").iterdir()))
    with written(weights, monkeypatch) as held:
        saving.save(model, None, tmp_path / "out", Progress(), weights)
    assert held == [0]
    assert len(list((tmp_path / "changed").iterdir())) == files  # nothing had to be written twice
    opened(checkpoints(family), "bfloat16").save_pretrained(tmp_path / "expected")
    assert digest(tmp_path / "out") == digest(tmp_path / "expected")


class _Flat(ConversionOps):
    """Goes on with what it made contiguous, which takes a copy."""

    def convert(self, input_dict, source_patterns, target_patterns, **_):
        ((_, (tensor,)),) = input_dict.items()
        return {target_patterns[0]: tensor.T.contiguous().view(-1)}

    @property
    def reverse_op(self):
        return self


GATE, UP, DOWN = (f"mlp.{name}_proj.weight" for name in ("gate", "up", "down"))


@pytest.mark.parametrize(
    "conversion",
    [
        lambda: WeightConverter("mlp.both.weight", [GATE, UP], [Chunk(dim=0)]),
        lambda: WeightConverter("mlp.turned.weight", DOWN, [Transpose(0, 1)]),
        lambda: WeightConverter("mlp.turned.weight", DOWN, [_Flat()]),
    ],
    ids=["joined", "turned", "turned and flat"],
)
def test_what_takes_a_copy_to_be_saved_is_put_in_files_too(conversion, llama, weights, tmp_path, monkeypatch):
    for folder, where in (("out", weights), ("expected", None)):
        model = opened(llama, weights=where)
        model._weight_conversions = [conversion()]
        with written(weights, monkeypatch) as held:
            saving.save(model, None, tmp_path / folder, Progress(), where)
        assert held == ([0] if where else [])
    assert digest(tmp_path / "out") == digest(tmp_path / "expected") != digest(llama)

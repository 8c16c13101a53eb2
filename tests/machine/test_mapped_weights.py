"""Weights on disk: read when they are used, and their memory given back."""

import copy

import pytest
import torch
from pages import resident
from safetensors.torch import save_file
from torch import nn

from optimum_prune.machine.mapped_weights import MappedWeights, held


@pytest.fixture
def mapped(tmp_path):
    tensors = {"weight": torch.randn(512, 2048), "bias": torch.randn(512)}
    save_file(tensors, tmp_path / "file.safetensors")
    weights = MappedWeights(tmp_path / "changed")
    linear = nn.Linear(2048, 512)
    for name, tensor in weights.map(tmp_path / "file.safetensors").items():
        getattr(linear, name).data = tensor
    return weights, linear, tensors


def test_a_layer_gives_its_memory_back_when_it_has_run(mapped):
    weights, linear, tensors = mapped
    weights.attach(nn.ModuleDict({"layers": nn.ModuleList([linear])}))
    inputs = torch.randn(3, 2048)
    expected = nn.functional.linear(inputs, tensors["weight"], tensors["bias"])
    assert torch.equal(linear(inputs), expected)
    assert resident(linear.weight) < 2**18 < linear.weight.nbytes
    assert torch.equal(linear(inputs), expected)


@pytest.mark.parametrize("copied", [False, True], ids=["itself", "a copy of it"])
def test_a_layer_that_is_held_gives_its_memory_back_at_the_end(copied, mapped):
    weights, linear, _ = mapped
    weights.attach(nn.ModuleDict({"layers": nn.ModuleList([linear])}))
    layer = copy.deepcopy(linear, {id(linear.weight): linear.weight}) if copied else linear
    with held(layer):
        layer(torch.randn(3, 2048))
        assert resident(linear.weight) >= linear.weight.nbytes
    assert resident(linear.weight) == 0


def test_a_layer_that_is_in_memory_can_be_held_too():
    linear = nn.Linear(3, 4)
    with held(linear):
        assert linear(torch.ones(2, 3)).shape == (2, 4)


def test_what_changes_is_written_and_mapped_anew(mapped, tmp_path):
    weights, linear, tensors = mapped
    linear.weight = nn.Parameter(linear.weight.detach()[:, ::2].clone())
    weights.write_changes(linear)
    assert torch.equal(linear.weight, tensors["weight"][:, ::2])
    weights.release(linear)
    assert resident(linear.weight) == 0
    assert torch.equal(linear.weight, tensors["weight"][:, ::2])
    assert len(list((tmp_path / "changed").iterdir())) == 1
    weights.write_changes(linear)  # nothing changed since
    assert len(list((tmp_path / "changed").iterdir())) == 1

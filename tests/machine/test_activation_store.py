"""Activations on disk: the same values, and the memory given back."""

import torch
from pages import resident

from optimum_prune.machine.activation_store import MappedActivations


def test_activations_are_in_memory_if_they_fit_and_in_files_if_not(tmp_path):
    activations = MappedActivations(tmp_path / "activations", 1000)
    small, large = torch.arange(100.0), torch.randn(300, 1000).bfloat16()
    assert activations.store(small) is small
    stored = activations.store(large)
    assert torch.equal(stored, large)
    activations.release(stored)
    assert resident(stored) == 0
    assert torch.equal(stored, large)


def test_activations_have_room_again_when_something_is_gone(tmp_path):
    activations = MappedActivations(tmp_path / "activations", 1000)
    first = activations.store(torch.arange(200.0))
    second = torch.arange(200.0)
    assert activations.store(second) is not second
    del first
    assert activations.store(second) is second


def test_activations_leave_no_file_behind(tmp_path):
    activations = MappedActivations(tmp_path / "activations", 0)
    stored = activations.store(torch.randn(10))
    assert list((tmp_path / "activations").iterdir()) == []
    assert stored.shape == (10,)

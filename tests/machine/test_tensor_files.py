"""Safetensors files, written a piece at a time."""

import torch
from safetensors.torch import save_file

from optimum_prune.machine.tensor_files import write


def test_files_are_written_as_safetensors_does(tmp_path):
    kinds = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
    kinds += [torch.int8, torch.uint8, torch.bool]
    tensors = {f"ünder {kind}": (10 * torch.randn(3, 5)).to(kind) for kind in kinds}
    tensors |= {"empty": torch.empty(0, 3), "scalar": torch.tensor(1.5), "strided": torch.randn(6, 4).T}
    write(tensors, tmp_path / "ours", {"format": "pt"})
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()

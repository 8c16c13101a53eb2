"""In which dtype a machine multiplies fast."""

from __future__ import annotations

import torch


def bfloat16_is_fast(device: torch.device) -> bool:
    """Whether products of matrices in bfloat16 take less time on a device than in float32.

    On CPUs only tiles (AMX) multiply it faster; the vector instructions that some have for it do so at half of float32's rate.
    """
    if device.type != "cpu":
        return True
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(supported is not None and supported())

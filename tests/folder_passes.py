"""Passes from folder to folder that need no library of their own, in a module that another interpreter can import."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from optimum_prune import CheckpointSpec, FolderPass, Job, Runtime, Stage, hookimpl, open_in_transformers, option


@dataclass(frozen=True, kw_only=True)
class Halve(FolderPass):
    """Stores weights in half precision."""

    name: ClassVar[str] = "halve"
    stage: ClassVar[Stage] = Stage.QUANTIZE
    takes_heterogeneous: ClassVar[bool] = True
    usual_tolerance: ClassVar[float] = 0.2
    group_size: int = option("Weights of a group.", 1, at_least=1)
    unpacks = True

    def check(self, spec: CheckpointSpec) -> None:
        spec.check_groups(self.group_size, self.name)

    def convert(self, job: Job) -> Mapping[str, Any]:
        model = open_in_transformers(job.source, "cpu").model
        model.to(torch.bfloat16).save_pretrained(job.target)
        return {
            "layers": model.config.num_hidden_layers,
            "windows": len(job.calibration.tokens),
            "process": os.getpid(),
        }

    def open(self, folder: Path, device: str) -> Runtime:
        return open_in_transformers(folder, device)


@dataclass(frozen=True, kw_only=True)
class Archive(FolderPass):
    """Writes the weights once more, or fails on the way."""

    name: ClassVar[str] = "archive"
    stage: ClassVar[Stage] = Stage.EXPORT
    takes_quantized: ClassVar[bool] = True
    usual_tolerance: ClassVar[float] = 0.05
    fail: Literal["", "raise", "end", "noise", "interrupt"] = option("How to fail.", "")

    def check(self, spec: CheckpointSpec) -> None:
        """Takes anything."""

    def convert(self, job: Job) -> Mapping[str, Any]:
        print("archiving")
        runtime = open_in_transformers(job.source, "cpu", "float32")
        if self.fail == "raise":
            raise RuntimeError("the exporter broke\non its second line")
        if self.fail == "end":
            os._exit(3)
        if self.fail == "interrupt":
            raise KeyboardInterrupt
        if self.fail == "noise":
            with torch.no_grad():
                for parameter in runtime.model.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        runtime.model.save_pretrained(job.target)
        return {}

    def open(self, folder: Path, device: str) -> Runtime:
        return open_in_transformers(folder, device)


@hookimpl
def passes():
    yield Halve
    yield Archive

"""AutoRound (Cheng and others, 2024, arXiv 2309.05516): weights in 2 to 8 bits, by Intel's auto-round.

Which way each weight is rounded, and the range of each group, are learned by signed gradient descent, one decoder layer after
the other, so that the layer puts out the same on the recipe's windows. Embeddings and output stay as they are.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from optimum_prune import (
    CheckpointSpec,
    FolderPass,
    Job,
    Runtime,
    Stage,
    hookimpl,
    load_model,
    open_in_transformers,
    option,
)
from optimum_prune.errors import PassError, RecipeError
from optimum_prune.machine.isolation import isolated
from optimum_prune.passes.folder import tolerance_by_bits

if TYPE_CHECKING:
    from pathlib import Path

    from jaxtyping import Int
    from torch import Tensor

    from optimum_prune import Windows

MULTIPLE = 16
"""Kernels take groups whose size is a multiple of this."""


@dataclass(frozen=True, kw_only=True)
class AutoRound(FolderPass):
    """AutoRound: weights of 2 to 8 bits, with roundings and ranges learned on the recipe's text (auto-round)."""

    name: ClassVar[str] = "auto-round"
    stage = Stage.QUANTIZE
    requires: ClassVar[Mapping[str, str]] = {"auto_round": "auto-round>=0.16", "gptqmodel": "gptqmodel>=7.2"}
    takes_heterogeneous: ClassVar[bool] = True
    takes_experts: ClassVar[bool] = False
    bits: int = option("Bits of a weight; 4 in the format auto_awq.", 4, one_of=(2, 3, 4, 8))
    group_size: int = option(
        "Input channels that share a scale; -1 means all of them.", 64, at_least=MULTIPLE, or_else=-1
    )
    sym: bool = option("Whether the range of a group is symmetric about zero.", True)
    iters: int = option("Steps of learning for each decoder layer; 0 rounds to nearest.", 200, at_least=0)
    disable_opt_rtn: bool = option("With 0 iters, do not search for the best ranges, and use no text.", False)
    batch_size: int = option("Windows of a step.", 8, at_least=1)
    lr: float | None = option("Learning rate; 1 / iters if not given.", None, above=0)
    format: Literal["auto_round", "auto_gptq", "auto_awq"] = option("Who is to read it.", "auto_round")

    def __post_init__(self) -> None:
        """Refuses what auto-round cannot pack."""
        super().__post_init__()
        if self.format == "auto_awq" and self.bits != 4:
            raise RecipeError(
                f"auto-round has bits {self.bits} and the format auto_awq, which has only 4. Give bits 4, or format auto_round."
            )
        if self.group_size != -1 and self.group_size % MULTIPLE:
            raise RecipeError(
                f"auto-round has group_size {self.group_size}, for which it has no kernel. Give a multiple of {MULTIPLE}, or -1."
            )

    @property
    def usual_tolerance(self) -> float:
        """The tolerance by the bits of a weight."""
        return tolerance_by_bits(self.bits)

    def check(self, spec: CheckpointSpec) -> None:
        """Groups must divide the widths."""
        spec.check_groups(self.group_size, self.name)

    def convert(self, job: Job) -> Mapping[str, Any]:
        """Quantizes the model in place, one decoder layer after the other."""
        windows = whole_windows(job.calibration)
        with _by_itself(job.seed), job.progress.libraries():
            from auto_round import AutoRound as Library

            model = load_model(job.source, device_map=job.device, trust_remote_code=job.trust_remote_code)
            learning = {"disable_opt_rtn": self.disable_opt_rtn} if self.iters == 0 else {"lr": self.lr}
            rounding = Library(
                model,
                job.tokenizer(),
                scheme={"bits": self.bits, "group_size": self.group_size, "sym": self.sym, "data_type": "int"},
                iters=self.iters,
                dataset=[{"input_ids": w[None], "attention_mask": torch.ones_like(w)[None]} for w in windows],
                seqlen=windows.shape[1],
                nsamples=len(windows),
                batch_size=min(self.batch_size, len(windows)),
                seed=job.seed,
                device_map=job.device,
                enable_torch_compile=False,
                **learning,
            )
            try:
                rounding.quantize_and_save(str(job.target), format=self.format)
            except SystemExit as error:  # auto-round's way to say that something cannot be done
                raise PassError(f"auto-round gave up on {job.source}; its log says why.") from error
            _move_up(job.target)
        return {"windows": len(windows), "tokens": windows.numel()}

    def open(self, folder: Path, device: str) -> Runtime:
        """The checkpoint as stock transformers reads it."""
        with _by_itself():
            return open_in_transformers(folder, device)


def whole_windows(calibration: Windows) -> Int[Tensor, "windows length"]:
    """The windows without padding, which auto-round would count; if all have some, each without it, cut to the shortest."""
    lengths = calibration.mask.sum(1)
    length = int(lengths.max()) if (lengths == calibration.mask.shape[1]).any() else int(lengths.min())
    rows = zip(calibration.tokens, calibration.mask, strict=True)
    return torch.stack([tokens[mask][:length] for tokens, mask in rows if mask.sum() >= length])


def _move_up(folder: Path) -> None:
    """auto-round writes into a folder inside the one it is given, unless that has a name it likes."""
    for inner in [path for path in folder.iterdir() if (path / "config.json").is_file()]:
        for file in inner.iterdir():
            shutil.move(file, folder / file.name)
        inner.rmdir()


@contextmanager
def _by_itself(seed: int = 0) -> Iterator[None]:
    """Keeps auto-round and its libraries from changing the process, and from saying anything but errors."""
    with isolated("gptqmodel", seed=seed):
        from auto_round.logger import logger

        loudness = logger.level
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(loudness)


@hookimpl
def passes() -> Iterator[type[FolderPass]]:
    """What this plugin adds."""
    yield AutoRound

"""AutoRound (Cheng and others, 2024, arXiv 2309.05516): weights in 2 to 8 bits, by Intel's auto-round.

Which way each weight is rounded, and the range of each group, are learned by signed gradient descent, one decoder layer after
the other, so that the layer puts out the same on the recipe's windows. Embeddings and output stay as they are.
"""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from optimum_prune import FolderPass, Job, Prospect, Runtime, Stage, hookimpl, load_model, open_in_transformers, option
from optimum_prune.checkpoint import add_older_fields
from optimum_prune.errors import PassError, RecipeError

if TYPE_CHECKING:
    from pathlib import Path

    from jaxtyping import Int
    from torch import Tensor

    from optimum_prune import Calibration

TOLERANCES = {2: 1.2, 3: 0.9, 4: 0.6, 8: 0.2}
BITS = tuple(TOLERANCES)


@dataclass(frozen=True, kw_only=True)
class AutoRound(FolderPass):
    """AutoRound: weights of 2 to 8 bits, with roundings and ranges learned on the recipe's text (auto-round)."""

    name: ClassVar[str] = "auto-round"
    stage = Stage.QUANTIZE
    requires: ClassVar[Mapping[str, str]] = {"auto_round": "auto-round>=0.16", "gptqmodel": "gptqmodel>=7.2"}
    takes_odd: ClassVar[bool] = True
    takes_experts: ClassVar[bool] = False
    bits: int = option("Bits of a weight: 2, 3, 4 or 8; 4 in the format auto_awq.", 4)
    group_size: int = option("Input channels that share a scale; -1 means all of them.", 64)
    sym: bool = option("Whether the range of a group is symmetric about zero.", True)
    iters: int = option("Steps of learning for each decoder layer; 0 rounds to nearest.", 200)
    disable_opt_rtn: bool = option("With 0 iters, do not search for the best ranges, and use no text.", False)
    batch_size: int = option("Windows of a step.", 8)
    lr: float | None = option("Learning rate; 1 / iters if not given.", None)
    format: Literal["auto_round", "auto_gptq", "auto_awq"] = option("Who is to read it.", "auto_round")

    def __post_init__(self) -> None:
        """Refuses what auto-round cannot pack."""
        if self.bits not in BITS:
            raise RecipeError(
                f"auto-round has bits {self.bits}, which it cannot pack. Give {', '.join(map(str, BITS))}."
            )
        if self.format == "auto_awq" and self.bits != 4:
            raise RecipeError(
                f"auto-round has bits {self.bits} and the format auto_awq, which has only 4. Give bits 4, or format auto_round."
            )
        if self.group_size != -1 and (self.group_size < 16 or self.group_size % 16):
            raise RecipeError(f"auto-round has a group_size of {self.group_size}. Give a multiple of 16, or -1.")
        if self.iters < 0 or self.batch_size < 1:
            raise RecipeError(
                f"auto-round has iters {self.iters} and batch_size {self.batch_size}. Give at least 0 and at least 1."
            )

    @property
    def usual_tolerance(self) -> float:
        """By the bits."""
        return TOLERANCES[self.bits]

    def check(self, prospect: Prospect) -> None:
        """Groups must divide the widths."""
        prospect.check_groups(self.group_size, self.name)

    def convert(self, job: Job) -> Mapping[str, Any]:
        """Quantizes the model in place, one decoder layer after the other."""
        from transformers import AutoTokenizer

        windows = whole_windows(job.calibration)
        with _by_itself(job.seed), job.progress.libraries():
            from auto_round import AutoRound as Library

            model = load_model(job.source, device_map=job.device, trust_remote_code=job.trust_remote_code)
            tokenizer = AutoTokenizer.from_pretrained(job.source, trust_remote_code=job.trust_remote_code)
            learning = {"disable_opt_rtn": self.disable_opt_rtn} if self.iters == 0 else {"lr": self.lr}
            rounding = Library(
                model,
                tokenizer,
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
            tokenizer.save_pretrained(job.target)
        add_older_fields(job.target)
        return {"windows": len(windows), "tokens": windows.numel()}

    def open(self, folder: Path, device: str) -> Runtime:
        """The checkpoint as stock transformers reads it."""
        with _by_itself():
            return open_in_transformers(folder, device)


def whole_windows(calibration: Calibration) -> Int[Tensor, "windows length"]:
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
    """Keeps auto-round and its libraries from printing, and from changing the environment, random numbers, warnings and the root logger."""
    environment, level, handlers = dict(os.environ), logging.root.level, list(logging.root.handlers)
    with redirect_stdout(StringIO()), warnings.catch_warnings(), torch.random.fork_rng():
        torch.manual_seed(seed)
        import gptqmodel  # noqa: F401 - which changes most
        from auto_round.logger import logger

        loudness = logger.level
        try:
            logging.root.setLevel(level)
            logger.setLevel(logging.ERROR)
            yield
        finally:
            logger.setLevel(loudness)
            logging.root.setLevel(level)
            logging.root.handlers[:] = handlers
            for name in set(os.environ) - set(environment):
                del os.environ[name]
            os.environ.update(environment)


@hookimpl
def passes() -> Iterator[type[FolderPass]]:
    """What this plugin adds."""
    yield AutoRound

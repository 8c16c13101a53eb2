"""The check of a pass from folder to folder: what it writes is opened, run, and near to what it was made from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from transformers import AutoConfig

from optimum_prune.anatomy.decoder import Decoder
from optimum_prune.checkpoint.opening import meta_model
from optimum_prune.conversion.conversion import Conversion, convert_and_judge
from optimum_prune.evaluation.comparison import ReferenceOutputs
from optimum_prune.evaluation.runtime import open_in_transformers
from optimum_prune.hooks.plugins import load
from optimum_prune.machine.progress import Progress
from optimum_prune.passes.base import Stage
from optimum_prune.passes.checkpoint_spec import CheckpointSpec
from optimum_prune.passes.folder import FolderPass, Job
from optimum_prune.testing.models import random_windows


def check_conversion(step: FolderPass, checkpoint: Path, target: Path) -> Conversion:
    """Checks a quantizer or an exporter on the checkpoint of a small model with its tokenizer.

    What it writes must open in its runtime, compute logits within its tolerance, and generate with its cache as it scores without
    one; an exporter's `example.py` must run.

    Args:
        target: an empty folder.

    Returns:
        What was written, and how far it is from what it was made from.

    Raises:
        AssertionError: the example does not run.
        OptimumPruneError: whatever would end a run.
    """
    config = AutoConfig.from_pretrained(checkpoint)
    decoder = Decoder.of(meta_model(config), load().families)
    step.check(CheckpointSpec(config, decoder.family, decoder.shape()))
    windows = random_windows(decoder.config.vocab_size, count=8, length=32)
    dtype = "float32" if step.stage is Stage.EXPORT else "auto"
    expected = ReferenceOutputs.of(open_in_transformers(checkpoint, "cpu", dtype), windows.tokens)
    job = Job(checkpoint, target, windows, "cpu", Progress())
    done = convert_and_judge(step, job, expected, random_windows(decoder.config.vocab_size, count=4, seed=1))
    example = target / "example.py"
    if step.stage is Stage.EXPORT and example.is_file():
        ran = subprocess.run([sys.executable, example], capture_output=True, text=True, check=False, cwd=target.parent)
        assert ran.returncode == 0, f"{example} fails: {ran.stderr[-2000:]}"
    return done

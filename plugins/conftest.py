"""What the tests of all plugins share: tiny checkpoints to convert, and the check that every pass from folder to folder must stand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import pytest
import tiny
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_prune import Cuts, Decision, Job, Progress, checkpoint, load_model, surgery
from optimum_prune.anatomy import find_family
from optimum_prune.conversion import carry_out
from optimum_prune.plugins import load
from optimum_prune.prospect import Prospect
from optimum_prune.runtime import Expected, TransformersRuntime
from optimum_prune.subject import meta_model

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def plugins():
    """All that is installed."""
    return load()


SIZES = {**tiny.SIZES, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
"""Wide enough for groups of 64 weights."""


def _model() -> LlamaForCausalLM:
    theta = {"rope_type": "default", "rope_theta": 50_000.0}
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, rope_parameters=theta, tie_word_embeddings=True, initializer_range=0.08)
    return LlamaForCausalLM(config).eval()


def _save(model, folder: Path) -> Path:
    checkpoint.save(model, tiny.tokenizer(), folder, Progress())
    return folder


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    """The checkpoint of a tiny Llama in float32, with its tokenizer; all widths are multiples of 64, embeddings are tied."""
    return _save(_model(), tmp_path_factory.mktemp("checkpoints") / "small")


@pytest.fixture(scope="session")
def odd(tmp_path_factory, plugins) -> Path:
    """The same with FFN widths that differ by layer, one layer without attention and one without FFN."""
    model = _model()
    family = find_family(model.config, plugins.families)
    blocks = {1: ("feed_forward",), 2: ("attention",)}
    channels = {0: tuple(range(128)), 3: tuple(range(192))}
    surgery.carry_out(model, family, Decision(Cuts(blocks=blocks, channels=channels)))
    surgery.settle(model, family)
    return _save(model, tmp_path_factory.mktemp("checkpoints") / "odd")


@pytest.fixture(scope="session")
def prospect_of(plugins):
    """Folder -> what a pass may know of it beforehand."""

    def prospect(folder: Path) -> Prospect:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(folder)
        family = find_family(config, plugins.families)
        return Prospect(config, family, family.shape(meta_model(config)))

    return prospect


@pytest.fixture
def convert(tmp_path, prospect_of):
    """Checks, carries out and judges a pass on a checkpoint; returns the folder that it wrote and what is known of it."""

    def convert(step, source: Path, dtype: str = "float32"):
        step.check(prospect_of(source))
        target = tmp_path / step.name
        target.mkdir()
        windows = tiny.windows(count=8, length=32)
        expected = Expected.of(TransformersRuntime(load_model(source, dtype=dtype)), windows.tokens)
        job = Job(source, target, windows, "cpu", Progress())
        return target, carry_out(step, job, expected, tiny.windows(count=4, length=24, seed=1))

    return convert


@pytest.fixture
def run_example():
    """Runs the `example.py` that an artefact folder holds, away from this package, and returns what it prints."""

    def run(folder: Path, *arguments: str) -> str:
        command = [sys.executable, str(folder / "example.py"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder.parent, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run

"""What the tests of all plugins share: tiny checkpoints to convert, and the check that every pass from folder to folder must stand."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
sys.path.remove(str(Path(__file__).parent))  # where folders are called like the libraries that they stand on
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_prune import Cuts, Decision, Job, Progress, Windows, load_model
from optimum_prune.anatomy.decoder import Decoder
from optimum_prune.checkpoint import saving
from optimum_prune.checkpoint.opening import meta_model
from optimum_prune.conversion.conversion import convert_and_judge
from optimum_prune.evaluation.comparison import ReferenceOutputs
from optimum_prune.evaluation.runtime import TransformersRuntime
from optimum_prune.hooks.plugins import load
from optimum_prune.passes.checkpoint_spec import CheckpointSpec
from optimum_prune.surgery import config, operation

torch.set_num_threads(1)


HEAVY = {"auto-round", "executorch", "gptq", "llm-compressor", "openvino"}
"""Folders of plugins whose engines take minutes; `make test-engines` runs them."""


def pytest_collection_finish():
    """Lets the garbage collector pass over what is there before any test."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Tells what runs a heavy engine from what only looks at options and sizes."""
    for item in items:
        runs = {"convert", "converted", "quantize"} & set(item.fixturenames)
        if runs and item.path.parent.parent.name in HEAVY:
            item.add_marker(pytest.mark.engines)


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
    saving.save(model, tiny.tokenizer(), folder, Progress())
    return folder


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    """The checkpoint of a tiny Llama in float32, with its tokenizer; all widths are multiples of 64, embeddings are tied."""
    return _save(_model(), tmp_path_factory.mktemp("checkpoints") / "small")


@pytest.fixture(scope="session")
def heterogeneous(tmp_path_factory, plugins) -> Path:
    """The same with FFN widths that differ by layer, one layer without attention and one without FFN."""
    decoder = Decoder.of(_model(), plugins.families)
    channels = Cuts.along("channels", {0: tuple(range(128)), 3: tuple(range(192))})
    blocks = Cuts(blocks={1: ("feed_forward",), 2: ("attention",)})
    operation.carry_out(decoder, Decision(blocks.merge(channels)))
    config.sync_config(decoder)
    return _save(decoder.model, tmp_path_factory.mktemp("checkpoints") / "heterogeneous")


@pytest.fixture(scope="session")
def spec_of(plugins):
    """Folder -> what a pass may know of it beforehand."""

    def spec_of(folder: Path) -> CheckpointSpec:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(folder)
        decoder = Decoder.of(meta_model(config), plugins.families)
        return CheckpointSpec(config, decoder.family, decoder.shape())

    return spec_of


@pytest.fixture
def convert(tmp_path, spec_of):
    """Checks, carries out and judges a pass on a checkpoint; returns the folder that it wrote and what is known of it."""

    def convert(step, source: Path, dtype: str = "float32", device: str = "cpu"):
        step.check(spec_of(source))
        target = tmp_path / step.name
        target.mkdir()
        windows = tiny.windows(count=8, length=32)
        expected = ReferenceOutputs.of(
            TransformersRuntime(load_model(source, dtype=dtype, device_map=device)), windows.tokens
        )
        job = Job(source, target, windows, device, Progress())
        return target, convert_and_judge(step, job, expected, tiny.windows(count=4, length=24, seed=1))

    return convert


@pytest.fixture
def quantize():
    """Carries out a pass on a checkpoint and windows; returns the weights in the folder that it filled."""

    def quantize(step, source: Path, target: Path, windows: Windows) -> dict[str, torch.Tensor]:
        target.mkdir()
        step.convert(Job(source, target, windows, "cpu", Progress()))
        return load_file(target / "model.safetensors")

    return quantize


@pytest.fixture
def process():
    """What libraries must leave as it was in the process that they run in."""

    def process() -> tuple[object, ...]:
        random = torch.random.get_rng_state().tolist()
        return dict(os.environ), logging.root.level, list(logging.root.handlers), torch.get_num_threads(), random

    return process


@pytest.fixture
def run_example():
    """Runs the `example.py` that an artefact folder holds, away from this package, and returns what it prints."""

    def run(folder: Path, *arguments: str) -> str:
        command = [sys.executable, str(folder / "example.py"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder.parent, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run

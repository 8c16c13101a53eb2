from __future__ import annotations

import os

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

import gc
import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import tiny

from optimum_prune.anatomy.decoder import Decoder
from optimum_prune.hooks.plugins import Plugins, load

torch.set_num_threads(1)
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:  # as of what runs in the background: tests stop runs
        signal.signal(number, handler)


def pytest_collection_finish() -> None:
    """Lets the garbage collector, which runs ask to look at everything, pass over what is there before any test: it takes most of their time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def plugins() -> Plugins:
    return load()


@pytest.fixture
def decoder(name: str, plugins: Plugins) -> Decoder:
    """A tiny model of the family that a test's parameter names, with the family."""
    return Decoder.of(tiny.model(name), plugins.families)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory):
    """Family -> folder of its checkpoint, made when it is first asked for; not to be written to."""
    made: dict[str, Path] = {}

    def checkpoint(family: str) -> Path:
        if family not in made:
            made[family] = tiny.save(family, tmp_path_factory.mktemp("checkpoints") / family)
        return made[family]

    return checkpoint


@pytest.fixture(scope="session")
def llama(checkpoints) -> Path:
    return checkpoints("llama")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "invented.txt"
    file.write_text(tiny.text(3000), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def other_text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "other.txt"
    file.write_text(tiny.text(1500, seed=1), encoding="utf-8")
    return file

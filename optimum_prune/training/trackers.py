"""Trackers that a training reports to, by the names that transformers has for them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TRACKERS = ("clearml", "comet_ml", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")
"""Their names, which are those of the modules that they need, and what pip calls these."""
PROJECT = "optimum-prune"
"""Under which trackers put the trainings of all models."""
FOLDER = "TENSORBOARD_LOGGING_DIR"


@contextmanager
def written_to(folder: Path) -> Iterator[None]:
    """Lets tensorboard write into a folder for each start of a training within a `with`, unless the environment names another."""
    if FOLDER in os.environ:
        yield
        return
    os.environ[FOLDER] = str(folder / time.strftime("%Y-%m-%d-%H-%M-%S"))
    try:
        yield
    finally:
        os.environ.pop(FOLDER, None)

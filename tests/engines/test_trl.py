"""trl trains every form that is written, in the environment that OPTIMUM_PRUNE_PYTHON_TOOLS names; `make test-engines` makes one."""

from __future__ import annotations

import json
import os

import pytest
import tiny
from forms import CUTS, save, told_by

from optimum_prune import Decoder, Progress
from optimum_prune.checkpoint import saving
from optimum_prune.hooks.plugins import load
from optimum_prune.surgery.padding import padded

PYTHON = os.environ.get("OPTIMUM_PRUNE_PYTHON_TOOLS")
pytestmark = [
    pytest.mark.engines,
    pytest.mark.skipif(not PYTHON, reason="OPTIMUM_PRUNE_PYTHON_TOOLS does not name where trl is"),
]


def test_the_first_loss_is_that_of_the_stock_model_which_computes_the_same_and_training_lowers_it(tmp_path):
    sentences = tiny.text(2000).split(". ")
    (tmp_path / "texts.json").write_text(json.dumps(4 * [". ".join(sentences[:6])]))
    folders = []
    for kind in CUTS:
        model = save("llama", kind, tmp_path / kind)
        folders.append(tmp_path / kind)
        if hasattr(model.config, "pruned"):
            whole = padded(Decoder.of(model, load().families)).model
            saving.save(whole, tiny.tokenizer(), tmp_path / f"{kind}-stock", Progress())
            folders.append(tmp_path / f"{kind}-stock")
    found = told_by(PYTHON, "trained_by_trl.py", tmp_path, tmp_path / "texts.json", *folders)
    told = dict(zip([folder.name for folder in folders], found, strict=True))
    for name, losses in told.items():
        assert losses[-1] < losses[0] - 0.1
        assert losses[0] == pytest.approx(told.get(f"{name}-stock", losses)[0], rel=1e-4)

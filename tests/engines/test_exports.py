"""Every form that is written, through every exporter: it runs, and computes the same, or is refused with what to do as the report foretells."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from forms import CUTS, MODELS, save

from optimum_prune import Recipe, Text, compress
from optimum_prune.errors import RecipeError
from optimum_prune.hooks.plugins import load
from optimum_prune.recipe import Settings
from optimum_prune.report.serving import who_serves

pytestmark = pytest.mark.engines
LIBRARIES = {"gguf": "llama_cpp", "onnx": "onnxruntime", "openvino": "openvino"}
ENGINE = {"gguf": "llama.cpp", "onnx": "ONNX Runtime", "openvino": "OpenVINO"}


@pytest.mark.parametrize("kind", list(CUTS))
@pytest.mark.parametrize("name", list(MODELS))
def test_it_computes_the_same_or_is_refused_as_foretold(name, kind, tmp_path):
    for library in LIBRARIES.values():
        pytest.importorskip(library)
    model = save(name, kind, tmp_path / "model")
    (tmp_path / "my.txt").write_text(tiny.text(2000))
    config = model.config
    base = getattr(config, "base_model_type", config.model_type)
    told = {engine: how for engine, _, how in who_serves(base, stock=not hasattr(config, "pruned"))}
    refused = [exporter for exporter in LIBRARIES if "`padded`" in told[ENGINE[exporter]]]
    for exporter in refused:
        with pytest.raises(RecipeError, match="padded"):
            compress(recipe(tmp_path, exporter), tmp_path / "out")
    written = [exporter for exporter in LIBRARIES if exporter not in refused]
    assert all(told[ENGINE[exporter]].startswith(("a file by", "a graph by")) for exporter in written)
    report = compress(recipe(tmp_path, *written), tmp_path / "out")
    for outcome in report.passes:
        assert outcome.artefact.difference <= outcome.artefact.tolerance
        assert outcome.artefact.perplexity == pytest.approx(report.perplexity.after.value, rel=1e-3)


def recipe(folder: Path, *exporters: str) -> Recipe:
    """Nothing but exports, of the model in a folder."""
    return Recipe(
        passes=tuple(load().pass_named(exporter)() for exporter in exporters),
        calibration=Text(text=str(folder / "my.txt"), samples=4, length=32),
        evaluation=Text(samples=2),
        settings=Settings(model=str(folder / "model"), device="cpu"),
    )

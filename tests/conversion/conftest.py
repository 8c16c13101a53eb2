from __future__ import annotations

import json

import pytest

from optimum_prune import Recipe, Settings, Text


@pytest.fixture
def recipe(llama, text_file):
    """Passes -> the recipe that carries them out on a tiny Llama."""

    def recipe(*passes, **settings):
        return Recipe(
            passes=passes,
            calibration=Text(text=str(text_file), samples=6, length=24),
            evaluation=Text(samples=4),
            settings=Settings(model=str(llama), device="cpu", **settings),
        )

    return recipe


@pytest.fixture(scope="session")
def artefacts():
    """Output folder -> what its report says of each conversion, by the name of the pass."""

    def artefacts(folder):
        report = json.loads((folder / "compression/report.json").read_text())
        return {step["name"]: step["artefact"] for step in report["passes"] if "artefact" in step}

    return artefacts

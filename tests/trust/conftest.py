from __future__ import annotations

import pytest

from optimum_prune import Depth, Recipe, Settings, Text


@pytest.fixture
def recipe(llama, text_file):
    """Passes -> the recipe that carries them out, on a tiny Llama or another model, measuring nothing."""

    def recipe(*passes, model=llama, **settings):
        return Recipe(
            passes=passes or (Depth(drop=(1,)),),
            calibration=Text(text=str(text_file), samples=2, length=16),
            evaluation=Text(samples=0),
            settings=Settings(model=str(model), device="cpu", **settings),
        )

    return recipe

from __future__ import annotations

import pytest
from trained import recipe_on


@pytest.fixture
def recipe(checkpoints, text_file, other_text_file):
    """A recipe on a tiny model: one text to choose by, another to train on."""

    def made(*passes, name="llama", **more):
        return recipe_on(checkpoints(name), text_file, other_text_file, *passes, **more)

    return made

import re
from pathlib import Path

import pytest

from optimum_prune import Recipe
from optimum_prune.cli.readme import filled_in
from optimum_prune.errors import PluginError, RecipeError
from optimum_prune.hooks.plugins import load

ROOT = Path(__file__).parent.parent


def test_the_generated_parts_of_the_readme_are_what_the_code_says():
    readme = (ROOT / "README.md").read_text()
    own_method = (ROOT / "examples/own_method/every_other.py").read_text()
    assert filled_in(readme, load(), own_method) == readme, "run `make readme`"
    assert "| `osscar` | PRUNE |" in readme
    assert "class EveryOther(PrunePass)" in readme


def test_the_example_recipe_without_plugins_is_right():
    assert Recipe.from_yaml(ROOT / "examples/recipes/depth-osscar.yaml", load()).passes


@pytest.mark.parametrize("recipe", sorted((ROOT / "examples/recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_the_example_recipes_name_passes_that_are_there_or_come_with_an_extra(recipe):
    try:
        Recipe.from_yaml(recipe, load())
    except (PluginError, RecipeError) as error:
        assert re.search(r"pip install 'optimum-prune\[[a-z-]+\]'|is not installed", str(error))  # noqa: PT017 - either may be

from pathlib import Path

import pytest

from optimum_prune import Recipe
from optimum_prune.cli.readme import filled_in
from optimum_prune.plugins import load

ROOT = Path(__file__).parent.parent


def test_the_generated_parts_of_the_readme_are_what_the_code_says():
    readme = (ROOT / "README.md").read_text()
    own_method = (ROOT / "examples/own_method/every_other.py").read_text()
    assert filled_in(readme, load(), own_method) == readme, "run `make readme`"
    assert "| `osscar` | PRUNE |" in readme
    assert "class EveryOther(PrunePass)" in readme


@pytest.mark.parametrize("recipe", sorted((ROOT / "examples/recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_the_example_recipes_are_right(recipe):
    assert Recipe.from_yaml(recipe, load()).passes

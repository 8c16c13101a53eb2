"""Options are written once and checked wherever they come from: a recipe, the command line, or Python."""

import argparse
from dataclasses import dataclass
from typing import Literal

import pytest

from optimum_prune.errors import RecipeError
from optimum_prune.options import as_plain, build, check_options, option, options_of


@dataclass(frozen=True, kw_only=True)
class Toast:
    """A slice of bread."""

    slices: int = option("How many.", 1, at_least=1, at_most=4)
    heat: float = option("How hot, as a share of the most.", 0.5, above=0, below=1)
    bits: int = option("Crumbs of a bite.", 4, one_of=(2, 3, 4, 8))
    butter: float = option("Grams of butter.", 0.0, at_least=0)
    crust: int | None = option("Millimetres of crust.", None, at_least=16, or_else=-1)
    layers: tuple[int, ...] = option("What lies where.", (), at_least=0)
    kind: Literal["rye", "wheat"] = option("What it is made of.", "rye")
    names: tuple[str, ...] = option("What it is called.", ("toast",))
    dry: bool = option("Whether it is dry.", False)

    def __post_init__(self):
        check_options(self, "toast")


WRONG = [
    ({"slices": 0}, "has slices 0. Give a whole number of at least 1 and at most 4: How many."),
    ({"slices": 5}, "has slices 5. Give a whole number of at least 1 and at most 4: How many."),
    ({"heat": 0.0}, "has heat 0.0. Give a number above 0 and below 1: How hot, as a share of the most."),
    ({"heat": 1.0}, "has heat 1.0. Give a number above 0 and below 1: How hot, as a share of the most."),
    ({"bits": 5}, "has bits 5. Give 2, 3, 4 or 8: Crumbs of a bite."),
    ({"butter": -0.5}, "has butter -0.5. Give a number of at least 0: Grams of butter."),
    ({"crust": 8}, "has crust 8. Give a whole number of at least 16, or -1: Millimetres of crust."),
    ({"layers": (0, -2)}, "has layers -2. Give a whole number of at least 0: What lies where."),
    ({"slices": 1.5}, "which is not a whole number. It means: How many."),
    ({"slices": True}, "which is not a whole number"),
    ({"slices": None}, "is None, which is not a whole number"),
    ({"heat": "much"}, "is 'much', which is not a number"),
    ({"butter": float("inf")}, "which is not a number"),
    ({"butter": float("nan")}, "which is not a number"),
    ({"dry": 1}, "which is not true or false"),
    ({"names": (3,)}, "which is not a text"),
    ({"kind": "wheet"}, "No value of 'kind' in {where} is called 'wheet'. Did you mean 'wheat'? Choices: rye, wheat."),
]
RIGHT = {"slices": 4, "heat": 0.99, "bits": 8, "butter": 0, "crust": -1, "layers": (0, 3), "kind": "wheat"}


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_what_an_option_cannot_be_is_refused_in_a_recipe_and_in_python(options, message):
    with pytest.raises(RecipeError) as raised:
        Toast(**options)
    assert message.format(where="toast") in str(raised.value)
    with pytest.raises(RecipeError) as raised:
        build(Toast, options, "breakfast")
    assert message.format(where="breakfast") in str(raised.value)
    assert "breakfast" in str(raised.value)


def test_what_it_can_be_is_the_same_from_both():
    assert build(Toast, {**RIGHT, "layers": [0, 3]}, "breakfast") == Toast(**RIGHT)
    assert as_plain(Toast(**RIGHT)) == {**as_plain(Toast()), **RIGHT, "layers": [0, 3]}


def test_plain_data_is_converted_and_python_values_are_only_checked():
    built = build(Toast, {"butter": 1, "heat": "1e-2", "layers": 2, "names": "sandwich"}, "breakfast")
    assert (built.butter, type(built.butter), built.heat) == (1.0, float, 0.01)
    assert (built.layers, built.names) == ((2,), ("sandwich",))
    for options in ({"layers": 2}, {"names": "sandwich"}):
        with pytest.raises(RecipeError, match="which is no list"):
            Toast(**options)


def test_help_shows_bounds_and_defaults():
    parser = argparse.ArgumentParser()
    for each in options_of(Toast).values():
        each.add_flag(parser)
    text = " ".join(parser.format_help().split())
    assert "How many. (at least 1 and at most 4; default: 1)" in text
    assert "Crumbs of a bite. (2, 3, 4 or 8; default: 4)" in text
    assert "Millimetres of crust. (at least 16, or -1)" in text
    assert "What it is made of. (default: rye)" in text


def test_a_pass_built_in_python_is_checked():
    from optimum_prune import Osscar

    with pytest.raises(
        RecipeError, match=r"No value of 'allocation' in osscar is called 'gobal'\. Did you mean 'global'"
    ):
        Osscar(ratio=0.25, allocation="gobal")

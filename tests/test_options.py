"""Options are written once and checked wherever they come from: a recipe, the command line, or Python."""

import argparse
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Literal

import pytest

from optimum_prune.cli.arguments import add_flag, check_flags, flags_of
from optimum_prune.errors import PluginError, RecipeError
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
    size: Literal[2, 4] = option("How large.", 2)
    grams: str | None = option("How heavy, such as 80g.", None, or_number=True)

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
    ({"names": ("a\0b",)}, "it holds a NUL character"),
    ({"slices": 10**30}, "a number out of all bounds"),
    ({"butter": 10**400}, "which is not a number"),
    ({"layers": (10**30,)}, "a number out of all bounds"),
    ({"names": ("x" * 10**6, 7)}, "is 7, which is not a text"),
    ({"slices": [[[[[[[1]]]]]]]}, "which is not a whole number"),
    ({"size": 3}, "No value of 'size' in {where} is called '3'. Choices: 2, 4."),
    ({"size": True}, "No value of 'size'"),
    ({"grams": True}, "which is not a text"),
    ({"kind": "wheet"}, "No value of 'kind' in {where} is called 'wheet'. Did you mean 'wheat'? Choices: rye, wheat."),
]
RIGHT = {
    "size": 4,
    "grams": "80g",
    "slices": 4,
    "heat": 0.99,
    "bits": 8,
    "butter": 0,
    "crust": -1,
    "layers": (0, 3),
    "kind": "wheat",
}


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
        add_flag(each, parser)
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


def test_what_stands_for_a_plain_value_becomes_one():
    import numpy

    built = Toast(slices=numpy.int64(3), heat=numpy.float32(0.5), layers=[numpy.int32(1)], grams=80, names=[Path("a")])
    assert built == Toast(slices=3, heat=0.5, layers=(1,), grams="80", names=("a",))
    assert [type(built.slices), type(built.heat), type(built.layers[0])] == [int, float, int]
    assert build(Toast, {"grams": 80}, "breakfast").grams == "80"


@pytest.mark.parametrize("text", ["1_0", "\u0663", "nan", "inf", "0x1p3", " 1", "1e", ""])
def test_a_number_in_quotes_is_a_number_as_it_is_written_anywhere_else(text):
    with pytest.raises(RecipeError, match="which is not a number"):
        build(Toast, {"butter": text}, "breakfast")


def of_type(kind, default=None):
    return make_dataclass("Odd", [("odd", kind, option("Odd.", default))], frozen=True, kw_only=True)


@pytest.mark.parametrize(
    "kind",
    [
        dict,
        dict[str, int],
        list[int],
        int | str,
        int | str | None,
        tuple[int, int],
        tuple[dict, ...],
        Literal[1, "a"],
        Literal[True],
        bytes,
        Toast,
        "int",
        "Nowhere",
    ],
    ids=str,
)
def test_a_type_that_no_flag_can_carry_is_named(kind):
    if kind == "int":
        assert options_of(of_type(kind))["odd"].kind is int
        return
    with pytest.raises(
        PluginError, match=r"The option 'odd' of Odd has the type|The types of the options of Odd cannot be read"
    ):
        options_of(of_type(kind))


@pytest.mark.parametrize(
    "kind",
    [
        int,
        int | None,
        float,
        str,
        bool | None,
        Literal["a", "b"],
        Literal[4, 8] | None,
        tuple[int, ...],
        tuple[str, ...] | None,
    ],
)
def test_all_other_types_have_a_flag(kind):
    parser = argparse.ArgumentParser()
    add_flag(options_of(of_type(kind))["odd"], parser)
    assert "Odd." in parser.format_help()


def test_a_default_may_be_made_anew():
    made = make_dataclass("Made", [("odd", tuple[int, ...], field(default_factory=lambda: (1, 2)))], frozen=True)
    assert not options_of(made)["odd"].required
    assert build(made, {}, "it") == made((1, 2))


def test_an_error_of_a_check_of_ones_own_is_a_sentence():
    def check(self):
        raise ValueError("never\nand never")

    strict = make_dataclass("Strict", [("odd", int, option("Odd.", 0))], namespace={"__post_init__": check})
    with pytest.raises(RecipeError, match=r"^breakfast takes no such options: ValueError: never\.$"):
        build(strict, {"odd": 1}, "breakfast")


# Flags


def parsed(*arguments, once=True):
    parser = argparse.ArgumentParser(exit_on_error=False)
    for each in options_of(Toast).values():
        add_flag(each, parser, once=once)
    return vars(parser.parse_args(arguments))


def test_several_values_of_a_flag_add_up():
    assert parsed("--layers", "1", "2", "--layers", "3") == {"layers": [1, 2, 3]}
    assert parsed("--slices", "2", "--dry", "--slices", "2", "--dry", "--size", "4") == {
        "slices": 2,
        "dry": True,
        "size": 4,
    }


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--slices", "1", "--slices", "2"], "is given twice, as 1 and as 2. Give it once"),
        (["--kind", "rye", "--kind", "wheat"], "is given twice"),
        (["--dry", "--no-dry"], "both with and without 'no'"),
        (["--slices", "1_0"], "'1_0' is not a whole number"),
        (["--slices", "\u0663"], "is not a whole number"),
        (["--slices", "9" * 401], "is not a whole number"),
        (["--slices", "1.0"], "is not a whole number"),
        (["--heat", "nan"], "'nan' is not a number"),
        (["--heat", "1_0"], "is not a number"),
        (["--heat", "a\nb"], r"'a\\nb' is not a number"),
        (["--size", "3"], "invalid choice"),
    ],
    ids=str,
)
def test_what_a_flag_cannot_mean_is_refused(arguments, why):
    with pytest.raises(argparse.ArgumentError, match=why) as caught:
        parsed(*arguments)
    assert "\n" not in str(caught.value)


def test_of_a_flag_that_scripts_append_the_last_value_counts():
    assert parsed("--slices", "1", "--dry", "--slices", "2", "--no-dry", once=False) == {"slices": 2, "dry": False}


@pytest.mark.parametrize(
    ("names", "clashing"),
    [(["seed"], "seed"), (["heal", "no_heal"], "no_heal"), (["run"], "run"), (["heat"], None)],
    ids=str,
)
def test_a_name_that_another_flag_has_is_refused(names, clashing):
    odd = make_dataclass("Odd", [(name, bool, option("Odd.", False)) for name in names], frozen=True, kw_only=True)
    if clashing is None:
        check_flags(odd, {"seed", "run"})
        return
    with pytest.raises(PluginError, match=f"option '{clashing}' is called like another flag"):
        check_flags(odd, {"seed", "run"})


def test_where_every_command_has_a_flag_of_that_name_a_pass_puts_its_own_in_front():
    fields = [(name, str, option("Odd.", "")) for name in ("dtype", "width")]
    odd = make_dataclass("Odd", fields, frozen=True, kw_only=True, namespace={"name": "to-disk"})
    assert {flag: each.name for flag, each in flags_of(odd, {"dtype"}).items()} == {
        "to_disk_dtype": "dtype",
        "width": "width",
    }

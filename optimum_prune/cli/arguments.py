"""Options as flags: what a parser is told of an option, and which options no flag can be made of."""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection
from typing import Any

from optimum_prune.errors import PluginError, cut, printable
from optimum_prune.options import NUMBER, Option, options_of

METAVARS = {int: "N", float: "X", str: "NAME"}
LONGEST_WORD = 60
"""Characters of what was typed that an error repeats."""


def add_flag(option: Option, parser: argparse._ActionsContainer, *aliases: str, once: bool = False) -> None:
    """Adds `--name` to a parser; what is not given stays absent from the namespace, and several values of one that takes several add up.

    Args:
        once: whether a second value is refused; else the last one counts, so that a script can append what is to be otherwise.
    """
    flags = ("--" + option.name.replace("_", "-"), *aliases)
    default = "" if option.required or option.default is None else f"default: {option.default}"
    aside = "; ".join(part for part in (str(option.bounds), default) if part)
    text = (f"{option.help} ({aside})" if aside else option.help).replace("%", "%%")
    if option.each_by_itself and once:
        text += " Several make a model each, in folders of their own."
    common: dict[str, Any] = {"help": text, "default": argparse.SUPPRESS, "dest": option.name}
    if option.kind is bool:
        parser.add_argument(*flags, action=_Switch if once else argparse.BooleanOptionalAction, **common)
        return
    if option.choices:
        common["choices"] = option.choices
    if option.kind is not str:
        common["type"] = {int: whole_number, float: number}[option.kind]
    several = option.many or (option.each_by_itself and once)
    if several:
        common["nargs"] = "+"
    metavar = {} if option.choices else {"metavar": METAVARS[option.kind]}
    action: Any = "extend" if several else _Once if once else "store"
    parser.add_argument(*flags, action=action, required=option.required, **metavar, **common)


def check_flags(step: type, taken: Collection[str]) -> None:
    """Refuses a pass whose options cannot be flags beside those that every command has.

    Args:
        taken: the names of those, as attributes of what is parsed.

    Raises:
        PluginError: one has the name of such a flag, or a type that no flag can carry.
    """
    options = options_of(step)
    for name in options:
        if name in taken or name.removeprefix("no_") in options.keys() - {name}:
            raise PluginError(
                f"Its option '{name}' is called like another flag of this command. Rename it; until then the pass can be used in recipes only."
            )


def flags_of(step: type, taken: Collection[str]) -> dict[str, Option]:
    """The options of a pass by their flags: where every command has a flag of that name, with the pass's in front.

    Args:
        taken: the names of those that every command has.
    """
    own = f"{getattr(step, 'name', '')}_".replace("-", "_")
    return {own + name if name in taken else name: each for name, each in options_of(step).items()}


class _Once(argparse.Action):
    """Keeps the value of a flag, and refuses another one for the same."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:  # noqa: ARG002
        """Of two values, neither would be what was meant for sure."""
        before = getattr(namespace, self.dest, None)
        if before is not None and before != values:
            raise argparse.ArgumentError(self, f"is given twice, as {before} and as {values}. Give it once")
        setattr(namespace, self.dest, values)


class _Switch(argparse.BooleanOptionalAction):
    """`--name` and `--no-name`, of which one may be given."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:  # noqa: ARG002
        """True for the first."""
        value = option_string == self.option_strings[0]
        if getattr(namespace, self.dest, value) != value:
            raise argparse.ArgumentError(self, "is given both with and without 'no'. Give one of them")
        setattr(namespace, self.dest, value)


def whole_number(text: str) -> int:
    """The whole number that digits mean, and nothing else that Python might read as one."""
    if not re.fullmatch(r"[-+]?[0-9]{1,400}", text):
        raise argparse.ArgumentTypeError(f"{_typed(text)} is not a whole number")
    return int(text)


def number(text: str) -> float:
    """The number that digits mean, with a point and an exponent or without."""
    if not NUMBER.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{_typed(text)} is not a number")
    return float(text)


def _typed(text: str) -> str:
    return f"'{cut(printable(text), LONGEST_WORD)}'"


def attributes(parser: argparse.ArgumentParser) -> set[str]:
    """The names under which a parser leaves what was parsed."""
    return {action.dest for action in parser._actions} | set(parser._defaults)

"""Options: the fields of a frozen dataclass are the YAML keys and the command-line flags, written once.

The types understood are bool, int, float, str, `Literal[...]`, `tuple[int, ...]`, `tuple[str, ...]`, and each of these or None.
Numbers may have bounds. Whatever is built from a recipe or the command line is checked by `build`, and what is built in Python by
`check_options`, which a dataclass calls when it is constructed.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from optimum_prune.errors import RecipeError, unknown

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bounds:
    """The numbers that an option may be."""

    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None
    one_of: tuple[float, ...] = ()
    """The only ones, if any are named."""
    or_else: float | None = None
    """One that the others do not hold for, such as -1 for none."""

    def allow(self, value: float) -> bool:
        """Whether a number is within them."""
        return value == self.or_else or (
            (self.at_least is None or value >= self.at_least)
            and (self.at_most is None or value <= self.at_most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
            and (not self.one_of or value in self.one_of)
        )

    def __str__(self) -> str:
        """Such as "at least 0 and below 1", or "2, 3, 4 or 8"; empty if there are none."""
        named = ("at_least", "above", "at_most", "below")
        given = ((name, getattr(self, name)) for name in named)
        text = " and ".join(f"{name.replace('_', ' ')} {value}" for name, value in given if value is not None)
        if self.one_of:
            *others, last = map(str, self.one_of)
            text = f"{', '.join(others)} or {last}" if others else last
        return text if self.or_else is None else f"{text}, or {self.or_else}"


def option(
    help: str,
    default: Any = dataclasses.MISSING,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    one_of: tuple[float, ...] = (),
    or_else: float | None = None,
) -> Any:
    """A dataclass field with the sentence that documents it in `--help`, in errors and in the README.

    Args:
        help: a sentence; for a number with bounds it need not repeat them.
        default: the value if none is given; without it the option must be given.
        at_least: the smallest number, itself allowed. These and the following bound int and float, and each item of a tuple of them.
        at_most: the largest number, itself allowed.
        above: a number that every value exceeds.
        below: a number that exceeds every value.
        one_of: the only numbers, where there are few. (For texts there is `Literal`.)
        or_else: a number that the other bounds do not hold for, such as -1 for none.
    """
    bounds = Bounds(at_least=at_least, at_most=at_most, above=above, below=below, one_of=one_of, or_else=or_else)
    return dataclasses.field(default=default, metadata={"help": help, "bounds": bounds})


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a dataclass, as a recipe and the command line see it."""

    name: str
    kind: Any
    """bool, int, float or str; the type of one item when `many`."""
    choices: tuple[str, ...]
    many: bool
    optional: bool
    required: bool
    default: Any
    help: str
    bounds: Bounds = Bounds()

    def parse(self, value: object, where: str) -> Any:
        """The value in this option's type, from plain data.

        Args:
            where: what has the option, for the error.

        Raises:
            RecipeError: the value is of another type, none of the choices, or beyond the bounds.
        """
        if self.many and value is not None:
            items = value if isinstance(value, (list, tuple)) else [value]
            parsed: Any = tuple(self._parse_one(item) for item in items)
        else:
            parsed = self._parse_one(value)
        self.check(parsed, where)
        return parsed

    def _parse_one(self, value: object) -> object:
        """A number as float where that is the type; anything else as it is."""
        if self.kind is not float or isinstance(value, bool) or not isinstance(value, (int, str)):
            return value
        try:
            return float(value)  # YAML 1.1 reads 1e-2 as a string
        except ValueError:
            return value

    def check(self, value: object, where: str) -> None:
        """Refuses a value that this option cannot have.

        Raises:
            RecipeError: as `parse`; a whole number will do for a float, and a list for a tuple.
        """
        if value is None and self.optional:
            return
        if not self.many:
            self._check_one(value, where)
        elif isinstance(value, (list, tuple)):
            for item in value:
                self._check_one(item, where)
        else:
            raise RecipeError(f"Option '{self.name}' of {where} is {value!r}, which is no list. It means: {self.help}")

    def _check_one(self, value: Any, where: str) -> None:
        if self.choices:
            if value not in self.choices:
                raise RecipeError(unknown(f"value of '{self.name}' in {where}", str(value), self.choices, "Choices"))
        elif not _is(value, self.kind):
            raise RecipeError(
                f"Option '{self.name}' of {where} is {value!r}, which is not {_NOUNS[self.kind]}. It means: {self.help}"
            )
        elif self.kind in (int, float) and not self.bounds.allow(value):
            raise RecipeError(f"{where} has {self.name} {value}. Give {self._wanted()}: {self.help}")

    def _wanted(self) -> str:
        """A number within the bounds, such as "a whole number of at least 1"."""
        if self.bounds.one_of:
            return str(self.bounds)
        return f"{_NOUNS[self.kind]} {'of ' if str(self.bounds).startswith('at ') else ''}{self.bounds}"

    def add_flag(self, parser: argparse._ActionsContainer, *aliases: str) -> None:
        """Adds `--name` to a parser; what is not given stays absent from the namespace."""
        flags = ("--" + self.name.replace("_", "-"), *aliases)
        default = "" if self.required or self.default is None else f"default: {self.default}"
        aside = "; ".join(part for part in (str(self.bounds), default) if part)
        text = (f"{self.help} ({aside})" if aside else self.help).replace("%", "%%")
        common: dict[str, Any] = {"help": text, "default": argparse.SUPPRESS, "dest": self.name}
        if self.kind is bool:
            parser.add_argument(*flags, action=argparse.BooleanOptionalAction, **common)
            return
        if self.choices:
            common["choices"] = self.choices
        elif self.kind is not str:
            common["type"] = self.kind
        if self.many:
            common["nargs"] = "+"
        metavar = {} if self.choices else {"metavar": _METAVARS[self.kind]}
        parser.add_argument(*flags, required=self.required, **metavar, **common)


_NOUNS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
_METAVARS = {int: "N", float: "X", str: "NAME"}


def _is(value: object, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, (int, float)) and math.isfinite(value)
    return isinstance(value, kind)


def options_of(cls: type) -> dict[str, Option]:
    """The options of a dataclass, by name."""
    hints = get_type_hints(cls)
    return {field.name: _option(field, hints[field.name]) for field in dataclasses.fields(cls) if field.init}


def _option(field: dataclasses.Field[Any], hint: Any) -> Option:
    optional = many = False
    choices: tuple[str, ...] = ()
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(arg for arg in get_args(hint) if arg is not type(None))
        optional = True
    if get_origin(hint) is tuple:
        hint, many = get_args(hint)[0], True
    if get_origin(hint) is Literal:
        choices, hint = get_args(hint), str
    if hint not in _NOUNS:
        raise TypeError(f"Option '{field.name}' has the type {hint}, which neither YAML nor a flag can carry.")
    return Option(
        name=field.name,
        kind=hint,
        choices=choices,
        many=many,
        optional=optional,
        required=field.default is dataclasses.MISSING,
        default=field.default,
        help=field.metadata.get("help", ""),
        bounds=field.metadata.get("bounds", Bounds()),
    )


def build(cls: type[T], values: object, where: str) -> T:
    """An instance of a dataclass from plain values, each checked.

    Args:
        where: what has these options, for errors, such as "pass 'osscar'".

    Raises:
        RecipeError: an unknown name (with the nearest one), a missing one, or a value of the wrong type or beyond its bounds.
    """
    if values is None:
        values = {}
    if not isinstance(values, Mapping):
        raise RecipeError(f"The options of {where} are {values!r}. Write them as `name: value` pairs.")
    options = options_of(cls)
    for name in values:
        if name not in options:
            raise RecipeError(unknown(f"option of {where}", name, options, "Options"))
    missing = [name for name, opt in options.items() if opt.required and name not in values]
    if missing:
        raise RecipeError(f"{where} needs the option '{missing[0]}': {options[missing[0]].help}")
    return cls(**{name: options[name].parse(value, where) for name, value in values.items()})


def check_options(instance: Any, where: str) -> None:
    """Refuses a dataclass whose options are not what its fields say, however it was built; for its `__post_init__`.

    Args:
        where: what has these options, for errors, such as the name of a pass.

    Raises:
        RecipeError: a value is of another type than its field's, none of the choices, or beyond the bounds.
    """
    for name, known in options_of(type(instance)).items():
        known.check(getattr(instance, name), where)


def as_plain(instance: Any) -> dict[str, Any]:
    """The options of an instance as YAML and JSON can hold them; what is None is left out."""
    values = {field.name: getattr(instance, field.name) for field in dataclasses.fields(instance)}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if v is not None}

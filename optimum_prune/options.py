"""Options: the fields of a frozen dataclass are the YAML keys and the command-line flags, written once.

The types understood are bool, int, float, str, `Literal[...]`, `tuple[int, ...]`, `tuple[str, ...]`, and each of these or None.
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


def option(help: str, default: Any = dataclasses.MISSING) -> Any:
    """A dataclass field with the sentence that documents it in `--help`, in errors and in the README."""
    return dataclasses.field(default=default, metadata={"help": help})


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

    def parse(self, value: object, where: str) -> Any:
        """The value in this option's type.

        Raises:
            RecipeError: the value is of another type, or none of the choices.
        """
        if value is None and self.optional:
            return None
        if self.many:
            items = value if isinstance(value, (list, tuple)) else [value]
            return tuple(self._parse_one(item, where) for item in items)
        return self._parse_one(value, where)

    def _parse_one(self, value: object, where: str) -> Any:
        if self.choices:
            if value in self.choices:
                return value
            raise RecipeError(unknown(f"value of '{self.name}' in {where}", str(value), self.choices, "Choices"))
        if self.kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if self.kind is float and isinstance(value, str):  # YAML 1.1 reads 1e-2 as a string
            value = _number(value)
        if type(value) is not self.kind or (isinstance(value, float) and not math.isfinite(value)):
            raise RecipeError(
                f"Option '{self.name}' of {where} is {value!r}, which is not {_NOUNS[self.kind]}. It means: {self.help}"
            )
        return value

    def add_flag(self, parser: argparse._ActionsContainer, *aliases: str) -> None:
        """Adds `--name` to a parser; what is not given stays absent from the namespace."""
        flags = ("--" + self.name.replace("_", "-"), *aliases)
        text = self.help + ("" if self.required or self.default is None else f" (default: {self.default})")
        text = text.replace("%", "%%")
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


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


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
    )


def build(cls: type[T], values: object, where: str) -> T:
    """An instance of a dataclass from plain values, each checked.

    Raises:
        RecipeError: an unknown name (with the nearest one), a missing one, or a value of the wrong type.
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


def as_plain(instance: Any) -> dict[str, Any]:
    """The options of an instance as YAML and JSON can hold them; what is None is left out."""
    values = {field.name: getattr(instance, field.name) for field in dataclasses.fields(instance)}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if v is not None}

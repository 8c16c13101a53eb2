"""Options: the fields of a frozen dataclass are the YAML keys and the command-line flags, written once.

The types understood are bool, int, float, str, `Literal[...]` of texts or of whole numbers, `tuple[X, ...]` of one of them, and each of
these or None. Numbers may have bounds. Whatever is built from a recipe or the command line is checked by `build`, and what is built in
Python by `check_options`, which a dataclass calls when it is constructed.
"""

from __future__ import annotations

import dataclasses
import numbers
import os
import re
import sys
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from optimum_prune.bounds import Bounds
from optimum_prune.errors import OptimumPruneError, PluginError, RecipeError, reason, shown, unknown

T = TypeVar("T")
PARTS = "parts"
"""In the metadata of a field: a tuple of dataclasses with options, which whoever reads a recipe builds."""
LARGEST = 2**63 - 1
"""The largest whole number, and the smallest below 0, that an option may be: what tensors can be indexed with."""


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
    or_number: bool = False,
    each_by_itself: bool = False,
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
        or_number: whether a text may be given as a number without quotes, such as a size in bytes.
        each_by_itself: whether a command may be given several values, each for a model of its own.
    """
    bounds = Bounds(at_least=at_least, at_most=at_most, above=above, below=below, one_of=one_of, or_else=or_else)
    metadata = {"help": help, "bounds": bounds, "or_number": or_number, "each_by_itself": each_by_itself}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a dataclass, as a recipe and the command line see it."""

    name: str
    kind: Any
    """bool, int, float or str; the type of one item when `many`."""
    choices: tuple[Any, ...]
    many: bool
    optional: bool
    required: bool
    default: Any
    help: str
    bounds: Bounds = Bounds()
    or_number: bool = False
    each_by_itself: bool = False

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
        """A number as float where that is the type, also one in quotes; anything else as it is."""
        if self.kind is not float or isinstance(value, bool) or not isinstance(value, (int, str)):
            return self.plain(value)
        if isinstance(value, str) and not NUMBER.fullmatch(value):
            return value
        try:
            return float(value)
        except OverflowError:
            return value

    def plain(self, value: Any) -> Any:
        """A value of Python as the type that it stands for: a number of numpy's, a path, and a list for a tuple."""
        if self.many and isinstance(value, (list, tuple)):
            return tuple(dataclasses.replace(self, many=False).plain(item) for item in value)
        if isinstance(value, numbers.Integral) and not isinstance(value, bool):
            return str(int(value)) if self.or_number else int(value)
        if isinstance(value, numbers.Real) and not isinstance(value, (bool, float)):
            return float(value)
        if self.or_number and isinstance(value, float):
            return str(value)
        return str(value) if self.kind is str and isinstance(value, os.PathLike) else value

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
            raise RecipeError(self._wrong(value, where, "no list"))

    def _check_one(self, value: Any, where: str) -> None:
        if self.choices:
            if not _is(value, self.kind) or value not in self.choices:
                choices = map(str, self.choices)
                raise RecipeError(unknown(f"value of '{self.name}' in {where}", value, choices, "Choices"))
        elif not _is(value, self.kind):
            raise RecipeError(self._wrong(value, where, f"not {_NOUNS[self.kind]}"))
        elif self.kind is str and "\0" in value:
            raise RecipeError(self._wrong(value, where, "no text that can be used: it holds a NUL character"))
        elif self.kind is int and abs(value) > LARGEST:
            raise RecipeError(self._wrong(value, where, "a number out of all bounds"))
        elif self.kind in (int, float) and not self.bounds.allow(value):
            raise RecipeError(f"{where} has {self.name} {value}. Give {self._wanted()}: {self.help}")

    def _wrong(self, value: object, where: str, what: str) -> str:
        return f"Option '{self.name}' of {where} is {shown(value)}, which is {what}. It means: {self.help}"

    def _wanted(self) -> str:
        """A number within the bounds, such as "a whole number of at least 1"."""
        if self.bounds.one_of:
            return str(self.bounds)
        return f"{_NOUNS[self.kind]} {'of ' if str(self.bounds).startswith('at ') else ''}{self.bounds}"


NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
"""A number as it is written in a recipe and on the command line: Python's own `float` reads further ones, such as 1_0."""
_NOUNS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def _is(value: object, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
    return isinstance(value, kind)


def options_of(cls: type) -> dict[str, Option]:
    """The options of a dataclass, by name.

    Raises:
        PluginError: one has a type that neither YAML nor a flag can carry.
    """
    try:
        hints = get_type_hints(cls)
    except Exception as error:  # an annotation is code, of which any kind of error may come
        raise PluginError(
            f"The types of the options of {cls.__name__} cannot be read: {reason(error)} Import what they name where it can be found "
            f"when the program runs, and not for type checkers only."
        ) from error
    fields = (field for field in dataclasses.fields(cls) if field.init and not field.metadata.get(PARTS))
    return {field.name: _option(cls, field, hints[field.name]) for field in fields}


def _option(cls: type, field: dataclasses.Field[Any], hint: Any) -> Option:
    """An option as its field says."""
    kind, optional, many = hint, False, False
    choices: tuple[Any, ...] = ()
    if get_origin(kind) in (Union, types.UnionType):
        others = [each for each in get_args(kind) if each is not type(None)]
        optional, kind = len(others) < len(get_args(kind)), others[0] if len(others) == 1 else None
    if get_origin(kind) is tuple and get_args(kind)[1:] == (...,):
        kind, many = get_args(kind)[0], True
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        kind = next((each for each in (str, int) if all(type(choice) is each for choice in choices)), None)
    if not isinstance(kind, type) or kind not in _NOUNS:
        raise PluginError(
            f"The option '{field.name}' of {cls.__name__} has the type {getattr(hint, '__name__', hint)}, which neither YAML nor a flag can "
            f"carry. Give it bool, int, float, str, a Literal of one of them, tuple[...] of one of them, or one of these or None."
        )
    made = field.default_factory
    return Option(
        name=field.name,
        kind=kind,
        choices=choices,
        many=many,
        optional=optional,
        required=field.default is dataclasses.MISSING and made is dataclasses.MISSING,
        default=field.default if made is dataclasses.MISSING else made(),
        help=field.metadata.get("help", ""),
        bounds=field.metadata.get("bounds", Bounds()),
        or_number=field.metadata.get("or_number", False),
        each_by_itself=field.metadata.get("each_by_itself", False),
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
        raise RecipeError(f"The options of {where} are {shown(values)}. Write them as `name: value` pairs.")
    options = options_of(cls)
    for name in values:
        if name not in options:
            raise RecipeError(unknown(f"option of {where}", name, options, "Options"))
    missing = [name for name, opt in options.items() if opt.required and name not in values]
    if missing:
        raise RecipeError(f"{where} needs the option '{missing[0]}': {options[missing[0]].help}")
    parsed = {name: options[name].parse(value, where) for name, value in values.items()}
    try:
        return cls(**parsed)
    except OptimumPruneError:
        raise
    except Exception as error:  # a plugin's own check
        raise RecipeError(f"{where} takes no such options: {type(error).__name__}: {reason(error)}") from error


def check_options(instance: Any, where: str) -> None:
    """Refuses a dataclass whose options are not what its fields say, however it was built; for its `__post_init__`.

    Numbers of numpy's, paths and lists become the plain numbers, texts and tuples that they stand for.

    Args:
        where: what has these options, for errors, such as the name of a pass.

    Raises:
        RecipeError: a value is of another type than its field's, none of the choices, or beyond the bounds.
    """
    for name, known in options_of(type(instance)).items():
        value = known.plain(getattr(instance, name))
        known.check(value, where)
        object.__setattr__(instance, name, value)


def as_plain(instance: Any) -> Any:
    """The options of an instance as YAML and JSON can hold them, by name; what is None is left out."""
    if not dataclasses.is_dataclass(instance):
        return instance
    values = {field.name: getattr(instance, field.name) for field in dataclasses.fields(instance)}
    return {
        k: [as_plain(each) for each in v] if isinstance(v, tuple) else v for k, v in values.items() if v is not None
    }

"""YAML that means what is written there: the core schema of YAML 1.2, no tag, no key twice, and bounds on size, depth and aliases.

What YAML 1.1 reads otherwise is a text here (`yes`, `off`, `1:30`, `1_000`, `2024-01-01`), or refused where readers disagree: `010`
is 8 to some and 10 to others. What is written is read alike by both.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from optimum_prune.errors import LONGEST_NAME, cut, printable

LONGEST = 2**18
"""Bytes of a file that are read; what a person writes has a few hundred."""
DEEPEST = 32
"""How many lists and mappings may lie in one another."""
MOST = 10_000
"""How many values there may be, each counted as often as aliases repeat it."""
LONGEST_NUMBER = 400
"""Digits, of which no number here has more than a few."""
TAG = "tag:yaml.org,2002:"
AMBIGUOUS = "!ambiguous"

_FORMS = (
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (AMBIGUOUS, r"[-+]?0[0-9]+", "-+0"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
)
"""What a value without quotes may be beside a text, and the characters that it begins with."""


class StrictYamlError(ValueError):
    """What is no such YAML; the text says where and why in one line."""


def load(document: str | bytes) -> Any:
    """The value that a YAML document is: lists, mappings, texts, numbers, true, false and null.

    Raises:
        StrictYamlError: it is none, or larger, deeper or of more values than what a person writes.
    """
    if len(document) > LONGEST:
        raise StrictYamlError(f"it is longer than {LONGEST:,} characters")
    try:
        text = document.decode() if isinstance(document, bytes) else document
    except UnicodeDecodeError as error:
        raise StrictYamlError(f"it is no UTF-8 text, at byte {error.start}") from error
    try:
        return yaml.load(text.removeprefix("\ufeff"), _Loader)  # a SafeLoader that does less
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise StrictYamlError(where + _line(", ".join(filter(None, (error.context, error.problem))))) from error
    except yaml.reader.ReaderError as error:
        raise StrictYamlError(f"it holds the character {error.character:#06x}, which no YAML may hold") from error
    except yaml.YAMLError as error:
        raise StrictYamlError(_line(str(error))) from error


def dump(plain: Any) -> str:
    """Plain data as YAML, in its own order, that `load` reads, and readers of YAML 1.1 alike."""
    text = yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    shows = text.replace("\n", "").isprintable()  # else it may look like something that it is not
    return text if shows else yaml.dump(plain, Dumper=_Dumper, sort_keys=False)


def _line(text: str) -> str:
    return cut(printable(" ".join(text.split())), 2 * LONGEST_NAME)


class _Loader(yaml.SafeLoader):
    """Reads what is written, and no more than a person would write."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own, for this class

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._around: list[str | None] = []
        """The anchors of what the current value lies in."""
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        """A value with what lies in it."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if event.anchor is not None and event.anchor in self._around:
            raise _refused("here is an alias of what it lies in itself", event)
        if getattr(event, "tag", None) is not None:
            raise _refused(f"here is the tag {event.tag}, and tags are not allowed", event)
        if len(self._around) > DEEPEST:
            raise _refused(f"more than {DEEPEST} lists and mappings lie in one another here", event)
        self._around.append(event.anchor)
        node = super().compose_node(parent, index)
        self._around.pop()
        if id(node) not in self._sizes:
            self._sizes[id(node)] = self._size(node)
        if max(self._sizes[id(node)], len(self._sizes)) > MOST:
            raise _refused(f"there are more than {MOST:,} values", event)
        return node

    def _size(self, node: Any) -> int:
        """How many values a node holds, itself included."""
        if isinstance(node, yaml.ScalarNode):
            return 1
        below = node.value if isinstance(node, yaml.SequenceNode) else [each for pair in node.value for each in pair]
        return 1 + sum(self._sizes[id(each)] for each in below)

    def compose_mapping_node(self, anchor: Any) -> Any:
        """A mapping, whose keys differ."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _refused("here is a key that is a list or a mapping", key)
            value = key.value if key.tag == f"{TAG}merge" else self.construct_object(key)
            if value in seen:
                raise _refused(f"here is the key {cut(key.value, LONGEST_NAME)} for the second time", key)
            seen.add(value)
        return node


def _refused(what: str, at: Any) -> yaml.MarkedYAMLError:
    """The error for something that is not to be there, at the place of an event or a node."""
    return yaml.MarkedYAMLError(problem=what, problem_mark=at.start_mark)


def _int(_: _Loader, node: Any) -> int:
    text = node.value
    if len(text) > LONGEST_NUMBER:
        raise _refused(f"here is a number of {len(text)} digits", node)
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


def _float(_: _Loader, node: Any) -> float:
    return float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _ambiguous(_: _Loader, node: Any) -> Any:
    raise _refused(
        f"here is {node.value}, which some read in base 8 and others in base 10: leave out the zero in front, or put it in quotes",
        node,
    )


class _Dumper(yaml.SafeDumper):
    """Puts in quotes what either version of YAML would take for something else than a text."""

    yaml_implicit_resolvers: dict[str, Any] = {  # noqa: RUF012 - PyYAML's own, and those of the other version
        first: list(resolvers) for first, resolvers in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }


for _name, _form, _first in _FORMS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            _name if _name == AMBIGUOUS else f"{TAG}{_name}",
            re.compile(f"(?:{_form})\\Z"),
            ["" if each == "\0" else each for each in _first],
        )
_Loader.add_implicit_resolver(f"{TAG}merge", re.compile(r"<<\Z"), ["<"])
_Loader.add_constructor(f"{TAG}int", _int)
_Loader.add_constructor(f"{TAG}float", _float)
_Loader.add_constructor(AMBIGUOUS, _ambiguous)

"""YAML that means what is written there, and is bounded."""

import math
import time

import pytest
import yaml

from optimum_prune.machine.strict_yaml import LONGEST, MOST, StrictYamlError, dump, load

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{later}: &{later} [{', '.join([f'*{earlier}'] * 9)}]\n"
    for earlier, later in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGED = "a: &a {x: 1}\n" + "".join(
    f"{later}: &{later} {{p: *{earlier}, q: *{earlier}, r: *{earlier}}}\n"
    for earlier, later in zip("abcdefghij", "bcdefghijk", strict=True)
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("yes", "yes"),
        ("No", "No"),
        ("on", "on"),
        ("off", "off"),
        ("y", "y"),
        ("1:30", "1:30"),
        ("190:20:30.15", "190:20:30.15"),
        ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"),
        ("0b11", "0b11"),
        ("0o17", 15),
        ("0x1F", 31),
        ("+3", 3),
        ("1e-2", 0.01),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("00.5", 0.5),
        ("-.INF", -math.inf),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("", None),
        ("'010'", "010"),
        ('"yes"', "yes"),
        ("=", "="),
        ("[1, [a, {b: c}]]", [1, ["a", {"b": "c"}]]),
    ],
)
def test_what_is_written_is_read(text, value):
    found = load(f"key: {text}")["key"]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a: 1\nb: 2\na: 3", "line 3, column 1: here is the key a for the second time"),
        ('{x: 1, "x": 2}', "the key x for the second time"),
        ("{1: a, 0x1: b}", "the key 0x1 for the second time"),
        ("{a: &a {x: 1}, b: {<<: *a, <<: *a}}", "the key << for the second time"),
        ("[a, b]: c", "a key that is a list or a mapping"),
        ("{1: a, [2]: b}", "a key that is a list or a mapping"),
        ("a: 010", "some read in base 8 and others in base 10"),
        ("a: -007", "some read in base 8"),
        ("010: a", "some read in base 8"),
        ("a: !!python/object/apply:os.system [true]", "tags are not allowed"),
        ("a: !!int '3'", "tags are not allowed"),
        ("a: !!binary aGk=", "tags are not allowed"),
        ("a: ! b", "tags are not allowed"),
        ("&a [*a]", "an alias of what it lies in itself"),
        ("&a {b: [c, *a]}", "an alias of what it lies in itself"),
        ("*a", "undefined alias"),
        (LAUGHS, "more than 10,000 values"),
        (MERGED, "more than 10,000 values"),
        (f"[{'1, ' * MOST}1]", "more than 10,000 values"),
        ("[" * 100_000, "more than 32 lists and mappings"),
        ("- " * 100_000, "more than 32 lists and mappings"),
        ("{a: " * 50_000, "more than 32 lists and mappings"),
        ("? " * 100_000, "more than 32 lists and mappings"),
        ("a: " + "x" * LONGEST, "longer than 262,144 characters"),
        ("a: " + "9" * 5000, "a number of 5000 digits"),
        ("a: 0x" + "f" * 5000, "a number of 5002 digits"),
        ("a: 1\n---\nb: 2", "expected a single document"),
        ("a: b: c", "mapping values are not allowed"),
        ("a: \0", "0x0000"),
        (b"\xff\xfea", "no UTF-8 text, at byte 0"),
        ("a: 1".encode("utf-16"), "no UTF-8 text"),
        ("%YAML 9.9\n---\na: 1", "incompatible YAML document"),
    ],
    ids=lambda value: repr(value[:30]),
)
def test_what_is_not_plain_is_refused_in_one_line_and_soon(text, why):
    began = time.process_time()
    with pytest.raises(StrictYamlError, match=why) as caught:
        load(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    assert time.process_time() - began < 5


def test_aliases_and_merges_of_a_sensible_size_are_read():
    assert load("a: &a [1, 2]\nb: *a") == {"a": [1, 2], "b": [1, 2]}
    assert load("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}")["b"] == {"x": 3, "y": 2}


def test_a_byte_order_mark_and_windows_lines_are_no_part_of_it():
    assert load("\ufeffa: 1\r\nb: 2\r\n".encode()) == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    "value",
    [
        *(
            "yes",
            "0o10",
            "1e3",
            "010",
            "1:30",
            "1_000",
            "2024-01-01",
            "null",
            "~",
            "",
            "<<",
            "=",
            ".5",
            "5.",
            "0x1f",
            "+3",
        ),
        *(
            "-",
            "a\nb",
            "a: b",
            "true",
            "on",
            "y",
            "0b1",
            ".inf",
            "-0",
            "ü",
            "\u2028",
            "\x07",
            "# a",
            "a #b",
            "*a",
            "&a",
            "!a",
        ),
        *(1e-5, 1e300, 0.1, 1.0, math.inf, 3, -7, 0, None, True, False, 2**63),
    ],
    ids=repr,
)
def test_what_is_dumped_is_read_back_by_both_versions(value):
    text = dump({"a": value, "b": [value]})
    assert load(text) == yaml.safe_load(text) == {"a": value, "b": [value]}
    assert type(load(text)["a"]) is type(value)


def test_plain_values_are_written_as_ever():
    plain = {"model": "some/model", "seed": 7, "ratio": 0.1, "small": 1e-5, "text": None, "on": True, "drop": [1, 2]}
    assert dump(plain) == yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)

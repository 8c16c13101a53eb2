"""The oldest versions that are declared are those that tests ran with: where the oldest are to be installed, nothing newer is."""

from __future__ import annotations

import os
import re
from importlib.metadata import distributions, requires, version

import pytest

OURS = "optimum-prune"
OLDEST = os.environ.get("OPTIMUM_PRUNE_OLDEST", "")
"""The distribution of ours whose oldest versions are to be installed, if any are; `make test-versions` says so."""
DECLARED = re.compile(
    r"(?P<name>[A-Za-z0-9._-]+)(\[[^]]*\])?\s*(>=(?P<floor>[0-9.]+))?\s*(;.*extra == .(?P<extra>[a-z-]+).)?"
)


def declared(distribution: str, *extras: str) -> dict[str, str]:
    """What a distribution of ours depends on, with these extras too, and the oldest version that it declares of each."""
    found = {}
    for requirement in requires(distribution) or ():
        match = DECLARED.fullmatch(requirement)
        assert match, f"{distribution} declares more of a dependency than its oldest version: {requirement}"
        if not match["name"].startswith(OURS) and (match["extra"] is None or match["extra"] in extras):
            assert match["floor"], f"{distribution} does not say from which version on it takes {match['name']}"
            found[match["name"]] = match["floor"]
    return found


def numbers(version: str) -> tuple[int, ...]:
    """A version without its build and without zeros at its end: 8.0.0 is 8."""
    found = [int(number) for number in version.partition("+")[0].split(".")]
    while found and not found[-1]:
        found.pop()
    return tuple(found)


def ours() -> set[str]:
    return {each.name for each in distributions() if each.name.startswith(OURS)}


def test_every_dependency_is_declared_with_the_oldest_version_that_will_do():
    found = {distribution: declared(distribution, "demo", "test") for distribution in ours()}
    assert {"torch", "transformers", "pytest", "gguf"} <= found[OURS].keys()


@pytest.mark.skipif(not OLDEST, reason="the oldest versions are not asked for")
def test_the_oldest_versions_that_are_declared_are_installed():
    floors = declared(OLDEST, "demo", "test")
    assert floors
    newer = {
        name: f"{version(name)} is installed, {floor} is declared"
        for name, floor in floors.items()
        if numbers(version(name)) != numbers(floor)
    }
    assert newer == {}

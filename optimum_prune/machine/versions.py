"""The versions of Python and of installed packages, on which a result depends."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("optimum-prune", "torch", "transformers", "optimum", "accelerate", "datasets", "safetensors")


def installed_versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """The version of Python, and of each of these packages that is installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a source tree that is not installed
            continue
    return found

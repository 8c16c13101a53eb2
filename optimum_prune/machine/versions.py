"""The versions of Python and of installed packages, on which a result depends."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

import torch

PACKAGES = ("optimum-prune", "torch", "transformers", "optimum", "accelerate", "datasets", "safetensors")


def installed_versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """The version of Python, and of each of these packages that is installed; of torch, the build too."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = str(torch.__version__) if package == "torch" else version(package)
        except PackageNotFoundError:  # run from a source tree that is not installed, or not installed by pip
            continue
    return found

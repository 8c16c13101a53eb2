"""Which interpreter a pass runs in, and whether the environment of that interpreter has the libraries that the pass needs."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from optimum_prune.errors import RecipeError
from optimum_prune.passes.base import Pass
from optimum_prune.passes.folder import FolderPass

NEEDED = {"torch": "torch", "transformers": "transformers"}
"""What any pass needs in another environment: module, and what pip calls it."""
OLDEST = (3, 10)
"""The oldest Python that this package runs on."""
LOOK = """
import importlib.util, json, sys
def there(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
print(json.dumps({"version": sys.version_info[:2], "missing": [name for name in sys.argv[1:] if not there(name)]}))
"""


def interpreter_of(step: Pass) -> str | None:
    """The interpreter that a pass is to run in; none if it is this one.

    It is the one that the pass names; where this one lacks its libraries, the one that `OPTIMUM_PRUNE_PYTHON_<PASS>` names in the
    environment, or that of a folder `.venv-<pass>` here.
    """
    if not isinstance(step, FolderPass):
        return None
    if step.python is not None:
        return step.python
    if not step.missing():
        return None
    named = os.environ.get(f"OPTIMUM_PRUNE_PYTHON_{re.sub('[^A-Z0-9]', '_', step.name.upper())}")
    beside = Path(f".venv-{step.name}") / "bin" / "python"
    return named or (str(beside.absolute()) if beside.exists() else None)


def check_libraries(step: Pass) -> None:
    """Refuses a pass whose libraries are installed neither here nor where it is to run.

    Raises:
        RecipeError: with the command that installs them, or with what is wrong with the interpreter.
    """
    interpreter = interpreter_of(step)
    if interpreter is not None:
        requires = {**NEEDED, **step.requires}
        missing = _missing_there(interpreter, tuple(requires), step.name)
        pip = f"{interpreter} -m pip install"
    else:
        requires, missing, pip = dict(step.requires), step.missing(), "pip install"
    if not missing:
        return
    wanted = " ".join(f"'{requires[name]}'" for name in missing)
    where = f"in the environment of {interpreter}" if interpreter else "here"
    other = (
        ""
        if interpreter or not isinstance(step, FolderPass)
        else ", or name another interpreter as its option 'python'"
    )
    raise RecipeError(
        f"'{step.name}' needs {', '.join(missing)}, which is not installed {where}. Run: {pip} {wanted}{other}"
    )


@functools.cache
def _missing_there(interpreter: str, modules: tuple[str, ...], name: str) -> tuple[str, ...]:
    found = shutil.which(interpreter)
    if found is None:
        raise RecipeError(
            f"'{name}' is to run with the interpreter {interpreter}, which does not exist or cannot be executed. Name a Python, such as "
            f"path/to/environment/bin/python."
        )
    try:
        looked = subprocess.run([found, "-c", LOOK, *modules], capture_output=True, text=True, check=True, timeout=120)
        answer = json.loads(looked.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise RecipeError(
            f"'{name}' is to run with the interpreter {interpreter}, which does not answer as a Python does. Name a Python."
        ) from error
    if tuple(answer["version"]) < OLDEST:
        raise RecipeError(
            f"'{name}' is to run with the interpreter {interpreter}, which is Python {'.'.join(map(str, answer['version']))}. Name one of at "
            f"least {'.'.join(map(str, OLDEST))}."
        )
    return tuple(answer["missing"])


def versions(step: Pass) -> dict[str, str]:
    """The versions of Python, torch, transformers and what a pass requires, in the interpreter that asks."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for requirement in {**NEEDED, **step.requires}.values():
        name = re.split(r"[^A-Za-z0-9._-]", requirement)[0]
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # not installed by pip
            continue
    return found

"""Which interpreter a pass runs in, and whether the environment of that interpreter has the libraries that the pass needs.

An interpreter is a program of somebody's: it is run when a run begins, and never to plan one.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from typing import cast

from optimum_prune.errors import RecipeError, shown
from optimum_prune.machine.given_files import path_of
from optimum_prune.machine.versions import installed_versions
from optimum_prune.passes.base import Pass
from optimum_prune.passes.folder import FolderPass

NEEDED = {"torch": "torch", "transformers": "transformers"}
"""What any pass needs in another environment: module, and what pip calls it."""
OLDEST = (3, 10)
"""The oldest Python that this package runs on."""
ISOLATED = "import sys; sys.path[:] = [place for place in sys.path if place not in ('', sys.argv[1])]"
"""What code for another interpreter begins with: what lies in the folder that is its first argument is nobody's library.

Python puts the current folder on its path in front of all others; before it is taken out, only `sys` is imported, which is built in.
"""
LOOK = f"""{ISOLATED}
import importlib.util, json
def there(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
print(json.dumps({{"version": sys.version_info[:2], "missing": [name for name in sys.argv[2:] if not there(name)]}}))
"""


def interpreter_of(step: Pass) -> str | None:
    """The interpreter that a pass is to run in, as it is named; none if it is this one.

    It is the one that the pass names; where this one lacks its libraries, the one that `OPTIMUM_PRUNE_PYTHON_<PASS>` names in the
    environment. Nothing is executed because of where it lies.
    """
    named = _named(step)
    if named is None and not step.stage.in_memory and step.missing():
        named = os.environ.get(variable_of(step)) or None
    return named


def program_of(interpreter: str) -> str | None:
    """The program that an interpreter's name means, as a shell would find it; none if there is no such program."""
    path = path_of(interpreter)
    return shutil.which(path.absolute() if "/" in interpreter else path)


def _named(step: Pass) -> str | None:
    """The interpreter among the options of a pass."""
    return None if step.stage.in_memory else cast(FolderPass, step).python


def variable_of(step: Pass) -> str:
    """The environment's variable that names the interpreter for a pass."""
    return f"OPTIMUM_PRUNE_PYTHON_{re.sub('[^A-Z0-9]', '_', step.name.upper())}"


def check_allowed(step: Pass) -> None:
    """Refuses an interpreter that a pass of somebody's recipe names.

    Raises:
        RecipeError: it names one.
    """
    if (named := _named(step)) is not None:
        raise RecipeError(
            f"The recipe runs '{step.name}' with the program {shown(named)}, which a recipe cannot decide by itself. If you trust that program, add "
            f"--allow-interpreters; or leave the option 'python' out and name it in {variable_of(step)}."
        )


def check_libraries(step: Pass) -> None:
    """Refuses a pass whose libraries are not installed here, or whose interpreter is not there; runs nothing.

    Raises:
        RecipeError: with the command that installs them.
    """
    interpreter = interpreter_of(step)
    if interpreter is None:
        _refuse_missing(step, step.lacking(), dict(step.needs), None)
    else:
        _program(interpreter, step.name)


def check_environment(step: Pass) -> None:
    """Refuses a pass whose interpreter lacks its libraries, or is none: runs it.

    Raises:
        RecipeError: with the command that installs them, or with what is wrong with the interpreter.
    """
    interpreter = interpreter_of(step)
    if interpreter is not None:
        requires = {**NEEDED, **step.requires}
        _refuse_missing(step, _missing_there(interpreter, tuple(requires), step.name), requires, interpreter)


def not_looked_at(step: Pass) -> str:
    """What is to be said of a pass whose interpreter is not to be run now; nothing of others."""
    interpreter = interpreter_of(step)
    return (
        f"'{step.name}' is to run with {interpreter}; whether its libraries are there was not looked at."
        if interpreter
        else ""
    )


def _refuse_missing(step: Pass, missing: Sequence[str], requires: Mapping[str, str], interpreter: str | None) -> None:
    if not missing:
        return
    wanted = " ".join(f"'{requires[name]}'" for name in missing)
    where = f"in the environment of {interpreter}" if interpreter else "here"
    pip = f"{interpreter} -m pip install" if interpreter else "pip install"
    other = (
        ""
        if interpreter or step.stage.in_memory
        else f", or name another interpreter in the environment variable {variable_of(step)} or as its option 'python'"
    )
    raise RecipeError(
        f"'{step.name}' needs {', '.join(missing)}, which is not installed {where}. Run: {pip} {wanted}{other}"
    )


@functools.cache
def _missing_there(interpreter: str, modules: tuple[str, ...], name: str) -> tuple[str, ...]:
    """Those of some modules that an interpreter does not find."""
    try:
        looked = subprocess.run(
            [_program(interpreter, name), "-c", LOOK, os.getcwd(), *modules],  # noqa: PTH109 - as that interpreter writes it
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
            stdin=subprocess.DEVNULL,
            env=isolated_environment(),
        )
        answer = json.loads(looked.stdout)
        version, missing = tuple(answer["version"]), tuple(answer["missing"])
    except (OSError, subprocess.SubprocessError, ValueError, LookupError, TypeError) as error:
        raise RecipeError(
            f"'{name}' is to run with the interpreter {interpreter}, which does not answer as a Python does. Name a Python."
        ) from error
    if version < OLDEST:
        raise RecipeError(
            f"'{name}' is to run with the interpreter {interpreter}, which is Python {'.'.join(map(str, version))}. Name one of at "
            f"least {'.'.join(map(str, OLDEST))}."
        )
    return missing


def _program(interpreter: str, name: str) -> str:
    """The program of an interpreter in which a pass is to run.

    Raises:
        RecipeError: there is none.
    """
    program = program_of(interpreter)
    if program is None:
        raise RecipeError(
            f"'{name}' is to run with the interpreter {interpreter}, which does not exist or cannot be executed. Name a Python, such as "
            f"path/to/environment/bin/python."
        )
    return program


def isolated_environment(path: str = "") -> dict[str, str]:
    """The environment for another interpreter: neither it nor a Python that it starts looks for modules in the current folder.

    Args:
        path: where it looks for modules beside its own.
    """
    return {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": path}


def versions(step: Pass) -> dict[str, str]:
    """The versions of Python, torch, transformers and what a pass requires, in the interpreter that asks."""
    required = {**NEEDED, **step.requires}.values()
    return installed_versions(re.split(r"[^A-Za-z0-9._-]", requirement)[0] for requirement in required)

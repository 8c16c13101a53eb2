"""Another interpreter is a program: it runs when it is asked for, by somebody who may, and ends with whoever asked."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from folder_passes import Archive
from leaving_pass import Leave

from optimum_prune import Depth, Recipe
from optimum_prune.conversion import elsewhere
from optimum_prune.conversion.interpreter import check_environment, interpreter_of, not_looked_at
from optimum_prune.errors import PassError, RecipeError

TRAP = "import pathlib; pathlib.Path({mark!r}).touch()\n"
SHELL = '#!/bin/sh\ntouch {mark}\nexec {python} "$@"\n'


@pytest.fixture
def mark(tmp_path):
    """A file that is there if something ran that should not."""
    return tmp_path / "mark"


@pytest.fixture
def program(tmp_path, mark):
    """An interpreter that leaves a mark, in an empty folder that is the current one."""
    file = tmp_path / "here" / ".venv-archive" / "bin" / "python"
    file.parent.mkdir(parents=True)
    file.write_text(SHELL.format(mark=mark, python=sys.executable))
    file.chmod(0o755)
    return file


@pytest.fixture
def lacking(monkeypatch):
    """A pass whose library is not installed anywhere."""
    monkeypatch.setattr(Archive, "requires", {"no_such_module_anywhere": "no-such-module"})


@pytest.fixture
def with_archive(plugins):
    """The plugins, with a pass that can run elsewhere."""
    import dataclasses

    return dataclasses.replace(plugins, passes={**plugins.passes, "archive": Archive})


def test_nothing_runs_because_of_where_it_lies(lacking, program, mark, monkeypatch):
    monkeypatch.chdir(program.parent.parent.parent)
    assert interpreter_of(Archive()) is None
    with pytest.raises(RecipeError, match=r"not installed here.*OPTIMUM_PRUNE_PYTHON_ARCHIVE"):
        Recipe(passes=(Archive(),))
    assert not mark.exists()


def test_a_recipe_names_no_program_by_itself(with_archive, program, mark):
    plain = {"passes": [{"archive": {"python": str(program)}}]}
    with pytest.raises(
        RecipeError, match=r"'archive' with the program .* --allow-interpreters; or .* OPTIMUM_PRUNE_PYTHON_ARCHIVE"
    ):
        Recipe.from_dict(plain, with_archive)
    recipe = Recipe.from_dict(plain, with_archive, allow_interpreters=True)
    assert recipe == Recipe(passes=(Archive(python=str(program)),))
    assert not mark.exists(), "a recipe that is only read runs nothing"
    assert str(program) in not_looked_at(recipe.passes[0])
    assert not_looked_at(Depth(layers=1)) == not_looked_at(Archive()) == ""
    check_environment(recipe.passes[0])
    assert mark.exists()


@pytest.mark.parametrize(
    "named", ["./.venv-archive/bin/python", ".venv-archive/bin/python", "~/.venv-archive/bin/python"]
)
def test_an_interpreter_is_found_as_a_shell_would_find_it(named, program, mark, monkeypatch):
    here = program.parent.parent.parent
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(here))
    check_environment(Archive(python=named))
    assert mark.exists()


def test_a_program_of_the_current_folder_has_to_be_named_as_such(program, mark, monkeypatch):
    monkeypatch.chdir(program.parent)
    program.rename(program.parent / "mypython")
    with pytest.raises(RecipeError, match="which does not exist or cannot be executed"):
        Recipe(passes=(Archive(python="mypython"),))


def test_the_current_folder_has_no_libraries_for_it(recipe, tmp_path, mark, monkeypatch):
    from optimum_prune import compress

    here = tmp_path / "here"
    here.mkdir()
    for name in ("json", "torch", "transformers", "importlib", "optimum_prune", "safetensors", "folder_passes"):
        (here / f"{name}.py").write_text(TRAP.format(mark=str(mark)))
    monkeypatch.chdir(here)
    monkeypatch.setenv("PYTHONPATH", str(here))
    step = Archive(python=sys.executable)
    check_environment(step)
    compress(recipe(step), tmp_path / "out")
    assert not mark.exists()


def test_a_converter_that_asks_to_end_is_said_to(recipe, tmp_path):
    from optimum_prune import compress

    with pytest.raises(PassError, match=r"'leave' asked the program to end, by sys\.exit\(0\)\."):
        compress(recipe(Leave(python=sys.executable)), tmp_path / "out")


# Ending


def runs(process):
    """Whether a process is there, and no zombie of one."""
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def ended(processes):
    deadline = time.monotonic() + 10
    while any(map(runs, processes)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(runs, processes))


CHILD = """
import os, subprocess, sys, threading, time
from optimum_prune.conversion.elsewhere import _end_with
threading.Thread(target=_end_with, args=(int(sys.argv[1]),), daemon=True).start()
child = subprocess.Popen(["sleep", "60"])
print(os.getpid(), child.pid, flush=True)
time.sleep(60)
"""


def test_an_interpreter_and_what_it_started_end_with_an_interrupt(monkeypatch):
    heard = []

    class Ear:
        def write(self, line):
            heard.extend(map(int, line.split()))
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(sys, "stderr", Ear())
    with pytest.raises(KeyboardInterrupt):
        elsewhere._run([sys.executable, "-c", CHILD], os.environ, True)
    assert len(heard) == 2
    assert ended(heard)


def test_an_interpreter_and_what_it_started_end_when_their_parent_is_killed():
    script = f"from optimum_prune.conversion import elsewhere; import os; elsewhere._run([{sys.executable!r}, '-c', {CHILD!r}], os.environ, True)"
    with subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True) as parent:
        heard = [int(number) for number in parent.stderr.readline().split()]
        parent.kill()
        parent.stderr.close()
    assert len(heard) == 2
    assert ended(heard)


def test_what_it_left_behind_ends_with_it():
    script = "import subprocess; print(subprocess.Popen(['sleep', '60']).pid, flush=True)"
    began = time.monotonic()
    last = elsewhere._run([sys.executable, "-c", script], os.environ, False)
    assert ended([int(last[0])])
    assert time.monotonic() - began < 20


def test_a_program_that_cannot_be_run_is_named(tmp_path):
    (tmp_path / "python").write_bytes(b"\x7fELF nonsense")
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(PassError, match=r"python cannot be run: Exec format error"):
        elsewhere._run([str(tmp_path / "python")], os.environ, False)

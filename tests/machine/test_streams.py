"""What a program prints on purpose is apart from what libraries print."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from optimum_prune.machine import streams

LIBRARY = f"""
import os, subprocess, sys
sys.path.append("{Path(streams.__file__).parent}")
from streams import NotPrintedError, for_results, say
def noise():
    print("noise of Python")
    os.write(1, b"noise of C\\n")
    subprocess.run(["echo", "noise of a program"])
"""


def run(script, shell=""):
    command = f"exec {sys.executable} -c '{LIBRARY}{script}' {shell}"
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, input="y\n")


def test_results_are_on_stdout_and_all_else_on_stderr():
    done = run('with for_results() as out:\n    noise()\n    say(out, "result")\nprint("after")')
    assert (done.returncode, done.stdout) == (0, "result\nafter\n")
    assert sorted(done.stderr.splitlines()) == ["noise of C", "noise of Python", "noise of a program"]


def test_a_question_gets_no_answer():
    done = run(
        'with for_results():\n    try:\n        input("?")\n    except EOFError:\n        print("none")\nprint(input())'
    )
    assert (done.stdout, done.stderr) == ("y\n", "?none\n")


@pytest.mark.parametrize(
    ("shell", "why"),
    [
        (">/dev/full", "Standard output takes nothing: No space left on device."),
        (">&-", "Standard output takes nothing: Bad file descriptor."),
        ("> >(true)", "gone"),
    ],
)
def test_what_cannot_be_printed_is_said_and_nothing_follows(shell, why):
    done = run(
        'import time; time.sleep(0.5)\ntry:\n    with for_results() as out:\n        say(out, "result")\nexcept NotPrintedError as error:\n'
        '    print("gone" if error.nobody_reads else error, file=sys.stderr)',
        shell,
    )
    assert (done.returncode, done.stderr) == (0, f"{why}\n")


@pytest.mark.parametrize("closed", ["<&-", "2>&-", "<&- >&- 2>&-"])
def test_a_file_does_not_take_the_place_of_a_stream_that_is_closed(closed, tmp_path):
    file = tmp_path / "weights"
    done = run(
        f'with for_results() as out:\n    opened = open("{file}", "w")\n    noise()\n    opened.write("weights")',
        closed,
    )
    assert done.returncode == 0
    assert file.read_text() == "weights"


def test_letters_that_the_terminal_has_not_are_escaped():
    place = {**os.environ, "PYTHONIOENCODING": "ascii"}
    script = LIBRARY + 'with for_results() as out:\n    say(out, "\\u00fc \\udcff")'
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=place, timeout=60)
    assert (done.returncode, done.stdout) == (0, "\\xfc \\udcff\n")

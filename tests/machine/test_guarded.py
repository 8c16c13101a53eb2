"""The code of a pass runs, and the process is as it was before."""

import errno
import os
import signal
import sys
import warnings
from pathlib import Path

import pytest
import torch

from optimum_prune.errors import NumericalError, PassError
from optimum_prune.machine.isolation import guarded, guarded_steps


def state():
    return (
        torch.get_default_dtype(),
        torch.empty(1).device,
        torch.get_default_device(),
        torch.is_grad_enabled(),
        torch.get_num_threads(),
        Path.cwd(),
        dict(os.environ),
        signal.getsignal(signal.SIGINT),
        sys.stdout,
        list(warnings.filters),
    )


def change():
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_grad_enabled(False)
    torch.set_num_threads(torch.get_num_threads() + 1)
    os.chdir("/")
    os.environ["LOUD"] = "1"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    print("noise")


def change_and_raise(error):
    change()
    raise error


def test_all_is_put_back_and_what_is_printed_is_no_result(capsys):
    before = state()
    with guarded("The pass 'loud'"):
        change()
    assert state() == before
    assert capsys.readouterr() == ("", "noise\n")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (SystemExit(0), r"The pass 'loud' asked the program to end, by sys\.exit\(0\)"),
        (SystemExit("bye"), r"sys\.exit\('bye'\)"),
        (
            KeyError("a\nb"),
            r"The pass 'loud' failed: KeyError: 'a\\nb'\. It was in test_guarded\.py, line \d+\. Please report it",
        ),
        (ValueError("first\nsecond"), r"failed: ValueError: first\. "),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), r"failed: FileNotFoundError"),
        (GeneratorExit(), r"failed: GeneratorExit"),
        (MemoryError(), r"found no memory left.*--offload"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), r"found no memory left"),
    ],
    ids=repr,
)
def test_an_error_names_the_pass_and_leaves_nothing_changed(error, message):
    before = state()
    with pytest.raises(PassError, match=message) as caught, guarded("The pass 'loud'"):
        change_and_raise(error)
    assert state() == before
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), NumericalError("ours"), OSError(errno.ENOSPC, "No space left on device")], ids=repr
)
def test_what_is_no_error_of_the_pass_stays_what_it_is(error):
    before = state()
    with pytest.raises(type(error)) as caught, guarded("The pass 'loud'"):
        change_and_raise(error)
    assert caught.value is error
    assert state() == before


def test_between_its_steps_the_process_is_as_before_and_within_them_as_the_pass_left_it():
    before, found = state(), []

    def steps():
        with torch.no_grad():
            torch.set_default_dtype(torch.float64)
            for number in range(3):
                found.append((torch.is_grad_enabled(), torch.get_default_dtype()))
                yield number

    for number, made in enumerate(guarded_steps("The pass 'loud'", steps)):
        assert made == number
        assert state() == before
    assert state() == before
    assert found == [(False, torch.float64)] * 3


def test_a_step_that_fails_names_the_pass():
    def steps():
        yield 1
        change()
        sys.exit(0)

    before, made = state(), guarded_steps("The pass 'loud'", steps)
    assert next(made) == 1
    with pytest.raises(PassError, match="asked the program to end"):
        next(made)
    assert state() == before


def test_steps_may_be_a_list_and_making_them_may_fail():
    assert list(guarded_steps("The pass 'loud'", lambda: [1, 2])) == [1, 2]
    with pytest.raises(PassError, match="failed: TypeError"):
        list(guarded_steps("The pass 'loud'", lambda: 7))

"""A program that is told to stop says so and ends with 130, at any moment."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from optimum_prune.machine import interrupts

FOLDER = Path(interrupts.__file__).parent
EARLY = f"""
import sys
sys.path.append({str(FOLDER)!r})  # the module alone, without the libraries that its package imports
import interrupts
interrupts.end_at_once("program")
print("ready", flush=True)
{{work}}
"""
RAISED = """
try:
    with interrupts.raised():
        print("steady", flush=True)
        {work}
        result = 0
except KeyboardInterrupt:
    print("unwound", flush=True)
    result = 130
except Exception:
    result = 130 if interrupts.came() else 1
sys.exit(result)
"""
SLEEP = "import time; time.sleep(60)"


def stopped(script, number, times=1):
    """Runs a script, sends a signal when it is ready, and returns its code, stdout and stderr."""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        word = "steady" if "steady" in script else "ready"
        while process.stdout.readline().strip() != word:
            assert process.poll() is None
        for _ in range(times):
            time.sleep(0.1)
            process.send_signal(number)
        out, error = process.communicate(timeout=60)
    return process.returncode, out, error


@pytest.mark.parametrize("number", interrupts.SIGNALS)
def test_in_the_beginning_it_ends_at_once(number):
    code, _, error = stopped(EARLY.format(work=SLEEP), number)
    assert (code, error) == (130, "program: interrupted; nothing was written.\n")


@pytest.mark.parametrize("number", interrupts.SIGNALS)
def test_later_it_is_unwound(number):
    code, out, error = stopped(EARLY.format(work=RAISED.format(work=SLEEP)), number)
    assert (code, out, error) == (130, "unwound\n", "")


def test_two_signals_shortly_after_one_another_are_one():
    slow = SLEEP + "\n    except KeyboardInterrupt:\n        time.sleep(1)\n        raise"
    script = EARLY.format(work=RAISED.format(work=f"try:\n            {slow}".replace("\n    ", "\n        ")))
    code, out, error = stopped(script, signal.SIGINT, times=2)
    assert (code, out, error) == (130, "unwound\n", "")


@pytest.mark.parametrize(
    "work",
    [
        f"exec({SLEEP!r})",
        "class Deaf:\n            def __del__(self):\n                import time; time.sleep(2)\n"
        "        deaf = Deaf(); del deaf; import time; time.sleep(20)",
        f"try:\n            {SLEEP}\n        except BaseException as error:\n            raise RuntimeError('lost') from None",
    ],
    ids=["in an exec", "in a destructor", "turned into something else"],
)
def test_an_interrupt_is_not_lost(work):
    code, _, error = stopped(EARLY.format(work=RAISED.format(work=work)), signal.SIGINT)
    assert (code, error) == (130, "")


def test_in_the_end_it_is_too_late():
    script = EARLY.format(
        work="with interrupts.raised():\n    pass\nprint('steady', flush=True)\nimport time; time.sleep(1)"
    )
    assert stopped(script, signal.SIGTERM) == (0, "", "")


def test_what_was_ignored_stays_ignored():
    script = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)" + EARLY.format(
        work=RAISED.format(work="import time; time.sleep(1)")
    )
    assert stopped(script, signal.SIGINT) == (0, "", "")


def test_afterwards_signals_are_heeded_as_before():
    before = {number: signal.getsignal(number) for number in interrupts.SIGNALS}
    with pytest.raises(KeyboardInterrupt), interrupts.raised():  # noqa: PT012 - the signal arrives between the two
        signal.raise_signal(signal.SIGTERM)
        time.sleep(1)
    assert {number: signal.getsignal(number) for number in interrupts.SIGNALS} == before


def test_when_a_result_is_about_to_be_there_it_is_too_late_to_stop():
    with interrupts.raised():
        with interrupts.finishing():
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert not interrupts.stopping()


def test_a_result_that_fails_at_its_end_can_be_stopped_again():
    with interrupts.raised():
        with pytest.raises(ValueError, match="mine"), interrupts.finishing():
            raise ValueError("mine")
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert interrupts.stopping()
    assert not interrupts.stopping()


def test_where_something_is_to_be_kept_a_signal_waits_until_it_is():
    with interrupts.raised():
        done = []
        with pytest.raises(KeyboardInterrupt), interrupts.deferred():  # noqa: PT012 - the signal arrives within
            assert not interrupts.waiting()
            signal.raise_signal(signal.SIGTERM)
            assert interrupts.waiting()
            signal.raise_signal(signal.SIGTERM)  # as a terminal and a launcher send it
            done.append("kept")
        assert done == ["kept"]
        assert not interrupts.waiting()


def test_a_later_signal_does_not_wait(monkeypatch):
    monkeypatch.setattr(interrupts, "GRACE", 0.0)
    with interrupts.raised(), interrupts.deferred():
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.01)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert not interrupts.waiting()


def test_what_goes_wrong_meanwhile_is_not_hidden_by_a_signal_that_waits():
    with interrupts.raised(), pytest.raises(ValueError, match="mine"), interrupts.deferred():  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        raise ValueError("mine")


def test_a_program_that_does_not_come_to_an_end_says_what_is_kept():
    deaf = (
        "interrupts.GRACE = 0.05\n"
        "        with interrupts.telling(lambda: 'all is kept.'):\n"
        "            while True:\n"
        "                try:\n"
        "                    import time; time.sleep(60)\n"
        "                except KeyboardInterrupt:\n"
        "                    pass"
    )
    code, _, error = stopped(EARLY.format(work=RAISED.format(work=deaf)), signal.SIGTERM, times=3)
    assert (code, error) == (130, "program: interrupted; all is kept.\n")

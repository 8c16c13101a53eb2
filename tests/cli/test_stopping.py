"""Runs that end early, and what they leave."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import tiny
import torch
from command_line import MODULE, common, names, one_sentence, process
from safetensors.torch import load_file


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(dtype, llama, text_file, work):
    done = process(
        *(
            *MODULE,
            "prune",
            "depth",
            "--layers",
            1,
            "--dtype",
            dtype,
            "--output",
            work / "out",
            *common(llama, text_file),
        ),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)),
    )
    assert done.returncode == 1, done.stderr
    assert "cannot be written" in one_sentence(done.stderr)
    assert names(work) == ["out.unfinished"]


@pytest.fixture
def started(llama, text_file, work):
    """A run that takes long enough to be stopped, stopped when it has begun to write."""
    text = work.parent / "long.txt"
    text.write_text(tiny.text(30_000))
    command = [*MODULE, "prune", "depth", "--layers", "1", "--output", str(work / "out"), "--model", str(llama)]
    command += ["--text", str(text), "--samples", "600", "--length", "100", "--eval-samples", "2", "--device", "cpu"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not names(work) and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.5)
    yield run
    with contextlib.suppress(ProcessLookupError):
        run.kill()
    run.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_stopped_says_so_and_leaves_no_output(number, started, work):
    assert started.poll() is None
    started.send_signal(number)
    out, error = started.communicate(timeout=30)
    # Python ends itself by SIGINT, 130 to a shell, if the interrupt passed through an `exec` of a string, as in an import.
    assert started.returncode in (130, -signal.SIGINT)
    assert out == ""
    assert "interrupted" in one_sentence(error)
    assert names(work) == (["out.unfinished"] if "kept in" in error else [])


def test_what_a_killed_run_leaves_is_no_output_and_is_cleaned_up(started, cli, llama, text_file, work):
    assert started.poll() is None
    started.kill()
    started.communicate()
    assert not (work / "out").exists()
    left = [name for name in names(work) if name not in ("out.unfinished", ".out.lock")]
    assert len(left) == 1
    assert left[0].startswith(".out.partial")
    code, _, error = cli("prune", "depth", "--drop", 1, "--output", work / "out", *common(llama, text_file))
    assert code == 0
    assert error == "" or error.startswith("Beginning anew instead of going on from")
    assert len(error.splitlines()) <= 1
    assert names(work) == ["out"]


def test_the_reader_of_the_output_may_go_away():
    done = process(
        "bash", "-c", f"{sys.executable} -m optimum_prune compress families | head -c 1; exit ${{PIPESTATUS[0]}}"
    )
    assert "Traceback" not in done.stderr


def test_the_environment_of_a_run_is_left_alone(cli, llama, text_file, work):
    before, state = dict(os.environ), torch.get_default_dtype()
    cli("prune", "depth", "--drop", 1, "--output", work / "out", *common(llama, text_file))
    assert dict(os.environ) == before
    assert torch.get_default_dtype() == state
    assert set(load_file(work / "out" / "model.safetensors"))

"""Every command and snippet of docs/serving.md, run as it is written there, in the environments that `make test-engines` makes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest
import tiny
from forms import save

pytestmark = pytest.mark.engines
GUIDE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
PLUGINS = {"gguf": "llama_cpp", "onnx": "onnxruntime_genai", "openvino": "openvino_genai"}
SERVER = "http://localhost:8000/health"
PATIENCE = 240
"""Seconds for a server to be there."""


def blocks(title: str) -> list[tuple[str, str]]:
    """The language and the text of each block below a title."""
    (section,) = (each for each in GUIDE.split("\n## ") if each.startswith(f"{title}\n"))
    return BLOCK.findall(section)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a model whose layers differ, called OUT, and a text."""
    save("llama", "widths", tmp_path / "OUT")
    (tmp_path / "my.txt").write_text(tiny.text(30_000))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def run(language: str, text: str) -> str:
    """What a block prints."""
    if language == "bash":
        text = "\n".join(line for line in text.splitlines() if not line.startswith("pip install"))
        command = ["bash", "-e", "-c", text]
    else:
        command = [sys.executable, "-c", text]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, f"{text}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("title", ["llama.cpp", "ONNX Runtime", "OpenVINO", "Whatever else reads stock checkpoints"])
def test_what_is_exported_runs(title, place):
    found = blocks(title)
    for name in re.findall(r"compress export (\w+)", "".join(text for _, text in found)):
        if name in PLUGINS:
            pytest.importorskip(PLUGINS[name])
    for language, text in found:
        printed = run(language, text)
        assert "Saved to" in printed or "The capital of France is" in printed or language == "python"
        assert printed.strip()


def test_transformers_and_peft(place):
    pytest.importorskip("peft")
    (_, pipeline), (_, peft), (_, measured) = blocks("transformers")
    assert run("python", pipeline).startswith("The capital of France is")
    assert "trainable params: " in run("python", peft)
    assert measured.startswith("lm_eval --model hf --model_args pretrained=OUT,trust_remote_code=True")


@pytest.mark.skipif("OPTIMUM_PRUNE_PYTHON_VLLM" not in os.environ, reason="it does not name where vLLM is")
def test_vllm_serves(place):
    (_, serve), (_, ask) = blocks("vLLM")
    program, command, model, *flags = serve.split()
    assert (program, command) == (
        "vllm",
        "serve",
    )  # which asks for its version under a name that builds for CPUs have not
    module = [os.environ["OPTIMUM_PRUNE_PYTHON_VLLM"], "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    with (place / "log").open("wb") as log:
        there = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        server = subprocess.Popen([*module, *flags], env=there, stdout=log, stderr=log, start_new_session=True)
        try:
            end = time.monotonic() + PATIENCE
            while not _answers():
                assert server.poll() is None, (place / "log").read_text()[-3000:]
                assert time.monotonic() < end, (place / "log").read_text()[-3000:]
                time.sleep(1)
            assert '"text":' in run("bash", ask)
        finally:
            with suppress(ProcessLookupError):  # it has ended
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _answers() -> bool:
    try:
        with urllib.request.urlopen(SERVER, timeout=1):
            return True
    except OSError:
        return False

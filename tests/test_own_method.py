"""The example of a method of one's own, installed as its users would install it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parent.parent / "examples" / "own_method"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    site = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", site]
    copy = tmp_path_factory.mktemp("source")
    for file in EXAMPLE.iterdir():
        if file.is_file():
            (copy / file.name).write_bytes(file.read_bytes())
    subprocess.run([*pip, copy], check=True, capture_output=True)

    def run(*arguments):
        command = [sys.executable, "-m", "optimum_prune", *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": str(site)}
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout

    return run


def test_it_is_listed_with_its_provider(run):
    assert re.search(r"every-other +PRUNE +optimum-prune-every-other 0\.1\.0", run("compress", "passes"))


def test_it_prunes_a_model(run, llama, text_file, tmp_path):
    out = tmp_path / "out"
    texts = ["--text", text_file, "--samples", 2, "--length", 16]
    run("prune", "every-other", "--model", llama, "--nth", 3, "--output", out, *texts)
    assert json.loads((out / "compression/cuts.json").read_text()) == [{"pass": "every-other", "layers": "0-1,3-4"}]

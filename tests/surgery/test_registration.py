from __future__ import annotations

import subprocess
import sys

import pytest
import tiny

from optimum_prune import Osscar
from optimum_prune.anatomy.decoder import Decoder
from optimum_prune.testing import pruned

AUTO_CLASSES = "transformers.models.auto.modeling_auto"
READ = (
    "from transformers import AutoModelForCausalLM\nAutoModelForCausalLM.from_pretrained(sys.argv[1])\nprint('read')"
)


def in_a_process_of_its_own(program, *arguments):
    command = [sys.executable, "-c", "import sys\n" + program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=120)


@pytest.fixture(scope="module")
def heterogeneous_folder(plugins, tmp_path_factory):
    model = tiny.model("llama")
    pruned(Osscar(ratio=0.5, protect=(0,)), Decoder.of(model, plugins.families), tiny.windows(2), plugins)
    folder = tmp_path_factory.mktemp("heterogeneous")
    model.save_pretrained(folder)
    return folder


def test_importing_this_package_leaves_the_auto_classes_alone_until_somebody_wants_them(heterogeneous_folder):
    program = f"""
import transformers
before = list(sys.meta_path)
import optimum_prune
assert {AUTO_CLASSES!r} not in sys.modules, "imported"
{READ}
assert sys.meta_path == before, "left behind"
"""
    run = in_a_process_of_its_own(program, heterogeneous_folder)
    assert (run.stdout.strip(), run.returncode) == ("read", 0), run.stderr


def test_auto_classes_that_are_there_already_read_such_models_too(heterogeneous_folder):
    run = in_a_process_of_its_own(f"import {AUTO_CLASSES}\nimport optimum_prune\n{READ}", heterogeneous_folder)
    assert run.stdout.strip() == "read", run.stderr

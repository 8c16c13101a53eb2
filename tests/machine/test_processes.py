from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import process_runs
import pytest
import tiny
import torch
from accelerate import cpu_offload, dispatch_model
from filelock import FileLock  # which torch brings along
from safetensors.torch import load_file

from optimum_prune import Depth, Osscar, Pruner
from optimum_prune.anatomy.decoder import Decoder
from optimum_prune.builtin.prune.block_pruner import BlockPruner
from optimum_prune.errors import SurgeryError
from optimum_prune.testing import pruned

TESTS = Path(__file__).parent.parent
ALONE = [sys.executable]
TWO, THREE = (
    [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] for count in (2, 3)
)
BY_THREE = ("osscar-global", "mixture-shared", "depth-racing", "one-window")
"""Fewer windows than processes among them."""


def run(*command, timeout=600):
    place = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"}
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, timeout=timeout, env=place
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What every case leaves, by the number of processes; made once, however many workers ask for it."""
    base = tmp_path_factory.getbasetemp()
    place = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "processes"
    place.mkdir(exist_ok=True)
    folders = {count: place / str(count) for count in (1, 2, 3)}
    with FileLock(place / "lock"):
        for count, launcher in ((1, ALONE), (2, TWO), (3, THREE)):
            if (folders[count] / "done").exists():
                continue
            folders[count].mkdir(exist_ok=True)
            cases = BY_THREE if count == 3 else process_runs.CASES
            done = run(*launcher, TESTS / "machine" / "process_runs.py", folders[count], *cases)
            assert done.returncode == 0, done.stderr
            (folders[count] / "done").touch()
    return folders


def read(folder, case, rank):
    return json.loads((folder / f"{case}-{rank}.json").read_text()), load_file(folder / f"{case}-{rank}.safetensors")


@pytest.mark.parametrize(
    ("case", "count"), [*((case, 2) for case in process_runs.CASES), *((case, 3) for case in BY_THREE)]
)
def test_several_processes_do_what_one_does(found, case, count):
    alone, expected = read(found[1], case, 0)
    for rank in range(count):
        outcome, weights = read(found[count], case, rank)
        assert outcome["processes"] == count
        assert outcome["cuts"] == alone["cuts"]
        assert outcome["before"] == pytest.approx(alone["before"], rel=1e-5)
        assert outcome["after"] == pytest.approx(alone["after"], rel=1e-4)
        assert weights.keys() == expected.keys()
        for name, value in weights.items():
            assert torch.linalg.norm(value - expected[name]) <= 1e-4 * torch.linalg.norm(expected[name]), name


@pytest.mark.parametrize("case", ["depth-racing", "depth-greedy", "block-pruner"])
def test_a_race_drops_the_same_variants_after_as_many_tokens(found, case):
    def measured(folder):
        evidence = read(folder, case, 0)[0]["evidence"][-1]
        rounds = evidence.get("rounds", [evidence])
        return [each["measured_on_tokens"] for each in rounds]

    assert any(len(set(each.values())) > 1 for each in measured(found[1])), "nothing was out early"
    assert measured(found[1]) == measured(found[2])


def test_every_process_holds_the_same_weights(found):
    for case in process_runs.CASES:
        first, other = (read(found[2], case, rank)[1] for rank in (0, 1))
        assert all(torch.equal(first[name], other[name]) for name in first)


# The command line


@pytest.fixture
def command(llama, text_file, tmp_path):
    """Arguments for a run that writes to `out` in an empty folder."""
    texts = ["--text", text_file, "--samples", 7, "--length", 32, "--eval-samples", 3]
    out = tmp_path / "work" / "out"
    out.parent.mkdir()
    return ["-m", "optimum_prune", "prune", "osscar", "--model", llama, "--device", "cpu", *texts, "--output", out]


def free_port():
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        return any_port.getsockname()[1]


def test_accelerate_launch_makes_one_folder_and_one_report(command):
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", 1]
    accelerate += ["--num_processes", 2, "--mixed_precision", "no", "--dynamo_backend", "no"]
    done = run(*accelerate, "--main_process_port", free_port(), *command, "--ratio", 0.25)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Saved to") == done.stdout.count("Parameters") == 1
    out = command[-1]
    assert [entry.name for entry in out.parent.iterdir()] == ["out"]
    report = json.loads((out / "compression" / "report.json").read_text())
    assert report["processes"] == 2
    again = run(*ALONE, *command[:-1], out.parent / "alone", "--ratio", 0.25)
    assert again.returncode == 0, again.stderr
    alone = json.loads((out.parent / "alone" / "compression" / "report.json").read_text())
    assert report["perplexity"]["before"] == pytest.approx(alone["perplexity"]["before"], rel=1e-5)
    assert report["perplexity"]["after"] == pytest.approx(alone["perplexity"]["after"], rel=1e-4)
    for name in ("cuts.json", "recipe.yaml"):
        assert (out / "compression" / name).read_text() == (out.parent / "alone" / "compression" / name).read_text()
    evaluated = run(
        *TWO, "-m", "optimum_prune", "compress", "evaluate", out, "--json", "--device", "cpu", *command[8:14]
    )
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads(evaluated.stdout)["perplexity"] > 1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (["--ratio", 2], "has ratio 2.0"),
        (["--ratio", 0.25, "--length", 100_000], "the model takes at most"),
    ],
)
def test_an_error_is_told_once_and_nobody_hangs(command, change, sentence):
    done = run(*TWO, *command, *change)
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if ": error: " in line]
    assert len(told) == 1, done.stderr
    assert sentence in told[0]
    assert list(command[-1].parent.iterdir()) == []


def test_an_error_of_one_process_ends_all(command, llama, tmp_path):
    """The second process alone cannot use its share: a token that only its windows have has an embedding that is not finite."""
    script = tmp_path / "lonely.py"
    script.write_text(
        "import sys, tiny, torch\n"
        "from optimum_prune.testing import pruned\n"
        "from optimum_prune import Osscar\n"
        "from optimum_prune.machine import processes\n"
        "from optimum_prune.anatomy.decoder import Decoder\n"
        "from optimum_prune.errors import NumericalError\n"
        "from optimum_prune.hooks.plugins import load\n"
        "windows, model, plugins = tiny.windows(2), tiny.model('llama'), load()\n"
        "only = set(windows.tokens[1].tolist()) - set(windows.tokens[0].tolist())\n"
        "model.get_input_embeddings().weight.data[only.pop()] = torch.nan\n"
        "with processes.started():\n"
        "    try:\n"
        "        pruned(Osscar(ratio=0.5), Decoder.of(model, plugins.families), windows, plugins)\n"
        "    except NumericalError as error:\n"
        "        sys.stdout.write(f'{processes.rank()} {error}\\n')\n"
    )
    done = run(*TWO, script)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if not line.startswith("[Gloo]")]  # of torch 2.9 and 2.10
    assert sorted(line[:16] for line in lines) == ["0 The embeddings", "1 The embeddings"]


def test_a_process_that_is_killed_ends_all(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, signal, sys\n"
        "from optimum_prune.cli import commands, main\n"
        "from optimum_prune.machine import processes\n"
        "def families(arguments, plugins):\n"
        "    processes.wait()\n"
        "    if processes.rank() == 1:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    processes.wait()\n"
        "commands.evaluate = families\n"
        "sys.exit(main.main(['compress', 'evaluate', 'any']))\n"
    )
    start = time.monotonic()
    done = run(*TWO, script)
    assert done.returncode != 0
    assert time.monotonic() - start < 60
    told = [line for line in done.stderr.splitlines() if ": error: " in line or "interrupted;" in line]
    assert len(told) <= 1, done.stderr  # the launcher may end the other before it can say anything


def test_an_interrupted_run_leaves_nothing(command):
    arguments = [str(part) for part in [*TWO, *command, "--ratio", 0.25, "--samples", 90, "--length", 100]]
    place = {**os.environ, "PYTHONPATH": f"{TESTS.parent}"}
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env=place)
    parent = command[-1].parent
    while not any(parent.iterdir()):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode != 0
    assert list(parent.iterdir()) == []
    assert len([line for line in stderr.splitlines() if "interrupted;" in line]) == 1, stderr


# A model whose modules accelerate has wrapped


def by_layers(model):
    """A device_map as "auto" makes it: a device for each layer, and for each part outside of them."""
    found = {}
    for name, _ in [*model.named_parameters(), *model.named_buffers()]:
        parts = name.split(".")
        found[".".join(parts[: 3 if parts[1] in ("layers", "h") else 2])] = "cpu"
    found.pop("lm_head.weight", None)
    return found | {"lm_head": "cpu"}


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("llama", Osscar(ratio=0.25, head_ratio=0.5)),
        ("gpt2-wide", Osscar(ratio=0.25, allocation="global")),
        ("qwen3_moe", Osscar(ratio=0.25)),
        ("llama", Depth(layers=2)),
        ("llama", Depth(layers=2, criterion="taylor", protect_first=0, protect_last=0)),
        ("llama", BlockPruner(blocks=3)),
    ],
)
def test_the_hooks_of_a_device_map_change_nothing(name, step, plugins):
    outcomes = []
    for hooked in (False, True):
        model = tiny.model(name)
        if hooked:
            model = dispatch_model(model, by_layers(model), main_device="cpu", force_hooks=True)
            assert any(hasattr(module, "_hf_hook") for module in model.modules())
        windows = tiny.windows(6)
        cuts = pruned(step, Decoder.of(model, plugins.families), windows, plugins).cuts
        outcomes.append((cuts, dict(model.named_parameters()), model(windows.tokens).logits))
    (cuts, weights, logits), (other_cuts, other_weights, other_logits) = outcomes
    assert cuts == other_cuts
    assert all(torch.equal(weights[each], other_weights[each]) for each in weights)
    assert torch.equal(logits, other_logits)


def test_weights_that_are_not_in_memory_are_refused(llama, tmp_path):
    model = tiny.model("llama")
    cpu_offload(model, execution_device="cpu")
    with pytest.raises(SurgeryError, match=r"not in memory.*--offload"):
        Pruner.from_pretrained(model, tokenizer=tiny.tokenizer(), device="cpu").prune(
            Osscar(ratio=0.25), calibration=tiny.windows(2), save_dir=tmp_path / "out"
        )
    assert not any(tmp_path.iterdir())

"""A run that was killed goes on where it was, and ends as if nothing had happened."""

from __future__ import annotations

import gc
import hashlib
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
import weakref

import numpy as np
import pytest
import tiny
import torch
from torch.testing import assert_close

from optimum_prune import Cuts, Decision
from optimum_prune.errors import PassError
from optimum_prune.machine.locks import lock
from optimum_prune.run.journal import Journal

if sys.platform == "win32":
    pytest.skip("processes are killed as POSIX does", allow_module_level=True)

# Every run is a process of its own, forked from one that has imported what takes long.
FORKED = multiprocessing.get_context("forkserver")
SLOW = ["datasets", "pandas", "transformers.models.llama.modeling_llama", "transformers.models.auto.tokenization_auto"]
FORKED.set_forkserver_preload(["optimum_prune.cli.main", "optimum_prune.run.compress", *SLOW])

METHODS = {
    "osscar with heads": ["osscar", "--ratio", 0.25, "--head-ratio", 0.5],
    "osscar with correction": ["osscar", "--ratio", 0.25, "--correction", 0.5],
    "osscar global": ["osscar", "--params", 0.8, "--allocation", "global"],
    "depth": ["depth", "--layers", 2],
    "depth greedy": ["depth", "--layers", 2, "--shape", "greedy"],
    "depth by taylor": ["depth", "--layers", 1, "--criterion", "taylor", "--protect-first", 0],
    "block-pruner": ["block-pruner", "--blocks", 2],
    "sparsegpt": ["sparsegpt", "--pattern", "2:4"],
    "hidden": ["hidden", "--ratio", 0.25],
    "budget": ["budget", "--params", 0.8, "--multiple-of", 8],
    "bernoulli": ["bernoulli", "--ratio", 0.25, "--layers", 1, "--steps", 6],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def command(model, text_file, tmp_path):
    def command(method, *more, output=None):
        common = ["--model", model, "--text", text_file, "--samples", 6, "--length", 32, "--eval-samples", 2]
        output = output or tmp_path / "out"
        return ["prune", *METHODS.get(method, method), *common, "--device", "cpu", "--output", output, *more]

    return command


def run_command(arguments, errors, largest_file):
    """What a process of its own does."""
    torch.set_num_threads(1)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    from optimum_prune.cli.main import main

    with errors.open("w") as sys.stderr:
        code = main([str(argument) for argument in arguments])
    os._exit(code)


def start(arguments, folder, largest_file=None):
    process = FORKED.Process(target=run_command, args=(arguments, folder / "stderr", largest_file))
    process.start()
    return process


def run(arguments, folder, largest_file=None):
    """Exit code, and what was said on stderr."""
    process = start(arguments, folder, largest_file)
    process.join(60)
    return process.exitcode, (folder / "stderr").read_text()


def pieces(folder):
    """The pieces of the journal, by their names, with when each was written."""
    found = sorted((folder / "out.unfinished/journal").glob("0*.safetensors"))
    return {file.name: file.stat().st_mtime_ns for file in found}


def killed(arguments, folder, at, then=0.0):
    """Kills a run `then` seconds after its journal has this many pieces; whether it was killed before its end."""
    process = start(arguments, folder)
    while len(pieces(folder)) < at and process.is_alive():
        time.sleep(0.0005)
    time.sleep(then)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def outcome(folder):
    """What must not depend on whether a run was killed."""
    digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("*.safetensors")}
    report = json.loads((folder / "compression/report.json").read_text())
    cuts = json.loads((folder / "compression/cuts.json").read_text())
    return digests, cuts, [step["decisions"] for step in report["passes"]], report["perplexity"]["after"]


def names(folder):
    return sorted(entry.name for entry in folder.iterdir() if entry.name != "stderr")


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(method, command, tmp_path):
    assert run(command(method, output=tmp_path / "whole"), tmp_path) == (0, "")
    chance = random.Random(method)
    before = {}
    for _ in range(3):
        moment = len(before) + chance.randint(1, 3)
        if not killed(command(method), tmp_path, at=moment, then=chance.random() / 100):
            break
        after = pieces(tmp_path)
        assert before.items() <= after.items()  # nothing was done again
        before = after
    assert before
    if not (tmp_path / "out").exists():
        assert run(command(method, "--resume"), tmp_path) == (0, "")
    assert names(tmp_path) == ["out", "whole"]
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")


@pytest.fixture
def begun(command, tmp_path):
    """A command that was killed."""
    assert killed(command("osscar with heads"), tmp_path, at=5)
    return command


class TestAKilledRun:
    def test_goes_on_without_being_told_to(self, begun, tmp_path):
        before = pieces(tmp_path)
        assert killed(begun("osscar with heads"), tmp_path, at=len(before) + 1)
        assert before.items() < pieces(tmp_path).items()

    @pytest.mark.parametrize("damage", ["truncated", "changed", "empty", "missing", "half-written"])
    def test_does_not_mind_damage(self, damage, begun, tmp_path):
        journal = tmp_path / "out.unfinished/journal"
        third, last = sorted(journal.glob("0*"))[2], sorted(journal.glob("0*"))[-1]
        content = last.read_bytes()
        if damage == "truncated":
            last.write_bytes(content[: len(content) // 2])
        if damage == "changed":
            last.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        if damage == "empty":
            last.write_bytes(b"")
        if damage == "missing":
            third.unlink()
        if damage == "half-written":
            (journal / "partial").write_bytes(content[: len(content) // 2])
            (journal / "begun.json.partial").write_text('{"ident')
        code, said = run(begun("osscar with heads", "--resume"), tmp_path)
        assert (code, len(said.splitlines())) == (0, damage != "half-written")
        assert damage == "half-written" or "is damaged, so what followed on it is computed again" in said
        assert run(begun("osscar with heads", output=tmp_path / "whole"), tmp_path) == (0, "")
        assert names(tmp_path) == ["out", "whole"]
        assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")

    def test_is_begun_anew_if_nothing_tells_what_it_was(self, begun, tmp_path):
        (tmp_path / "out.unfinished/journal/begun.json").write_text("{}")
        code, said = run(begun("osscar with heads", "--resume"), tmp_path)
        folder = tmp_path / "out.unfinished"
        assert (code, said) == (
            0,
            f"Beginning anew instead of going on from {folder}: what is there cannot be used.\n",
        )
        assert names(tmp_path) == ["out"]

    @pytest.mark.parametrize(
        ("more", "changed"),
        [
            (["--damping", 0.5], "the options of its passes"),
            (["--seed", 1], "the calibration, dtype, device or seed"),
            (["--samples", 5], "the calibration"),
            (["--dtype", "bfloat16"], "dtype, device or seed"),
        ],
    )
    def test_is_not_resumed_with_other_options(self, more, changed, begun, tmp_path):
        before = pieces(tmp_path)
        code, error = run(begun("osscar with heads", "--resume", *more), tmp_path)
        assert code == 1
        assert f"is of another run: {changed}" in error
        assert "changed. Run with what it was begun with" in error
        assert pieces(tmp_path) == before  # and is still there

    def test_is_not_resumed_with_another_text(self, begun, other_text_file, tmp_path):
        code, error = run(begun("osscar with heads", "--resume", "--text", other_text_file), tmp_path)
        assert (code, "the calibration, the evaluation changed" in error) == (1, True)

    def test_is_not_resumed_with_another_model_nor_lost(self, begun, model, tmp_path):
        before, weights, aside = pieces(tmp_path), model / "model.safetensors", tmp_path / "aside"
        about = weights.stat()
        os.utime(weights, ns=(about.st_atime_ns, about.st_mtime_ns + 10**9))
        code, error = run(begun("osscar with heads", "--resume"), tmp_path)
        assert (code, "the model changed" in error) == (1, True)
        os.utime(weights, ns=(about.st_atime_ns, about.st_mtime_ns))
        shutil.move(weights, aside)
        try:
            for more in ((), ("--resume",)):
                code, error = run(begun("osscar with heads", *more), tmp_path)
                assert (code, len(error.splitlines())) == (1, 1)
            weights.write_bytes(aside.read_bytes()[:-100])
            code, error = run(begun("osscar with heads"), tmp_path)
            assert (code, len(error.splitlines())) == (1, 1)
        finally:
            shutil.move(aside, weights)
        assert pieces(tmp_path) == before
        assert run(begun("osscar with heads", "--resume"), tmp_path) == (0, "")

    def test_is_not_taken_from_a_process_that_is_at_work(self, begun, tmp_path):
        before = pieces(tmp_path)
        with lock(tmp_path / ".out.lock", "held"):
            code, error = run(begun("osscar with heads"), tmp_path)
        assert code == 1
        assert re.search(rf"process {os.getpid()} on .* is at work there", error)
        assert pieces(tmp_path) == before


def test_what_was_done_before_a_disk_was_full_is_not_lost(command, tmp_path):
    code, error = run(command("osscar with heads"), tmp_path, largest_file=50_000)  # less than the checkpoint
    assert code == 1
    assert "cannot be written" in error
    assert f"kept in {tmp_path / 'out.unfinished'}; the same command goes on from there." in error
    assert len(error.splitlines()) == 1
    assert run(command("osscar with heads", "--resume"), tmp_path) == (0, "")
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("where", ["--no-offload", "--offload"])
def test_a_disk_that_is_full_at_once_is_an_error(where, command, tmp_path):
    # less than a piece of the journal, or than activations that go to disk
    code, error = run(command("osscar with heads", where), tmp_path, largest_file=3000)
    assert (code, "cannot be written" in error) == (1, True)
    assert len(error.splitlines()) == 1


def test_an_interrupt_says_how_to_go_on(command, tmp_path):
    process = start(command("depth greedy"), tmp_path)
    while len(pieces(tmp_path)) < 3:
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    assert (
        f"interrupted; What was done so far is kept in {tmp_path / 'out.unfinished'}"
        in (tmp_path / "stderr").read_text()
    )
    assert run(command("depth greedy", "--resume"), tmp_path) == (0, "")


class TestTheJournal:
    def decisions(self, count, made):
        for number in range(count):
            made.append(number)
            yield Decision(
                Cuts.along("heads", {number: (0, 2)}),
                {"weight": torch.full((2, 3), number, dtype=torch.bfloat16)},
                {"number": number, "nothing": None, "infinite": torch.inf},
            )

    def test_recalls_a_pass_that_is_done_without_deciding_again(self, tmp_path):
        made = []
        for _run in range(2):
            journal = Journal(tmp_path, tmp_path)
            for _ in range(2):  # two passes of one name
                found = list(journal.decisions("one", lambda: self.decisions(3, made)))
                assert [decision.cuts for decision in found] == [
                    Cuts.along("heads", {number: (0, 2)}) for number in range(3)
                ]
                assert [dict(decision.evidence) for decision in found][1] == {
                    "number": 1,
                    "nothing": None,
                    "infinite": torch.inf,
                }
                for number, decision in enumerate(found):
                    assert_close(decision.weights["weight"], torch.full((2, 3), number, dtype=torch.bfloat16))
        assert made == [0, 1, 2, 0, 1, 2]

    def test_keeps_a_decision_that_the_pass_kept_itself_once(self, tmp_path):
        journal = Journal(tmp_path, tmp_path)

        def decide():
            yield journal.once("first", lambda: Decision(evidence={"n": 1}))
            yield Decision(evidence={"n": 2})

        assert len(list(journal.decisions("one", decide))) == 2
        assert len(journal) == 3  # and that the pass is done

    def test_holds_nothing_of_what_a_pass_came_to(self, tmp_path):
        """It may be all weights of a model."""
        journal, weights = Journal(tmp_path, tmp_path), [torch.ones(2), torch.ones(2)]
        left = [weakref.ref(weight) for weight in weights]
        journal.result("one", lambda: {"weights": {"weight": weights.pop()}})
        for _ in journal.decisions("two", lambda: [Decision(weights={"weight": weights.pop()})]):
            pass
        del _
        gc.collect()
        assert [each() for each in left] == [None, None]

    def test_tells_pieces_of_one_name_apart_by_their_order(self, tmp_path):
        for _ in range(2):
            journal = Journal(tmp_path, tmp_path)
            assert [journal.once("one", lambda value=value: [value, torch.ones(2)])[0] for value in "ab"] == ["a", "b"]
        assert len(journal) == 2

    def test_refuses_what_is_no_data(self, tmp_path):
        with pytest.raises(PassError, match="cannot be kept: a object is neither plain data"):
            Journal(tmp_path, tmp_path).once("one", object)

    def test_takes_numbers_of_numpy(self, tmp_path):
        for _ in range(2):
            decision = Decision(evidence={"number": np.int64(3), "list": np.ones(2)})
            (found,) = Journal(tmp_path, tmp_path).decisions("one", lambda decision=decision: [decision])
            assert {name: np.asarray(value).tolist() for name, value in found.evidence.items()} == {
                "number": 3,
                "list": [1, 1],
            }

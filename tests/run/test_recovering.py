"""A pass that recovers runs where the stages promise: behind pruning, with its teacher at hand, resumed, planned and reported."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from folder_passes import Archive, Halve
from nudge import Nudge, Shrink
from safetensors import safe_open

from optimum_prune import Depth, Osscar, Pruner, Recipe, Settings, Stage, Text, compress, hookimpl, load_model, testing
from optimum_prune.anatomy.decoder import Decoder
from optimum_prune.checkpoint import loading
from optimum_prune.errors import NumericalError, PassError, RecipeError, SurgeryError
from optimum_prune.plan.forecast import forecast
from optimum_prune.report.report import Report
from optimum_prune.run.models import sharing_copy

OSSCAR, DEPTH = Osscar(ratio=0.25), Depth(drop=(2,))


@pytest.fixture
def recipe(llama, text_file):
    def recipe(*passes, model=llama, **settings):
        return Recipe(
            passes=passes,
            calibration=Text(text=str(text_file), samples=4, length=24),
            evaluation=Text(samples=2),
            settings=Settings(model=str(model), device="cpu", **settings),
        )

    return recipe


def digests(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("*.safetensors")}


class Heard:
    def __init__(self):
        self.events = []

    @hookimpl
    def before_pass(self, step, model):
        self.events.append((step.name, None if model is None else len(model.model.layers)))

    @hookimpl
    def pass_finished(self, outcome):
        self.events.append((outcome.name, outcome.stage))


def test_it_runs_between_pruning_and_what_goes_from_folder_to_folder(recipe, tmp_path):
    heard = Heard()
    report = compress(recipe(OSSCAR, DEPTH, Nudge(), Halve(), Archive()), tmp_path / "out", hooks=[heard])
    assert heard.events[4:6] == [("nudge", tiny.LAYERS - 1), ("nudge", Stage.RECOVER)]
    assert [step.stage for step in report.passes] == [*[Stage.PRUNE] * 2, Stage.RECOVER, Stage.QUANTIZE, Stage.EXPORT]
    (evidence,) = report.passes[2].evidence
    assert evidence["teacher_layers"] == tiny.LAYERS
    assert evidence["distances"] == sorted(evidence["distances"], reverse=True)
    assert report.passes[2].seconds > 0
    assert report.passes[2].options["steps"] == 4
    assert Report.read(tmp_path / "out").passes[2].evidence == report.passes[2].evidence
    assert report.verified.max_logit_difference == 0
    assert load_model(tmp_path / "out").dtype == torch.bfloat16


def test_it_changes_the_weights_that_are_saved_and_nothing_else(recipe, tmp_path):
    compress(recipe(DEPTH), tmp_path / "pruned")
    compress(recipe(DEPTH, Nudge()), tmp_path / "nudged")
    pruned, nudged = (load_model(tmp_path / name) for name in ("pruned", "nudged"))
    assert (tmp_path / "nudged/config.json").read_text() == (tmp_path / "pruned/config.json").read_text()
    for (name, before), after in zip(pruned.named_parameters(), nudged.parameters(), strict=True):
        assert torch.equal(before, after) == ("norm" not in name), name


def test_it_runs_without_any_pruning(recipe, tmp_path):
    report = compress(recipe(Nudge()), tmp_path / "out")
    assert report.parameters.before == report.parameters.after
    (evidence,) = report.passes[0].evidence
    assert evidence["distances"][0] == 0  # it is its own teacher


def test_it_comes_behind_pruning_and_before_the_rest(recipe):
    with pytest.raises(RecipeError, match=r"'osscar' \(PRUNE\) comes after 'nudge' \(RECOVER\)"):
        recipe(Nudge(), OSSCAR)
    with pytest.raises(RecipeError, match=r"'nudge' \(RECOVER\) comes after 'halve' \(QUANTIZE\)"):
        recipe(Halve(), Nudge())


def test_it_is_planned(recipe, plugins):
    found = forecast(recipe(OSSCAR, DEPTH, Nudge()), plugins)
    (phase,) = [phase for phase in found.phases if phase.name == "nudge"]
    assert (phase.stage, len(phase.shape.layers), phase.bound) == ("RECOVER", tiny.LAYERS - 1, "")
    assert phase.seconds > 0
    rows = {row[0]: row for row in found.rows()}
    assert rows["nudge"][1:5] == ("RECOVER", str(tiny.LAYERS - 1), "2", "48")


class TestTheTeacher:
    @pytest.fixture
    def loads(self, monkeypatch):
        """How often weights were loaded, and whether they stayed on disk."""
        found, load = [], loading.load

        def counted(*arguments):
            found.append(arguments[-1] is not None)
            return load(*arguments)

        monkeypatch.setattr("optimum_prune.checkpoint.loading.load", counted)
        return found

    def test_is_opened_only_if_a_pass_needs_it_and_mapped_if_it_can_be(self, recipe, loads, tmp_path):
        compress(recipe(DEPTH, Shrink()), tmp_path / "alone")
        assert loads == [False]
        compress(recipe(DEPTH, Nudge(), Nudge()), tmp_path / "taught")
        assert loads == [False, False, True]

    def test_is_the_model_itself_for_a_pass_that_needs_none(self, recipe, tmp_path):
        report = compress(recipe(DEPTH, Shrink()), tmp_path / "out")
        assert report.passes[1].evidence[0]["teacher_layers"] == tiny.LAYERS - 1

    def test_of_what_cannot_be_mapped_is_kept_and_not_read_again(self, recipe, loads, tmp_path):
        tiny.save("llama", tmp_path / "model")
        model = load_model(tmp_path / "model")
        (tmp_path / "model/model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "model/pytorch_model.bin")
        compress(recipe(OSSCAR, Nudge(), model=tmp_path / "model"), tmp_path / "out")
        assert loads == [False]

    @pytest.mark.parametrize("family", ["llama", "llama-tied"])
    def test_of_a_model_in_memory_is_as_it_was_and_takes_no_memory(self, family, tmp_path):
        windows, model = tiny.windows(4), tiny.model(family)
        dense = testing.logits(model, windows)
        copy = sharing_copy(model)
        assert all(
            mine.data_ptr() == its.data_ptr() for mine, its in zip(model.parameters(), copy.parameters(), strict=True)
        )
        passes = OSSCAR, DEPTH, Nudge(embeddings=True), Shrink(), Nudge()
        Pruner.from_pretrained(model).prune(*passes, calibration=windows, save_dir=tmp_path / "out")
        assert torch.equal(testing.logits(copy, windows), dense)
        saved = load_model(tmp_path / "out")
        assert torch.equal(testing.logits(saved, windows), testing.logits(model, windows))
        tiny.save(family, tmp_path / "model")
        pruner = Pruner.from_pretrained(tmp_path / "model", device="cpu")
        pruner.prune(*passes, calibration=windows, save_dir=tmp_path / "from folder")
        assert digests(tmp_path / "from folder") == digests(tmp_path / "out")


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma2"])
def test_with_weights_on_disk_it_makes_the_same_model(family, recipe, checkpoints, tmp_path):
    passes = OSSCAR, Nudge(embeddings=True), Shrink()
    for offload in (False, True):
        compress(recipe(*passes, model=checkpoints(family), offload=offload), tmp_path / str(offload))
    assert digests(tmp_path / "True") == digests(tmp_path / "False")


def test_weights_that_are_tied_stay_so(recipe, checkpoints, tmp_path):
    compress(recipe(OSSCAR, Nudge(embeddings=True), model=checkpoints("llama-tied")), tmp_path / "out")
    testing.stays_tied(load_model(tmp_path / "out"), tmp_path / "out")


def test_training_mode_and_gradients_are_put_back(tmp_path):
    model = tiny.model("llama")
    model.model.norm.weight.requires_grad_(False)
    Pruner.from_pretrained(model).prune(DEPTH, Nudge(), calibration=tiny.windows(4), save_dir=tmp_path / "out")
    assert not model.training
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert parameter.requires_grad == (name != "model.norm.weight")


@pytest.mark.parametrize(
    ("harm", "error", "message"),
    [
        (
            "shape",
            SurgeryError,
            r"'model.norm.weight' was torch.float32 \(32,\) before it and is torch.float32 \(31,\) now",
        ),
        ("dtype", SurgeryError, r"'model.norm.weight' was torch.float32 \(32,\) before it and is torch.bfloat16"),
        ("untie", SurgeryError, r"'lm_head.weight' was not there before it"),
        ("nan", NumericalError, r"'nudge' gave 'model.norm.weight' values that are not finite"),
        ("evidence", PassError, r"'nudge' gives as evidence, at 'no', a object"),
    ],
)
@pytest.mark.parametrize("offload", [False, True])
def test_what_it_must_not_do_is_refused(harm, error, message, offload, recipe, checkpoints, tmp_path):
    with pytest.raises(error, match=message) as caught:
        compress(recipe(DEPTH, Nudge(harm=harm), model=checkpoints("llama-tied"), offload=offload), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [each.name for each in tmp_path.iterdir()] == ["out.unfinished"]  # with what the pass before it did


# A run that is killed

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["optimum_prune.run.compress", "datasets", "pandas"])


def run_in_a_process(recipe, output):
    torch.set_num_threads(1)
    compress(recipe, output)


def pieces(folder):
    """The pieces of the journal: what each is, and when it was written."""
    found = {}
    for file in sorted((folder / "out.unfinished/journal").glob("0*.safetensors")):
        with safe_open(file, "pt") as opened:
            found[opened.metadata()["what"]] = file.stat().st_mtime_ns
    return found


def killed(recipe, folder, at):
    """Kills a run when its journal has a piece; what the journal has then."""
    process = FORKED.Process(target=run_in_a_process, args=(recipe, folder / "out"))
    process.start()
    while at not in pieces(folder):
        assert process.is_alive()
        time.sleep(0.0005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    return pieces(folder)


@pytest.mark.skipif(sys.platform == "win32", reason="processes are killed as POSIX does")
@pytest.mark.parametrize(
    ("at", "again", "offload"),
    [
        ("2 nudge: gradient (2)", 2, False),  # inside
        ("2 nudge: done", 1, False),  # when it has just been kept
        ("3 nudge: gradient (1)", 1, True),  # in the pass behind it, which begins from what it left
    ],
)
def test_a_run_that_is_killed_goes_on_and_ends_as_one_that_is_not(at, again, offload, recipe, tmp_path):
    log = tmp_path / "log"
    steps = OSSCAR, Nudge(log=str(log)), Nudge(rate=0.01)
    asked = recipe(*steps, offload=offload)
    before = killed(asked, tmp_path, at)
    later = killed(asked, tmp_path, "3 nudge: gradient (4)")
    assert before.items() <= later.items()  # nothing was computed again
    report = compress(asked, tmp_path / "out", resume=True)
    assert log.read_text().count("nudge") == again
    whole = compress(asked, tmp_path / "whole")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert [step.evidence for step in report.passes] == [step.evidence for step in whole.passes]
    assert report.perplexity.after.value == whole.perplexity.after.value


@pytest.mark.skipif(sys.platform == "win32", reason="processes are killed as POSIX does")
def test_only_the_weights_that_changed_are_kept(recipe, tmp_path):
    killed(recipe(OSSCAR, Nudge(), Nudge()), tmp_path, "2 nudge: done")
    for file in (tmp_path / "out.unfinished/journal").glob("0*.safetensors"):
        with safe_open(file, "pt") as opened:
            if opened.metadata()["what"] == "2 nudge: done":
                kept = json.loads(opened.metadata()["value"])["weights"]
    names = {name for name, _ in tiny.model("llama").named_parameters() if "norm" in name}
    assert kept.keys() == names


def test_several_processes_come_to_the_same(tmp_path, plugins):
    script = tmp_path / "recover.py"
    script.write_text(
        "import sys, tiny, torch\n"
        "from nudge import Nudge, Shrink\n"
        "from safetensors.torch import save_file\n"
        "from optimum_prune.anatomy.decoder import Decoder\n"
        "from optimum_prune.calibration.calibration import Calibration\n"
        "from optimum_prune.hooks.plugins import load\n"
        "from optimum_prune.machine import processes\n"
        "from optimum_prune.plan.source import ModelSource\n"
        "from optimum_prune.run.models import Models\n"
        "from optimum_prune.run.recovering import recover\n"
        "from pathlib import Path\n"
        "torch.set_num_threads(1)\n"
        "plugins, model, folder = load(), tiny.model('llama'), Path(sys.argv[1])\n"
        "with processes.started():\n"
        "    decoder = Decoder.of(model, plugins.families)\n"
        "    source = ModelSource.of_model(model, None)\n"
        "    models = Models(source, decoder.family, folder / f'aside-{processes.rank()}', teaches=True)\n"
        "    models.load()\n"
        "    calibration = Calibration(tiny.windows(4))\n"
        "    with torch.no_grad():\n"
        "        model.model.layers[1].mlp.down_proj.weight.data = model.model.layers[1].mlp.down_proj.weight * 0.9\n"
        "    recover(Nudge(), decoder, calibration, plugins, models)\n"
        "    save_file({n: v.contiguous() for n, v in model.named_parameters()}, folder / f'{processes.rank()}.safetensors')\n"
        "    torch.manual_seed(processes.rank())\n"
        "    class Different(Shrink):\n"
        "        def recover(self, recovery):\n"
        "            recovery.decoder.model.model.norm.weight.data.add_(torch.rand(32))\n"
        "            return {}\n"
        "    try:\n"
        "        recover(Different(), decoder, calibration, plugins, models)\n"
        "    except processes.ProcessError as error:\n"
        "        print(error)\n"
    )
    tests = Path(__file__).parent.parent
    path = os.pathsep.join(map(str, [tests.parent, tests, tests / "run"]))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        script,
        tmp_path,
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("different decisions") == 2
    assert digests(tmp_path)["0.safetensors"] == digests(tmp_path)["1.safetensors"]


def test_a_decoder_is_found_of_a_copy_that_shares(plugins):
    model = tiny.model("qwen3_moe")
    assert Decoder.of(sharing_copy(model), plugins.families).shape() == Decoder.of(model, plugins.families).shape()


class TestAPassThatFails:
    """Behind others that are done, which are not done again once it is mended."""

    def wanted(self, recipe, tmp_path, **last):
        first = Nudge(log=str(tmp_path / "log"), rate=0.01)
        return recipe(DEPTH, first, Nudge(**last))

    def test_leaves_what_was_done_and_is_mended(self, recipe, tmp_path):
        with pytest.raises(
            SurgeryError, match=r"kept in .*out.unfinished; the same command, with the rest of the recipe mended"
        ):
            compress(self.wanted(recipe, tmp_path, harm="shape"), tmp_path / "out")
        compress(self.wanted(recipe, tmp_path, steps=2), tmp_path / "out", resume=True)
        assert (tmp_path / "log").read_text() == "nudge\n"
        compress(self.wanted(recipe, tmp_path, steps=2), tmp_path / "whole")
        assert digests(tmp_path / "out") == digests(tmp_path / "whole")
        assert sorted(each.name for each in tmp_path.iterdir()) == ["log", "out", "whole"]

    def test_that_is_the_first_leaves_nothing(self, recipe, tmp_path):
        with pytest.raises(SurgeryError, match=r"Please report it\.$"):
            compress(recipe(Nudge(harm="shape")), tmp_path / "out")
        assert not list(tmp_path.iterdir())

    def test_is_of_no_use_where_an_earlier_one_changed(self, recipe, tmp_path):
        with pytest.raises(SurgeryError):
            compress(self.wanted(recipe, tmp_path, harm="shape"), tmp_path / "out")
        other = recipe(Depth(drop=(1,)), *self.wanted(recipe, tmp_path).passes[1:])
        with pytest.raises(RecipeError, match="the options of its passes changed"):
            compress(other, tmp_path / "out", resume=True)
        compress(other, tmp_path / "out")
        compress(other, tmp_path / "whole")
        assert digests(tmp_path / "out") == digests(tmp_path / "whole")

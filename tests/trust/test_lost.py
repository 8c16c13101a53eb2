"""Nothing is lost: neither a finished run to its last lines, nor a person's files, nor a run to somebody else's mistake."""

from __future__ import annotations

import json
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from folder_passes import Archive, Halve

from optimum_prune import Depth, Osscar, Source, Text, compress, hookimpl, load_model
from optimum_prune.errors import CheckpointError, OptimumPruneError, OutputError, PluginError, RecipeError, VetoError
from optimum_prune.machine.progress import Progress
from optimum_prune.run.hidden import MARK, MARKED

DROP = Depth(drop=(1,))


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def one_line(caught):
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Hook:
    """Calls what it is given before a pass, or after."""

    def __init__(self, before=None, after=None):
        self.before, self.after = before or {}, after or {}

    @hookimpl
    def before_pass(self, step, model):
        self.before.get(step.name, lambda: None)()

    @hookimpl
    def pass_finished(self, outcome):
        self.after.get(outcome.name, lambda: None)()


def raiser(error):
    def fail():
        raise error

    return fail


# Names of outputs


@pytest.mark.parametrize(
    ("name", "why"),
    [("a\udcffb", "is no UTF-8"), ("a\0b", "holds a NUL character"), ("a\nb", "breaks the line")],
)
def test_a_name_that_no_output_can_have_is_refused_before_anything_runs(name, why, recipe, tmp_path):
    with pytest.raises(OutputError, match=why) as caught:
        compress(recipe(model="no/where"), tmp_path / name)
    assert one_line(caught).isprintable()
    assert names(tmp_path) == []


def test_a_home_folder_that_nobody_has_is_a_name(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    compress(recipe(), "~nobody_of_this_name")
    assert names(tmp_path) == ["~nobody_of_this_name"]


def test_an_interpreter_that_is_none_is_refused_before_the_model_is_opened(recipe, tmp_path):
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho nonsense\n")
    fake.chmod(0o755)
    with pytest.raises(RecipeError, match="does not answer as a Python does"):
        compress(recipe(Archive(python=str(fake)), model="no/where"), tmp_path / "out")


# Weights that change under a run


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("harm", ["truncate", "overwrite", "replace"])
def test_weights_that_change_while_they_are_read_are_named(harm, offload, recipe, llama, tmp_path):
    model = shutil.copytree(llama, tmp_path / "model")
    file = model / "model.safetensors"

    def change():
        if harm == "replace":
            shutil.copy(file, tmp_path / "aside")
            (tmp_path / "aside").replace(file)
        elif harm == "truncate":
            os.truncate(file, 5000)
        else:
            file.write_bytes(file.read_bytes()[:-4] + b"abcd")

    recipe = recipe(Osscar(ratio=0.25), model=model, offload=offload)
    with pytest.raises(CheckpointError, match=r"changed while (it was|they were) read") as caught:
        compress(recipe, tmp_path / "out", hooks=[Hook({"osscar": change})])
    assert str(file if offload else model) in one_line(caught)
    assert "out" not in names(tmp_path)


class Removing:
    """Takes a model's folder away when a text is read."""

    def __init__(self, model):
        self.model = model

    @hookimpl
    def calibration_sources(self):
        yield Source("removing", self.read, suffixes=(".removing",))

    def read(self, text):
        shutil.rmtree(self.model)
        yield Path(text.text).read_text()


@pytest.mark.parametrize("offload", [False, True])
def test_a_model_that_is_removed_before_it_is_loaded_is_gone(offload, recipe, llama, text_file, tmp_path, monkeypatch):
    """And no model of the Hub is taken for it, whatever its name."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(llama, tmp_path / "some" / "model")
    text = shutil.copy(text_file, tmp_path / "text.removing")
    given = replace(recipe(model="some/model", offload=offload), calibration=Text(text=text, samples=2, length=16))
    with pytest.raises(CheckpointError, match=r"^The model's folder some/model is gone: it was there when") as caught:
        compress(given, tmp_path / "out", hooks=[Removing(tmp_path / "some" / "model")])
    one_line(caught)
    assert names(tmp_path) == ["some", "text.removing"]


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("what", ["folder", "file"])
def test_a_model_that_is_removed_while_it_is_read_is_gone(what, offload, recipe, llama, tmp_path):
    model = shutil.copytree(llama, tmp_path / "model")

    def remove():
        (model / "model.safetensors").unlink()
        if what == "folder":
            shutil.rmtree(model)

    named = f"model's folder {model}" if what == "folder" else f"weights file {model / 'model.safetensors'}"
    with pytest.raises(CheckpointError, match=f"^The {named} was removed while it was read") as caught:
        compress(recipe(model=model, offload=offload), tmp_path / "out", hooks=[Hook({"depth": remove})])
    one_line(caught)
    assert "out" not in names(tmp_path)


@pytest.mark.parametrize("name", ["/nowhere/model", "./nowhere", "no/where/model"])
def test_a_folder_that_is_not_there_is_no_wrong_name_of_the_hub(name):
    with pytest.raises(CheckpointError, match="there is no folder of that name") as caught:
        load_model(name)
    assert name in one_line(caught)


# The last lines of a run


@pytest.mark.parametrize(
    ("file", "passes"), [("report.json", (DROP,)), ("cuts.json", (DROP, Halve()))], ids=["pruned", "converted"]
)
def test_a_model_is_whole_though_its_report_cannot_be_written(file, passes, recipe, tmp_path, monkeypatch):
    write = Path.write_text

    def fail(path, *arguments, **options):
        if path.name == file:
            raise OSError(28, "No space left on device")
        return write(path, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(
        OutputError, match=r"report of this run cannot be written: .*No space left.* whole .*lies in "
    ) as caught:
        compress(recipe(*passes), tmp_path / "out")
    assert str(tmp_path / "out.finished") in one_line(caught)
    assert names(tmp_path) == ["out.finished"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(names(tmp_path / "out.finished"))


# Hooks


def test_a_veto_ends_a_run_with_what_it_says(recipe, tmp_path):
    with pytest.raises(VetoError, match=r"^Not on a Friday\. What was done so far is kept in"):
        compress(recipe(), tmp_path / "out", hooks=[Hook({"depth": raiser(VetoError("Not on a Friday."))})])
    assert names(tmp_path) == ["out.unfinished"]


class MyError(OptimumPruneError):
    def __init__(self, number, *, text):
        super().__init__(f"{text} {number}")


def test_a_veto_before_a_later_pass_keeps_what_is_done(recipe, tmp_path):
    steps, error = (DROP, Archive()), MyError(3, text="No.")
    with pytest.raises(OptimumPruneError, match=r"^No\. 3 The checkpoint after depth is kept in .*out\.unfinished"):
        compress(recipe(*steps), tmp_path / "out", hooks=[Hook({"archive": raiser(error)})])
    assert names(tmp_path) == ["out.unfinished"]
    compress(recipe(*steps), tmp_path / "out")
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("when", "error"),
    [
        ("before", ConnectionError("no network")),
        ("before", OSError(28, "full")),
        ("before", GeneratorExit()),
        ("after", SystemExit(0)),
        ("after", MemoryError()),
    ],
    ids=repr,
)
def test_a_hook_that_fails_loses_no_run(when, error, recipe, tmp_path, capsys):
    compress(recipe(), tmp_path / "out", hooks=[Hook(**{when: {"depth": raiser(error)}})])
    out, said = capsys.readouterr()
    assert out == ""
    hook = {"before": "before_pass", "after": "pass_finished"}[when]
    (line,) = [line for line in said.splitlines() if "hook" in line]
    assert line.startswith(f"The hook '{hook}' of Hook given as hook 1 ")
    assert line.endswith("The run goes on without it.")
    assert names(tmp_path) == ["out"]


def test_when_a_pass_is_finished_it_is_too_late_for_a_veto(recipe, tmp_path, capsys):
    heard = []
    failing = Hook(after={"archive": raiser(VetoError("Too bad."))})
    compress(
        recipe(DROP, Archive()), tmp_path / "out", hooks=[Hook(after={"archive": lambda: heard.append(1)}), failing]
    )
    assert "'pass_finished' of Hook given as hook 2 failed: Too bad. The run goes on" in capsys.readouterr().err
    assert heard == [1]


class Shy(Exception):
    def __str__(self):
        raise ValueError("not telling")


def test_an_error_that_cannot_be_shown_loses_no_run(recipe, tmp_path, capsys):
    compress(recipe(), tmp_path / "out", hooks=[Hook({"depth": raiser(Shy())})])
    assert "failed: Shy" in capsys.readouterr().err
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("change", ["in place", "to what is no number", "another", "a layer less"])
def test_a_hook_that_changes_the_model_is_noticed(change, offload, recipe, tmp_path):
    class Meddling:
        @hookimpl
        def before_pass(self, step, model):
            if change == "in place":
                model.lm_head.weight.data.zero_()
            elif change == "to what is no number":
                model.model.layers[3].mlp.up_proj.weight.data.fill_(float("nan"))
            elif change == "another":
                model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
            else:
                del model.model.layers[5]

    with pytest.raises(PluginError, match="A hook changed the weight") as caught:
        compress(recipe(offload=offload), tmp_path / "out", hooks=[Meddling()])
    one_line(caught)
    assert names(tmp_path) == []


def test_a_hook_leaves_the_model_in_evaluation_mode(recipe, tmp_path):
    modes = []

    class Training:
        @hookimpl
        def before_pass(self, step, model):
            modes.append(model.training)
            model.train()

    compress(recipe(DROP, Depth(drop=(2,))), tmp_path / "out", hooks=[Training()])
    assert modes == [False, False]


def test_a_hook_changes_nothing_of_the_process(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def change():
        print("noise")
        os.chdir("/")
        os.environ["LOUD"] = "1"

    compress(recipe(), "out", hooks=[Hook({"depth": change}, {"depth": change})])
    assert capsys.readouterr().out == ""
    assert (Path.cwd(), "LOUD" in os.environ) == (tmp_path, False)
    assert names(tmp_path) == ["out"]


# What is unfinished


@pytest.fixture
def unfinished(recipe, tmp_path):
    """The folder that a run left which ended before its last pass."""
    with pytest.raises(VetoError):
        compress(recipe(DROP, Archive()), tmp_path / "out", hooks=[Hook({"archive": raiser(VetoError("No."))})])
    return tmp_path / "out.unfinished"


def said_by(recipe, output, capsys):
    compress(recipe, output, progress=Progress(output=True))
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "harm",
    [
        lambda state: {**state, "facts": {"passes": [3]}},
        lambda state: {**state, "facts": {}},
        lambda state: {**state, "checkpoint": "../elsewhere"},
        lambda state: {**state, "checkpoint": "2-other"},
        lambda state: {**state, "files": "0"},
        lambda state: {**state, "passes": "no"},
        lambda state: [state],
    ],
)
def test_a_state_of_any_content_is_not_used_and_that_is_said(harm, unfinished, recipe, tmp_path, capsys):
    state = json.loads((unfinished / "state.json").read_text())
    (unfinished / "state.json").write_text(json.dumps(harm(state)))
    said = said_by(recipe(DROP, Archive()), tmp_path / "out", capsys)
    assert said.count(f"Beginning anew instead of going on from {unfinished}: ") == 1
    assert names(tmp_path) == ["out"]


def test_a_kept_checkpoint_that_was_changed_is_not_used(unfinished, recipe, tmp_path, capsys):
    os.truncate(unfinished / "1-model" / "model.safetensors", 1000)
    said = said_by(recipe(DROP, Archive()), tmp_path / "out", capsys)
    assert "Beginning anew" in said
    assert names(tmp_path) == ["out"]


def test_a_run_that_another_left_unfinished_says_so(unfinished, recipe, tmp_path, capsys):
    said = said_by(recipe(Depth(drop=(2,)), Archive()), tmp_path / "out", capsys)
    assert f"Beginning anew instead of going on from {unfinished}: the options of its passes changed.\n" in said


@pytest.mark.parametrize(
    "harm",
    [
        lambda folder: os.mkfifo(folder / "state.json"),
        lambda folder: (folder / "state.json").mkdir(),
        lambda folder: (folder / "2024-holiday").mkdir(),
        lambda folder: (folder / "notes.txt").write_text("precious"),
        lambda folder: (folder / "journal").write_text("precious"),
        lambda folder: [(folder / "journal").mkdir(), (folder / "journal" / "notes.txt").write_text("precious")],
        lambda folder: [(folder / "journal").mkdir(), os.mkfifo(folder / "journal" / "begun.json")],
        lambda folder: [(folder / "journal").mkdir(), os.mkfifo(folder / "journal" / "000000-00.safetensors")],
        lambda folder: [(folder / "journal").mkdir(), (folder / "journal" / "begun.json").symlink_to("/etc/passwd")],
    ],
)
def test_what_no_run_leaves_there_is_left_alone(harm, recipe, tmp_path):
    folder = tmp_path / "out.unfinished"
    folder.mkdir()
    harm(folder)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError, match="left alone") as caught:
        compress(recipe(), tmp_path / "out")
    one_line(caught)
    assert sorted(tmp_path.rglob("*")) == before


class KilledError(BaseException):
    """As a kill, nobody catches it."""


@pytest.fixture
def killed(recipe, tmp_path, monkeypatch):
    """Carries out passes until the output gets its place, and no further."""

    def run(*passes, just_before=False):
        rename = Path.rename

        def killed_at_the_last(path, target):
            if Path(target) != tmp_path / "out":
                return rename(path, target)
            if not just_before:
                rename(path, target)
            raise KilledError

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", killed_at_the_last)
            with pytest.raises(KilledError):
                compress(recipe(*passes), tmp_path / "out")
        (tmp_path / ".out.lock").touch()

    return run


@pytest.mark.parametrize("passes", [(DROP,), (DROP, Archive())], ids=["pruned", "converted"])
def test_what_a_finished_run_kept_is_removed_by_the_next_though_its_output_is_there(passes, recipe, killed, tmp_path):
    killed(*passes)
    assert names(tmp_path) == [".out.lock", "out", "out.unfinished"]
    with pytest.raises(OutputError, match="exists already"):
        compress(recipe(*passes), tmp_path / "out")
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("same", [True, False])
def test_what_a_finished_run_kept_is_nothing_to_go_on_from(same, recipe, killed, tmp_path, capsys):
    killed(DROP)
    progress = Progress(output=True)
    compress(recipe(DROP if same else Depth(drop=(2,))), tmp_path / "out", overwrite=True, progress=progress)
    folder = tmp_path / "out.unfinished"
    said = f"Removed {folder}, which a run that finished {tmp_path / 'out'} and was killed then had left.\n"
    assert said in capsys.readouterr().err
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("what", ["another output", "no output"])
def test_what_is_kept_of_another_run_than_that_of_the_output_stays(what, recipe, killed, tmp_path):
    killed(DROP, just_before=True)
    if what == "another output":
        tiny.save("llama", tmp_path / "out")
        with pytest.raises(OutputError, match="exists already"):
            compress(recipe(DROP), tmp_path / "out")
        assert names(tmp_path) == ["out", "out.unfinished"]
    compress(recipe(DROP), tmp_path / "out", overwrite=True)
    assert names(tmp_path) == ["out"]


# Two runs at once


def test_of_two_runs_in_one_process_one_is_done_and_the_other_refused(recipe, tmp_path):
    started, ended, outcomes = threading.Event(), threading.Event(), []

    def wait():
        started.set()
        ended.wait(60)

    def run():
        compress(recipe(), tmp_path / "out", hooks=[Hook({"depth": wait})])
        outcomes.append("done")

    first = threading.Thread(target=run)
    first.start()
    started.wait(60)
    with pytest.raises(OutputError, match=rf"process {os.getpid()} on .* is at work there"):
        compress(recipe(), tmp_path / "out", overwrite=True)
    ended.set()
    first.join()
    assert outcomes == ["done"]
    assert names(tmp_path) == ["out"]


def test_what_a_killed_run_left_on_another_host_is_said_and_removed(recipe, tmp_path, capsys):
    tiny.save("llama", tmp_path / ".out.partial-elsewhere-17-abc" / "model")
    (tmp_path / ".out.partial-elsewhere-17-abc" / MARK).write_text(MARKED)
    (tmp_path / ".out.lock").write_text('{"host": "elsewhere", "process": 17, "number": 3}')
    said = said_by(recipe(), tmp_path / "out", capsys)
    assert "Removed .out.partial-elsewhere-17-abc, which a run on another host, that was killed, had left" in said
    assert names(tmp_path) == ["out"]


def test_a_run_that_lost_its_lock_replaces_nothing(recipe, tmp_path):
    with pytest.raises(
        OutputError, match=r"taken by another run meanwhile\. What was made is whole, and lies in .*finished"
    ):
        compress(recipe(), tmp_path / "out", hooks=[Hook({"depth": (tmp_path / ".out.lock").unlink})])
    assert names(tmp_path) == ["out.finished", "out.unfinished"]  # which may be the other's by now

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from optimum_prune.errors import OutputError
from optimum_prune.run.hidden import MARK, MARKED
from optimum_prune.run.output import check_output, hidden_output


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out"


def model_folder(folder, mark="old"):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(mark)
    return folder


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def partial(output, process, host=None):
    folder = output.parent / f".{output.name}.partial-{host or socket.gethostname()}-{process}-x"
    return marked(model_folder(folder))


def marked(folder):
    (folder / MARK).write_text(MARKED)
    return folder


def write(output, overwrite=False, then=lambda: None):
    """Writes a new output; calls `then` before it is done."""
    with hidden_output(output, overwrite) as hidden:
        (hidden.result / "config.json").write_text("new")
        then()


def break_off(error):
    raise error


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_the_output_appears_whole_and_only_at_the_end(tmp_path, output):
    with hidden_output(output, overwrite=False) as hidden:
        (hidden.result / "config.json").write_text("new")
        assert not output.exists()
    assert names(tmp_path) == ["out"]
    assert (output / "config.json").read_text() == "new"


def test_parents_of_the_output_are_made(tmp_path):
    with hidden_output(tmp_path / "a" / "b" / "out", overwrite=False):
        pass
    assert (tmp_path / "a" / "b" / "out").is_dir()


def test_another_result_can_be_chosen(tmp_path, output):
    with hidden_output(output, overwrite=False) as hidden:
        hidden.result = hidden.folder / "packed"
        model_folder(hidden.result, "packed")
    assert names(output) == ["config.json"]
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, OSError])
def test_a_failure_leaves_nothing(error, tmp_path, output):
    with pytest.raises(error):
        write(output, then=lambda: break_off(error))
    assert names(tmp_path) == []


def test_a_failure_leaves_what_was_to_be_replaced(tmp_path, output):
    (model_folder(output) / "compression").mkdir()
    (output / "compression" / "report.json").write_text('{"passes": [], "verified": {}}')
    with pytest.raises(ValueError, match="mine"):
        write(output, overwrite=True, then=lambda: break_off(ValueError("mine")))
    assert names(tmp_path) == ["out"]
    assert (output / "config.json").read_text() == "old"


def test_an_existing_output_is_refused_and_kept(tmp_path, output):
    model_folder(output)
    with pytest.raises(OutputError, match=r"exists already.*--overwrite"), hidden_output(output, overwrite=False):
        raise AssertionError
    assert (output / "config.json").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_an_existing_output_is_replaced_as_a_whole(tmp_path, output):
    (model_folder(output) / "model.safetensors").write_text("old")
    (output / "compression").mkdir()
    (output / "compression" / "report.json").write_text('{"passes": [], "verified": {}}')
    with hidden_output(output, overwrite=True) as hidden:
        (hidden.result / "config.json").write_text("new")
        assert (output / "config.json").read_text() == "old"
    assert names(tmp_path) == ["out"]
    assert names(output) == ["config.json"]
    assert (output / "config.json").read_text() == "new"


def test_an_empty_folder_may_be_overwritten(output):
    output.mkdir()
    check_output(output, overwrite=True)


@pytest.mark.parametrize("kind", ["photos", "file", "link to a model", "dangling link"])
def test_what_is_no_model_folder_is_not_overwritten(kind, tmp_path, output):
    if kind == "photos":
        output.mkdir()
        (output / "photo.jpg").write_text("precious")
    elif kind == "file":
        output.write_text("precious")
    else:
        target = tmp_path / "target"
        output.symlink_to(target if kind == "dangling link" else model_folder(target))
    before = names(tmp_path)
    with pytest.raises(OutputError, match=r"not overwritten|would be lost"), hidden_output(output, overwrite=True):
        raise AssertionError
    assert names(tmp_path) == before


@pytest.mark.parametrize("place", ["itself", "parent", "by a link"])
def test_the_model_itself_is_not_overwritten(place, tmp_path):
    model = model_folder(tmp_path / "models" / "small")
    output = model
    if place == "parent":
        output = model.parent
        (output / "config.json").write_text("also a model")
    source = model
    if place == "by a link":
        source = tmp_path / "link"
        source.symlink_to(model)
    with (
        pytest.raises(OutputError, match=r"holds what this run reads.*would be lost"),
        hidden_output(output, overwrite=True, inputs=[source]),
    ):
        raise AssertionError
    assert (model / "config.json").read_text() == "old"


def test_an_output_inside_the_models_folder_is_fine(tmp_path):
    model = model_folder(tmp_path / "small")
    with hidden_output(model / "pruned", overwrite=False, inputs=[model]):
        pass
    assert names(model) == ["config.json", "pruned"]


def test_what_a_killed_run_left_is_removed(tmp_path, output):
    partial(output, dead_process())
    with hidden_output(output, overwrite=False) as hidden:
        assert names(tmp_path) == sorted([".out.lock", hidden.folder.name])
    assert names(tmp_path) == ["out"]


def test_what_may_belong_to_others_is_left(tmp_path, output):
    alive = [
        partial(output, os.getppid()),
        partial(tmp_path / "out2", dead_process()),
        marked(model_folder(tmp_path / f".out.partial-{socket.gethostname()}-1x-x")),
    ]
    with hidden_output(output, overwrite=False):
        pass
    assert names(tmp_path) == sorted(["out", *(folder.name for folder in alive)])


def test_a_folder_that_cannot_be_written_is_an_error_of_the_output(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OutputError, match="cannot be written"),
        hidden_output(tmp_path / "file" / "out", overwrite=False),
    ):
        raise AssertionError


def test_a_name_that_is_too_long_is_an_error_of_the_output(tmp_path):
    with pytest.raises(OutputError, match="cannot be written"), hidden_output(tmp_path / ("x" * 250), overwrite=False):
        raise AssertionError
    assert names(tmp_path) == []


def test_an_output_that_appeared_meanwhile_is_not_lost(tmp_path, output):
    with pytest.raises(OutputError, match=r"exists already.*lies in .*out\.finished\."):
        write(output, then=lambda: model_folder(output, "of another run"))
    assert (output / "config.json").read_text() == "of another run"
    assert (tmp_path / "out.finished" / "config.json").read_text() == "new"
    assert names(tmp_path) == ["out", "out.finished"]


@pytest.mark.parametrize(
    "error", [PermissionError(13, "no"), KeyboardInterrupt()], ids=lambda error: type(error).__name__
)
def test_what_is_replaced_is_lost_only_once_the_new_is_in_place(error, output, monkeypatch):
    model_folder(output)
    rename = Path.rename

    def rename_unless_to_the_output(path, target):
        if Path(target) == output and path.name == "model":
            raise error
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_unless_to_the_output)
    with pytest.raises((OutputError, KeyboardInterrupt)):
        write(output, overwrite=True)
    assert (output / "config.json").read_text() == "old"


def test_what_a_run_killed_between_two_renames_replaced_is_put_back(output):
    aside = output.parent / f".out.replaced-{socket.gethostname()}-{dead_process()}-x"
    model_folder(aside / "out", "old")
    marked(aside)
    with pytest.raises(OutputError, match="exists already"):
        write(output)
    assert (output / "config.json").read_text() == "old"
    assert names(output.parent) == ["out"]


@pytest.mark.parametrize("kind", ["partial", "replaced"])
@pytest.mark.parametrize("mark", [None, "another program's", "a folder", "a link"])
def test_a_folder_called_like_ours_that_carries_no_mark_of_ours_is_left(mark, kind, tmp_path, output):
    folder = tmp_path / f".out.{kind}-elsewhere-{dead_process()}-x"
    model_folder(folder / "out", "precious")
    if mark == "a folder":
        (folder / MARK).mkdir()
    elif mark == "a link":
        marked(tmp_path).joinpath(MARK).rename(tmp_path / "mark")
        (folder / MARK).symlink_to(tmp_path / "mark")
    elif mark:
        (folder / MARK).write_text(mark)
    write(output)
    assert (folder / "out" / "config.json").read_text() == "precious"
    assert (output / "config.json").read_text() == "new"


@pytest.mark.parametrize("marked_so_far", [None, "", MARKED[:9]])
def test_a_folder_of_a_run_that_was_killed_as_it_began_is_removed(marked_so_far, tmp_path, output):
    folder = tmp_path / f".out.partial-{socket.gethostname()}-{dead_process()}-x"
    folder.mkdir()
    if marked_so_far is not None:
        (folder / MARK).write_text(marked_so_far)
    write(output)
    assert names(tmp_path) == ["out"]


def test_what_is_left_of_a_folder_whose_removal_was_broken_off_is_removed(tmp_path, output, monkeypatch):
    folder = partial(output, dead_process())
    for number in range(5):
        model_folder(folder / str(number))
    remove = os.rmdir

    def broken_off(path, *arguments, **options):
        if Path(path).name == "3":
            raise KeyboardInterrupt
        remove(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", broken_off)
        with pytest.raises(KeyboardInterrupt):
            write(output)
    assert folder.exists()
    write(output)
    assert names(tmp_path) == ["out"]

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny

from optimum_prune import Depth, Recipe, Settings, Text, compress
from optimum_prune.errors import OutputError
from optimum_prune.run.ownership import check_replaceable, check_unfinished, foreign


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return tiny.save("llama", tmp_path / "out")


@pytest.fixture
def ours(checkpoint) -> Path:
    """As a run leaves it."""
    (checkpoint / "compression").mkdir()
    for name in ("recipe.yaml", "cuts.json"):
        (checkpoint / "compression" / name).write_text("")
    (checkpoint / "onnx").mkdir()
    report = {"passes": [{"name": "depth"}, {"name": "onnx", "stage": "EXPORT"}], "verified": {}}
    (checkpoint / "compression" / "report.json").write_text(json.dumps(report))
    (checkpoint / "README.md").write_text("")
    return checkpoint


def test_a_checkpoint_and_what_a_run_left_may_be_replaced(checkpoint):
    check_replaceable(checkpoint)


def test_what_a_run_left_may_be_replaced(ours):
    check_replaceable(ours)


@pytest.mark.parametrize("name", [".git", "train.py", "notes.md", "data.jsonl", "lora", "photo.jpg", "Makefile"])
@pytest.mark.parametrize("of_a_run", [False, True])
def test_what_a_person_put_there_is_named_and_stays(name, of_a_run, request):
    folder = request.getfixturevalue("ours" if of_a_run else "checkpoint")
    if "." in name[1:] or name == "Makefile":
        (folder / name).write_text("precious")
    else:
        (folder / name).mkdir()
    with pytest.raises(OutputError, match=f"{name}.*would be lost"):
        check_replaceable(folder)
    assert (folder / name).exists()


def test_a_config_of_something_else_makes_no_checkpoint(tmp_path):
    (tmp_path / "config.json").write_text('{"eslint": 1}')
    for name in ("README.md", "recipe.yaml", "activations.safetensors"):
        (tmp_path / name).write_text("precious")
    assert foreign(tmp_path) == ["README.md", "activations.safetensors", "config.json", "recipe.yaml"]


def test_a_config_without_weights_makes_no_checkpoint(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    assert "config.json" in foreign(checkpoint)


def test_code_and_a_recipe_are_a_checkpoints_only_if_its_config_says_so(checkpoint):
    for name in ("modeling_mine.py", "parts_mine.py", "modeling_thesis.py", "recipe.yaml"):
        (checkpoint / name).write_text("from .parts_mine import Part\n" if name == "modeling_mine.py" else "")
    assert foreign(checkpoint) == ["modeling_mine.py", "modeling_thesis.py", "parts_mine.py", "recipe.yaml"]
    config = json.loads((checkpoint / "config.json").read_text())
    named = {"auto_map": {"AutoModelForCausalLM": "modeling_mine.Model"}, "quantization_config": {}}
    (checkpoint / "config.json").write_text(json.dumps({**config, **named}))
    assert foreign(checkpoint) == ["modeling_thesis.py"]


def test_companions_are_a_checkpoints(checkpoint):
    (checkpoint / "additional_chat_templates").mkdir()
    for name in ("NOTICE", "tokenizer.model.v3", "additional_chat_templates/tool_use.jinja"):
        (checkpoint / name).write_text("")
    assert foreign(checkpoint) == []
    (checkpoint / "additional_chat_templates" / "thesis.tex").write_text("")
    assert foreign(checkpoint) == ["additional_chat_templates/thesis.tex"]


def test_a_report_names_folders_of_exporters_only(ours):
    (ours / "depth").mkdir()
    (ours / ".git").mkdir()
    report = {"passes": [{"name": "depth", "stage": "PRUNE"}, {"name": ".git", "stage": "EXPORT"}], "verified": {}}
    (ours / "compression" / "report.json").write_text(json.dumps(report))
    (ours / "compression" / "cuts.json").unlink()
    (ours / "compression" / "cuts.json").mkdir()
    assert foreign(ours) == [".git/", "compression/cuts.json", "depth/", "onnx/"]


def test_a_folder_that_is_called_like_a_checkpoint_of_a_run_is_a_persons(checkpoint, tmp_path):
    unfinished = tmp_path / "x.unfinished"
    unfinished.mkdir()
    (checkpoint / "me.jpg").write_text("precious")
    checkpoint.rename(unfinished / "2024-photos")
    with pytest.raises(OutputError, match="2024-photos, which no run leaves"):
        check_unfinished(unfinished)
    (unfinished / "2024-photos" / "me.jpg").unlink()
    check_unfinished(unfinished)


def test_many_others_are_named_in_part(checkpoint):
    for number in range(9):
        (checkpoint / f"{number}.csv").write_text("")
    with pytest.raises(OutputError, match=r"0\.csv, 1\.csv, 2\.csv and 6 more"):
        check_replaceable(checkpoint)


def test_a_folder_of_an_exporter_that_the_report_does_not_know_is_a_persons(ours):
    (ours / "openvino").mkdir()
    assert foreign(ours) == ["openvino/"]
    (ours / "compression" / "thesis.tex").write_text("")
    assert foreign(ours) == ["compression/thesis.tex", "openvino/"]


def test_links_are_not_followed(checkpoint, tmp_path):
    (checkpoint / "tokenizer.model").symlink_to(tmp_path)
    assert foreign(checkpoint) == ["tokenizer.model"]


@pytest.mark.parametrize("report", ["[]", "{", '{"passes": 3, "verified": 1}', "[" * 100_000])
def test_a_report_of_something_else_makes_no_folder_ours(ours, report):
    (ours / "compression" / "report.json").write_text(report)
    assert "compression/" in foreign(ours)


@pytest.mark.parametrize("what", ["text", "recipe"])
def test_what_this_run_reads_is_not_replaced(what, ours, tmp_path):
    inside = ours / "compression" / "recipe.yaml"
    with pytest.raises(OutputError, match=r"what this run reads.*recipe\.yaml"):
        check_replaceable(ours, [inside, tmp_path / "elsewhere.txt"])
    link = tmp_path / what
    link.symlink_to(inside)
    with pytest.raises(OutputError, match="what this run reads"):
        check_replaceable(ours, [link])


@pytest.mark.parametrize("kind", ["notes", "link", "file", "finished output", "inner link"])
def test_a_folder_of_that_name_that_is_not_ours_is_neither_used_nor_removed(kind, tmp_path, llama, text_file):
    folder, elsewhere = tmp_path / "out.unfinished", tmp_path / "elsewhere"
    if kind == "file":
        folder.write_text("precious")
    elif kind == "link":
        elsewhere.mkdir()
        folder.symlink_to(elsewhere)
    elif kind == "finished output":
        tiny.save("llama", folder)
    else:
        folder.mkdir()
        if kind == "notes":
            (folder / "notes.txt").write_text("precious")
        else:
            elsewhere.mkdir()
            (folder / "1-model").symlink_to(elsewhere)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(OutputError, match="left alone"):
        check_unfinished(folder)
    recipe = Recipe(
        passes=(Depth(drop=(1,)),),
        calibration=Text(text=str(text_file), samples=2, length=16),
        settings=Settings(model=str(llama), device="cpu"),
    )
    with pytest.raises(OutputError, match="left alone"):
        compress(recipe, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "state",
    [
        "",
        "[]",
        "{}",
        '{"checkpoint": "../elsewhere", "identity": {}, "passes": [], "facts": {}}',
        '{"checkpoint": "/elsewhere", "identity": {}, "passes": [], "facts": {}}',
        '{"checkpoint": 3, "identity": [], "passes": {}, "facts": 1}',
        '{"checkpoint": "1-model", "identity": {"the model": []}, "passes": [[1, 2]], "facts": {}}',
        "[" * 100_000,
    ],
)
@pytest.mark.parametrize("file", ["state.json", "journal/begun.json"])
def test_state_of_any_content_is_nobodys_and_the_run_begins_anew(file, state, tmp_path, llama, text_file):
    place = tmp_path / "out.unfinished" / file
    place.parent.mkdir(parents=True)
    place.write_text(state)
    tiny.save("llama", tmp_path / "elsewhere")
    recipe = Recipe(
        passes=(Depth(drop=(1,)),),
        calibration=Text(text=str(text_file), samples=2, length=16),
        evaluation=Text(samples=0),
        settings=Settings(model=str(llama), device="cpu"),
    )
    compress(recipe, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "out"]

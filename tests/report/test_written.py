from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from folder_passes import Archive, Halve
from reports import CUTS, REPORT, WRITTEN

from optimum_prune import Depth, Osscar, Recipe, Report, Settings, Text, compress
from optimum_prune.errors import CheckpointError
from optimum_prune.options import as_plain
from optimum_prune.passes.outcome import Artefact
from optimum_prune.report.card import model_card
from optimum_prune.report.written import counts_of, write_beside

RECIPE = Recipe(passes=(Depth(layers=1),), settings=Settings(model="some/model"))


@pytest.fixture
def folder(tmp_path):
    """As a run leaves it."""
    write_beside(tmp_path, RECIPE, REPORT)
    return tmp_path


def test_a_folder_has_report_cuts_recipe_and_card(folder):
    names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    assert names == ["README.md", "compression/cuts.json", "compression/recipe.yaml", "compression/report.json"]
    assert json.loads((folder / "compression/report.json").read_text()) == WRITTEN
    assert json.loads((folder / "compression/cuts.json").read_text()) == CUTS
    assert (folder / "compression/recipe.yaml").read_text() == RECIPE.to_yaml()
    assert (folder / "README.md").read_text() == model_card(REPORT, RECIPE.to_yaml())


def test_a_report_is_read_from_its_folder(folder):
    assert Report.read(folder) == REPORT
    assert Report.read(str(folder)) == REPORT


@pytest.mark.parametrize("gone", ["report.json", "cuts.json"])
def test_a_folder_without_a_report_is_refused(gone, folder):
    (folder / "compression" / gone).unlink()
    with pytest.raises(
        CheckpointError, match=r"has no compression/report\.json with the cuts\.json.*as a run left it"
    ):
        Report.read(folder)


def test_parameters_are_those_that_the_report_says(folder):
    (folder / "onnx").mkdir()
    for place in (folder, folder / "onnx"):
        counts = counts_of(place)
        assert (counts.total, counts.non_embedding) == (118_100_000, 89_800_000)


def test_parameters_of_a_folder_without_a_report_are_not_known(folder):
    (folder / "compression" / "report.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no compression/report\.json beside it"):
        counts_of(folder)
    (folder / "compression" / "report.json").write_text("{")
    with pytest.raises(CheckpointError, match="no report"):
        counts_of(folder)


@pytest.mark.parametrize(
    "passes",
    [(Osscar(ratio=0.25, allocation="global"),), (Depth(layers=2), Halve(), Archive())],
    ids=lambda passes: "+".join(step.name for step in passes),
)
def test_the_report_of_a_run_is_read_from_its_output(passes, llama, text_file, tmp_path):
    recipe = Recipe(
        passes=passes,
        calibration=Text(text=str(text_file), samples=4, length=32),
        evaluation=Text(samples=2),
        settings=Settings(model=str(llama), device="cpu"),
    )
    report = compress(recipe, tmp_path / "out")
    found = Report.read(tmp_path / "out")
    assert found == report
    assert found.table() == report.table()
    assert [outcome.options for outcome in found.passes] == [as_plain(step) for step in passes]
    assert found.passes[0].cuts == report.passes[0].cuts != type(found.passes[0].cuts)()
    written = json.loads((tmp_path / "out/compression/report.json").read_text())
    for step, outcome in zip(written["passes"], found.passes, strict=True):
        if outcome.artefact is not None:
            assert isinstance(outcome.artefact, Artefact)
            assert step["artefact"] == asdict(outcome.artefact)

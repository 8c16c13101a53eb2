from __future__ import annotations

import shutil

import pytest
import tiny
import torch
from command_line import common, names, one_sentence

from optimum_prune import Decoder
from optimum_prune import testing as conformance
from optimum_prune.builtin.prune.budget import Budget
from optimum_prune.refit import pricing
from optimum_prune.report.report import Report

FLAGS = ["--finalists", 1, "--multiple-of", 4]


@pytest.fixture
def done(cli):
    """Runs a command that ends well: what it puts out."""

    def done(*arguments):
        code, out, error = cli(*arguments)
        assert code == 0, error
        return out

    return done


@pytest.fixture
def said(cli):
    """Runs a command that is refused: the sentence."""

    def said(*arguments):
        code, _, error = cli(*arguments)
        assert code
        return one_sentence(error)

    return said


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def test_of_one_search_come_models_of_several_sizes(done, llama, text_file, work, monkeypatch):
    """Each is what a command for it alone makes, and what layers cost is found out once."""
    priced, sizes = [], ("0.9", "0.8")
    found = pricing._Pricing.found
    monkeypatch.setattr(pricing._Pricing, "found", lambda self, *given: priced.append(1) or found(self, *given))
    flags = [*FLAGS, *common(llama, text_file, "--samples", 8)]
    out = done("prune", "budget", "--params", *sizes, "--output", work / "all", *flags)
    assert len(priced) == tiny.LAYERS
    assert names(work / "all") == ["library", "params-0.8", "params-0.9"]
    assert out.index("params-0.9") < out.index("params-0.8")
    for size in sizes:
        done("prune", "budget", "--params", size, "--output", work / size, *flags)
        assert weights(work / size) == weights(work / "all" / f"params-{size}")
        report = Report.read(work / "all" / f"params-{size}")
        assert f"{report.perplexity.after.value:,.2f}" in out
        assert report.parameters.after <= float(size) * report.parameters.before


def test_what_is_there_is_passed_over_when_the_rest_is_made(done, llama, text_file, work):
    flags = [*FLAGS, *common(llama, text_file, "--samples", 8), "--output", work / "all"]
    done("prune", "budget", "--bytes", "0.9", "0.8", *flags)
    before = {size: weights(work / "all" / f"bytes-{size}") for size in ("0.9", "0.8")}
    when = (work / "all" / "bytes-0.9" / "model.safetensors").stat().st_mtime_ns
    shutil.rmtree(work / "all" / "bytes-0.8")
    done("prune", "budget", "--bytes", "0.9", "0.8", *flags, "--resume")
    assert (work / "all" / "bytes-0.9" / "model.safetensors").stat().st_mtime_ns == when
    assert before == {size: weights(work / "all" / f"bytes-{size}") for size in ("0.9", "0.8")}


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--params", "0.9", "0.9"], "twice: 0.9, 0.9"),
        (["--params", "0.9", "0.8", "--decode-speed", "1.1", "1.2"], "several values of params and of decode_speed"),
        (["--params", "0.9", "0.01"], "keep 0.01 of the parameters, and by what may go here"),
        (["--params", "0.9", "2"], "params 2.0"),
    ],
    ids=str,
)
def test_nothing_is_made_if_one_of_them_cannot_be(flags, why, said, llama, text_file, work):
    assert why in said("prune", "budget", *flags, "--output", work / "all", *common(llama, text_file))
    assert not (work / "all").exists()


def test_a_folder_that_is_something_else_is_left_alone(said, llama, text_file, work):
    (work / "mine").mkdir()
    (work / "mine" / "notes.txt").write_text("mine")
    flags = ["prune", "budget", "--params", "0.9", "0.8", *common(llama, text_file), "--output"]
    assert "exists already" in said(*flags, work / "mine")
    assert "is something else" in said(*flags, llama, "--overwrite")
    assert names(work / "mine") == ["notes.txt"]


@pytest.mark.parametrize("name", ["llama"])
def test_a_library_is_of_one_model_and_one_text(name, decoder, plugins, tmp_path, monkeypatch):
    counted = []
    found = pricing._Pricing.found
    monkeypatch.setattr(pricing._Pricing, "found", lambda self, *given: counted.append(1) or found(self, *given))
    step = Budget(params=0.8, multiple_of=4, finalists=1, library=str(tmp_path / "library"), own_text=0.0)

    def run(model, windows, step=step):
        counted.clear()
        small = Decoder(model, decoder.family)
        conformance.pruned(step, small, windows, plugins)
        return len(counted), small.model.state_dict()

    other = tiny.model(name)
    with torch.no_grad():
        other.model.layers[3].mlp.up_proj.weight.mul_(1.5)
    windows = tiny.windows(10)
    first, weights_first = run(tiny.model(name), windows)
    again, weights_again = run(tiny.model(name), windows)
    assert (first, again) == (tiny.LAYERS, 0)
    assert all(torch.equal(value, weights_again[key]) for key, value in weights_first.items())
    assert run(other, windows)[0] == tiny.LAYERS
    assert run(tiny.model(name), tiny.windows(10, seed=5))[0] == tiny.LAYERS
    assert run(tiny.model(name), windows, Budget(**{**vars(step), "protect": (1,)}))[0] == tiny.LAYERS
    for damaged in (tmp_path / "library").glob("*/prices of layer 2.json"):
        damaged.write_text("{")
    assert run(tiny.model(name), windows)[0] == 1

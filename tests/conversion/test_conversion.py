"""Passes from folder to folder: what they write is run and judged, here or in another interpreter."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from folder_passes import Archive, Halve

from optimum_prune import Depth, Osscar, Pruner, Text, compress, load_model
from optimum_prune.builtin.prune.block_pruner import BlockPruner
from optimum_prune.conversion.interpreter import check_environment
from optimum_prune.errors import PassError, RecipeError, VerificationError
from optimum_prune.evaluation.comparison import ReferenceOutputs, compare
from optimum_prune.evaluation.runtime import TransformersRuntime

STAND_INS = "#!/bin/sh\necho nonsense\n"


class TestWhatAPassWrote:
    def test_is_run_and_reported(self, recipe, tmp_path, artefacts):
        report = compress(recipe(Depth(layers=1), Halve(), Archive()), tmp_path / "out")
        found = artefacts(tmp_path / "out")
        assert found["halve"]["folder"] == "."
        assert 0 < found["halve"]["difference"] < 0.2 == found["halve"]["tolerance"]
        assert found["archive"]["folder"] == "archive"
        assert found["archive"]["bytes"] == sum(
            file.stat().st_size for file in (tmp_path / "out/archive").iterdir() if file.is_file()
        )
        assert found["archive"]["difference"] < 0.05
        assert found["archive"]["generated"] == 16
        assert found["archive"]["perplexity"] == pytest.approx(found["halve"]["perplexity"], rel=0.02)
        assert report.perplexity.after.value == found["halve"]["perplexity"]
        assert found["halve"]["versions"]["torch"] == torch.__version__
        assert "archive: " in report.table()
        assert "tokens generated alike" in report.table()

    def test_must_be_near_what_it_was_made_from(self, recipe, tmp_path):
        with pytest.raises(VerificationError, match=r"'archive' wrote differ .* and 0\.05 is tolerated"):
            compress(recipe(Archive(fail="noise")), tmp_path / "out")
        assert not (tmp_path / "out").exists()
        compress(recipe(Archive(fail="noise", tolerance=10.0)), tmp_path / "out")

    def test_counts_parameters_as_they_were_after_pruning(self, recipe, tmp_path):
        report = compress(recipe(Depth(layers=1), Halve()), tmp_path / "out")
        assert report.parameters.after == load_model(tmp_path / "out").num_parameters()
        assert report.bytes.after == pytest.approx(report.parameters.after * 2, rel=0.2)

    def test_is_run_on_windows_without_padding(self, llama, tmp_path, artefacts):
        windows = tiny.windows(6, padded=True)
        pruner = Pruner.from_pretrained(llama, device="cpu")
        pruner.prune(Archive(), calibration=windows, evaluation=windows, save_dir=tmp_path / "out")
        assert artefacts(tmp_path / "out")["archive"]["perplexity"] > 1

    def test_is_exported_even_without_any_evaluation(self, recipe, tmp_path, artefacts):
        compress(replace(recipe(Archive()), evaluation=Text(samples=0)), tmp_path / "out")
        assert artefacts(tmp_path / "out")["archive"]["perplexity"] is None


class Broken(TransformersRuntime):
    """Loses its cache."""

    def generate(self, tokens, count):
        return [super(Broken, self).generate(tokens[-1:], 1)[0] for _ in range(count)]


def test_generation_that_does_not_follow_from_the_logits_is_seen(llama):
    whole = TransformersRuntime(load_model(llama))
    expected = ReferenceOutputs.of(whole, tiny.windows(4, 32).tokens)
    assert compare(whole, expected).with_cache == 0
    assert compare(whole, expected).same_tokens == 16
    assert compare(Broken(whole.model), expected).with_cache > 0.1


class TestWhatCannotBeDone:
    """is said before anything runs."""

    @pytest.fixture(autouse=True)
    def nothing_runs(self, monkeypatch):
        def load(*_, **__):
            raise AssertionError("weights were read")

        monkeypatch.setattr("optimum_prune.checkpoint.loading.load", load)

    def test_groups_that_do_not_divide_the_pruned_width(self, recipe, tmp_path):
        steps = Osscar(ratio=0.25, multiple_of=20), Halve(group_size=16)
        with pytest.raises(
            RecipeError,
            match=r"'halve' has groups of 16 .* FFN width .*multiple_of: 16`, or give .* of 8\.",
        ):
            compress(recipe(*steps), tmp_path / "out")
        steps = Osscar(ratio=0.25, allocation="global", multiple_of=4), Halve(group_size=16)
        with pytest.raises(RecipeError, match=r"will be 4, .*multiple_of: 16"):
            compress(recipe(*steps), tmp_path / "out")
        with pytest.raises(RecipeError, match=r"hidden size of the model will be 32"):
            compress(recipe(Halve(group_size=24)), tmp_path / "out")

    @pytest.mark.parametrize(
        "step", [Osscar(ratio=0.25, allocation="global"), Osscar(ratio=0.25, protect=(0,)), BlockPruner(blocks=2)]
    )
    def test_layers_that_differ_for_a_pass_that_does_not_know_them(self, recipe, tmp_path, step):
        with pytest.raises(RecipeError, match=r"'archive' cannot read a model whose layers differ"):
            compress(recipe(step, Archive()), tmp_path / "out")

    def test_packed_weights_for_a_pass_that_does_not_know_them(self, recipe):
        with pytest.raises(RecipeError, match=r"'halve' comes after 'halve', and cannot read"):
            recipe(Halve(), Halve())

    def test_an_interpreter_that_is_none(self, recipe, tmp_path):
        with pytest.raises(RecipeError, match=r"interpreter no/such/python, which does not exist"):
            recipe(Archive(python="no/such/python"))
        fake = tmp_path / "python"
        fake.write_text(STAND_INS)
        fake.chmod(0o755)
        with pytest.raises(RecipeError, match=r"does not answer as a Python does"):
            check_environment(Archive(python=str(fake)))

    def test_libraries_missing_in_the_other_environment(self, recipe, tmp_path):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
        python = tmp_path / "bare/bin/python"
        with pytest.raises(
            RecipeError, match=rf"torch, transformers, .* Run: {python} -m pip install 'torch' 'transf"
        ):
            check_environment(Archive(python=str(python)))


class TestAnotherInterpreter:
    def test_writes_the_same(self, recipe, tmp_path, capfd, artefacts):
        here, there = recipe(Halve(), Archive()), recipe(Halve(python=sys.executable), Archive(python=sys.executable))
        compress(here, tmp_path / "here")
        compress(there, tmp_path / "there")
        assert (tmp_path / "here/model.safetensors").read_bytes() == (
            tmp_path / "there/model.safetensors"
        ).read_bytes()
        for name, found in artefacts(tmp_path / "there").items():
            assert Path(found["interpreter"]).name == Path(sys.executable).name
            assert found["difference"] == artefacts(tmp_path / "here")[name]["difference"]
            assert found["perplexity"] == artefacts(tmp_path / "here")[name]["perplexity"]
            assert found["versions"] == artefacts(tmp_path / "here")[name]["versions"]
        decisions = json.loads((tmp_path / "there/compression/report.json").read_text())["passes"][0]["decisions"]
        assert decisions[0]["process"] != os.getpid()

    def test_is_found_by_the_name_of_the_pass(self, recipe, tmp_path, monkeypatch):
        monkeypatch.setattr(Archive, "requires", {"no_such_module_anywhere": "no-such-module"})
        with pytest.raises(RecipeError, match=r"not installed here.*or name another interpreter"):
            recipe(Archive())
        monkeypatch.setenv("OPTIMUM_PRUNE_PYTHON_ARCHIVE", sys.executable)
        recipe(Archive())
        with pytest.raises(RecipeError, match=rf"not installed in the environment of {sys.executable}"):
            check_environment(Archive())

    @pytest.mark.parametrize(
        ("fail", "kind", "message"),
        [
            ("raise", PassError, r"'archive' failed: RuntimeError: the exporter broke\."),
            ("end", PassError, r"ended with its interpreter .*which said last: .*archiving"),
            ("noise", VerificationError, r"0\.05 is tolerated"),
        ],
    )
    def test_tells_what_went_wrong(self, recipe, tmp_path, fail, kind, message):
        with pytest.raises(kind, match=message):
            compress(recipe(Archive(python=sys.executable, fail=fail)), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_cannot_run_what_is_defined_in_a_script(self, recipe, tmp_path, monkeypatch):
        steps = recipe(Archive(python=sys.executable))
        monkeypatch.setattr(Archive, "__module__", "__main__")
        with pytest.raises(RecipeError, match=r"defined in __main__"):
            compress(steps, tmp_path / "out")

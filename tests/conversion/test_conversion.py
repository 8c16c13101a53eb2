"""Passes from folder to folder: what they write is run and judged, here or in another interpreter, and what was done before is kept."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import tiny
import torch
from folder_passes import Archive, Halve

from optimum_prune import Depth, Osscar, Pruner, Recipe, Settings, Text, compress, hookimpl, load_model
from optimum_prune.errors import OutputError, PassError, RecipeError, VerificationError
from optimum_prune.methods.block_pruner import BlockPruner
from optimum_prune.progress import Progress
from optimum_prune.runtime import Expected, TransformersRuntime, compare

STAND_INS = "#!/bin/sh\necho nonsense\n"


@pytest.fixture
def recipe(llama, text_file):
    def recipe(*passes, **settings):
        return Recipe(
            passes=passes,
            calibration=Text(text=str(text_file), samples=6, length=24),
            evaluation=Text(samples=4),
            settings=Settings(model=str(llama), device="cpu", **settings),
        )

    return recipe


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def artefacts(folder):
    report = json.loads((folder / "compression/report.json").read_text())
    return {step["name"]: step["artefact"] for step in report["passes"] if "artefact" in step}


class TestWhatAPassWrote:
    def test_is_run_and_reported(self, recipe, tmp_path):
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

    def test_is_run_on_windows_without_padding(self, llama, tmp_path):
        windows = tiny.windows(6, padded=True)
        pruner = Pruner.from_pretrained(llama, device="cpu")
        pruner.prune(Archive(), calibration=windows, evaluation=windows, save_dir=tmp_path / "out")
        assert artefacts(tmp_path / "out")["archive"]["perplexity"] > 1

    def test_is_exported_even_without_any_evaluation(self, recipe, tmp_path):
        compress(replace(recipe(Archive()), evaluation=Text(samples=0)), tmp_path / "out")
        assert artefacts(tmp_path / "out")["archive"]["perplexity"] is None


class Broken(TransformersRuntime):
    """Loses its cache."""

    def generate(self, tokens, count):
        return [super(Broken, self).generate(tokens[-1:], 1)[0] for _ in range(count)]


def test_generation_that_does_not_follow_from_the_logits_is_seen(llama):
    whole = TransformersRuntime(load_model(llama))
    expected = Expected.of(whole, tiny.windows(4, 32).tokens)
    assert compare(whole, expected).with_cache == 0
    assert compare(whole, expected).same_tokens == 16
    assert compare(Broken(whole.model), expected).with_cache > 0.1


class TestWhatCannotBeDone:
    """is said before anything runs."""

    @pytest.fixture(autouse=True)
    def nothing_runs(self, monkeypatch):
        def load(*_, **__):
            raise AssertionError("weights were read")

        monkeypatch.setattr("optimum_prune.checkpoint.load", load)

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
            recipe(Archive(python=str(fake)))

    def test_libraries_missing_in_the_other_environment(self, recipe, tmp_path):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
        python = tmp_path / "bare/bin/python"
        with pytest.raises(
            RecipeError, match=rf"torch, transformers, .* Run: {python} -m pip install 'torch' 'transf"
        ):
            recipe(Archive(python=str(python)))


class TestAnotherInterpreter:
    def test_writes_the_same(self, recipe, tmp_path, capfd):
        here, there = recipe(Halve(), Archive()), recipe(Halve(python=sys.executable), Archive(python=sys.executable))
        compress(here, tmp_path / "here")
        compress(there, tmp_path / "there")
        assert (tmp_path / "here/model.safetensors").read_bytes() == (
            tmp_path / "there/model.safetensors"
        ).read_bytes()
        for name, found in artefacts(tmp_path / "there").items():
            assert found["interpreter"] == sys.executable
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
        with pytest.raises(RecipeError, match=rf"not installed in the environment of {sys.executable}"):
            recipe(Archive())

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
        monkeypatch.setattr(Archive, "__module__", "__main__")
        with pytest.raises(RecipeError, match=r"defined in __main__"):
            compress(recipe(Archive(python=sys.executable)), tmp_path / "out")


class Heard:
    def __init__(self):
        self.names = []

    @hookimpl
    def before_pass(self, step, model):
        self.names.append(step.name)


class TestARunThatFailsLate:
    def fail(self, recipe, folder, *steps, kind=PassError):
        with pytest.raises(kind) as raised:
            compress(recipe(*steps), folder)
        return str(raised.value)

    def test_keeps_the_checkpoint_and_says_where(self, recipe, tmp_path):
        message = self.fail(recipe, tmp_path / "out", Depth(layers=1), Halve(), Archive(fail="raise"))
        assert names(tmp_path) == ["out.unfinished"]
        (kept,) = [entry for entry in (tmp_path / "out.unfinished").iterdir() if entry.is_dir()]
        assert f"The checkpoint after depth, halve is kept in {kept}; the same command" in message
        assert load_model(kept).dtype == torch.bfloat16

    @pytest.mark.parametrize("fail", ["raise", "noise"])
    def test_goes_on_from_there_and_ends_as_if_nothing_had_happened(self, recipe, tmp_path, fail):
        kind = PassError if fail == "raise" else VerificationError
        self.fail(recipe, tmp_path / "out", Depth(layers=1), Halve(), Archive(fail=fail), kind=kind)
        heard = Heard()
        report = compress(recipe(Depth(layers=1), Halve(), Archive()), tmp_path / "out", hooks=[heard], resume=True)
        assert heard.names == ["archive"]
        whole = compress(recipe(Depth(layers=1), Halve(), Archive()), tmp_path / "whole")
        assert names(tmp_path) == ["out", "whole"]
        for file in (tmp_path / "whole").rglob("*.safetensors"):
            assert (tmp_path / "out" / file.relative_to(tmp_path / "whole")).read_bytes() == file.read_bytes()
        assert [step.cuts for step in report.passes] == [step.cuts for step in whole.passes]
        assert report.perplexity.after.value == whole.perplexity.after.value
        assert report.to_dict().keys() == whole.to_dict().keys()

    def test_is_begun_anew_for_another_recipe_and_told_so_if_it_is_to_be_resumed(self, recipe, tmp_path, text_file):
        self.fail(recipe, tmp_path / "out", Depth(layers=1), Archive(fail="raise"))
        with pytest.raises(RecipeError, match=r"the options of its passes changed"):
            compress(recipe(Depth(layers=2), Archive()), tmp_path / "out", resume=True)
        other = replace(
            recipe(Depth(layers=1), Archive()), calibration=Text(text=str(text_file), samples=5, length=24)
        )
        with pytest.raises(RecipeError, match=r"the calibration.* changed"):
            compress(other, tmp_path / "out", resume=True)
        heard = Heard()
        compress(recipe(Depth(layers=2), Archive()), tmp_path / "out", hooks=[heard])
        assert heard.names == ["depth", "archive"]
        assert names(tmp_path) == ["out"]

    def test_begins_where_there_is_none(self, recipe, tmp_path, capsys):
        compress(recipe(Depth(layers=1)), tmp_path / "out", resume=True, progress=Progress(output=True))
        assert "There is nothing to go on from" in capsys.readouterr().err
        assert names(tmp_path) == ["out"]

    def test_of_a_model_in_memory_is_never_taken_up(self, llama, tmp_path):
        windows = tiny.windows(4)
        pruner = Pruner.from_pretrained(load_model(llama))
        with pytest.raises(PassError, match=r"kept in"):
            pruner.prune(Archive(fail="raise"), calibration=windows, save_dir=tmp_path / "out")
        with pytest.raises(RecipeError, match=r"the model changed"):
            pruner.prune(Archive(), calibration=windows, save_dir=tmp_path / "out", resume=True)

    def test_keeps_its_checkpoint_when_it_is_interrupted(self, recipe, tmp_path):
        with pytest.raises(KeyboardInterrupt, match=r"The checkpoint after depth is kept in"):
            compress(recipe(Depth(layers=1), Archive(fail="interrupt")), tmp_path / "out")
        assert names(tmp_path) == ["out.unfinished"]

    def test_of_pruning_alone_leaves_nothing(self, recipe, tmp_path, monkeypatch):
        def verify(*_):
            raise VerificationError("No.")

        monkeypatch.setattr("optimum_prune.checkpoint.verify", verify)
        with pytest.raises(VerificationError, match=r"^No\.$"):
            compress(recipe(Depth(layers=1), Archive()), tmp_path / "out")
        assert names(tmp_path) == []

    def test_with_a_damaged_state_is_begun_anew(self, recipe, tmp_path):
        self.fail(recipe, tmp_path / "out", Depth(layers=1), Archive(fail="raise"))
        (tmp_path / "out.unfinished/state.json").write_text('{"identity": {}, "pas')
        heard = Heard()
        compress(recipe(Depth(layers=1), Archive()), tmp_path / "out", hooks=[heard])
        assert heard.names == ["depth", "archive"]

    def test_is_not_taken_from_a_process_that_is_at_work(self, recipe, tmp_path):
        self.fail(recipe, tmp_path / "out", Depth(layers=1), Archive(fail="raise"))
        file = tmp_path / "out.unfinished/state.json"
        state = json.loads(file.read_text())
        file.write_text(json.dumps({**state, "process": [state["process"][0], os.getppid()]}))
        with pytest.raises(OutputError, match=rf"process {os.getppid()} is at work"):
            compress(recipe(Depth(layers=1), Archive()), tmp_path / "out")


def test_a_child_does_not_outlive_its_parent_that_is_stopped(recipe, tmp_path):
    """The other interpreter ends when the run is interrupted."""
    from optimum_prune import elsewhere

    script = "import os, sys, time; print(os.getpid(), flush=True); time.sleep(60)"
    heard = []

    class Ear:
        def write(self, line):
            heard.append(int(line))
            signal.raise_signal(signal.SIGINT)

    old, sys.stderr = sys.stderr, Ear()
    try:
        with pytest.raises(KeyboardInterrupt):
            elsewhere._run([sys.executable, "-c", script], os.environ, True)
    finally:
        sys.stderr = old
    with pytest.raises(ProcessLookupError):
        os.kill(heard[0], 0)

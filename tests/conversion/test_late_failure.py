"""A run that fails after its checkpoint was written keeps that, and goes on from it."""

import os
from dataclasses import replace

import pytest
import tiny
import torch
from folder_passes import Archive, Halve

from optimum_prune import Depth, Pruner, Text, compress, hookimpl, load_model
from optimum_prune.errors import OutputError, PassError, RecipeError, VerificationError
from optimum_prune.machine.locks import lock
from optimum_prune.machine.progress import Progress


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


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

        monkeypatch.setattr("optimum_prune.checkpoint.verification.verify", verify)
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
        with (
            lock(tmp_path / ".out.lock", "held"),
            pytest.raises(OutputError, match=rf"process {os.getpid()} on .* is at work there"),
        ):
            compress(recipe(Depth(layers=1), Archive()), tmp_path / "out")

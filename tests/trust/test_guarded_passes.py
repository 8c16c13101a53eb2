"""A pass of a stranger's changes nothing of the process that it runs in, and what it does wrong is said in one sentence that names it."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from folder_passes import Halve

from optimum_prune import Cuts, Decision, PrunePass, Recipe, RecoverPass, Settings, Text, compress
from optimum_prune.errors import PassError
from optimum_prune.machine import interrupts


def change():
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_grad_enabled(False)
    torch.use_deterministic_algorithms(True)
    os.chdir("/")
    os.environ["LOUD"] = "1"
    print("noise")
    sys.stderr = sys.stdin = None


def state():
    about = torch.get_default_dtype(), torch.empty(1).device, torch.is_grad_enabled(), torch.get_num_threads()
    return *about, torch.are_deterministic_algorithms_enabled(), Path.cwd(), dict(os.environ), sys.stdin, sys.stderr


class Doing:
    """What passes here do, set by a test."""

    now: ClassVar[Any] = staticmethod(lambda: None)
    evidence: ClassVar[Any] = None
    where: ClassVar[str] = "work"

    @classmethod
    def at(cls, where):
        if where == cls.where:
            cls.now()
        return {} if cls.evidence is None else cls.evidence


@pytest.fixture(autouse=True)
def doing(monkeypatch):
    """Lets passes do something."""

    def doing(now, where="work", evidence=None):
        monkeypatch.setattr(Doing, "now", staticmethod(now))
        monkeypatch.setattr(Doing, "where", where)
        monkeypatch.setattr(Doing, "evidence", evidence)

    return doing


@dataclass(frozen=True, kw_only=True)
class Decides(PrunePass):
    """Leaves out the second layer."""

    name: ClassVar[str] = "decides"

    def foresee(self, shape):
        Doing.at("foresee")
        return shape.keep([index for index in range(len(shape.layers)) if index != 1])

    def decide(self, decoder, calibration):
        evidence = Doing.at("work")
        yield Decision(Cuts(layers=(0, 2, 3, 4, 5)), evidence=evidence)


@dataclass(frozen=True, kw_only=True)
class Changes(PrunePass):
    """Leaves out the second layer, and changes the output head."""

    name: ClassVar[str] = "changes"
    how: str

    def foresee(self, shape):
        return shape.keep([0, 2, 3, 4, 5])

    def decide(self, decoder, calibration):
        yield Decision(Cuts(layers=(0, 2, 3, 4, 5)))
        weight = decoder.model.lm_head.weight
        if self.how == "in place":
            weight.data.mul_(2)
        else:
            weight.data = 2 * weight.data


@dataclass(frozen=True, kw_only=True)
class Recovers(RecoverPass):
    """Halves the last norm."""

    name: ClassVar[str] = "recovers"
    needs_teacher: ClassVar[bool] = False

    def recover(self, recovery):
        evidence = Doing.at("work")
        recovery.decoder.model.model.norm.weight.data.mul_(0.5)
        return evidence


@dataclass(frozen=True, kw_only=True)
class Converts(Halve):
    """Stores weights in half precision."""

    name: ClassVar[str] = "converts"

    def check(self, spec):
        Doing.at("check")

    def convert(self, job):
        super().convert(job)
        return Doing.at("work")

    def open(self, folder, device):
        Doing.at("open")
        return super().open(folder, device)


PASSES = {"decides": Decides(), "recovers": Recovers(), "converts": Converts()}


@pytest.fixture
def recipe(llama, text_file):
    def recipe(*passes):
        return Recipe(
            passes=passes,
            calibration=Text(text=str(text_file), samples=2, length=16),
            evaluation=Text(samples=2),
            settings=Settings(model=str(llama), device="cpu"),
        )

    return recipe


def test_what_passes_set_is_put_back_and_changes_no_result(recipe, doing, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    compress(recipe(Decides(), Recovers(), Converts()), "plain")
    before = state()
    capsys.readouterr()
    doing(change)
    compress(recipe(Decides(), Recovers(), Converts()), "out")
    assert state() == before
    out, error = capsys.readouterr()
    assert out == ""
    assert error.count("noise") == 3
    weights = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("plain", "out")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("step", "where"),
    [
        ("decides", "foresee"),
        ("decides", "work"),
        ("recovers", "work"),
        ("converts", "check"),
        ("converts", "work"),
        ("converts", "open"),
    ],
)
def test_a_pass_cannot_end_the_program(step, where, recipe, doing, tmp_path, capsys):
    def leave():
        change()
        sys.exit(0)

    before = state()
    doing(leave, where)
    with pytest.raises(PassError, match=rf"The pass '{step}' asked the program to end, by sys\.exit\(0\)") as caught:
        compress(recipe(PASSES[step]), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert state() == before
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("step", PASSES)
def test_evidence_may_be_numbers_of_other_libraries_and_nothing_else(step, recipe, doing, tmp_path):
    import numpy as np

    doing(lambda: None, evidence={"a": np.int64(3), "b": torch.ones(2), 5: (np.float32(0.5), np.bool_(True))})
    report = compress(recipe(PASSES[step]), tmp_path / "out")
    (evidence,) = report.passes[0].plain_evidence()
    assert evidence == {"a": 3, "b": [1.0, 1.0], "5": [0.5, True]}
    for wrong in ({"a": {1, 2}}, {"a": object()}, {"a": torch.ones(5000)}, [1], {(1, 2): 3}):
        doing(lambda: None, evidence=wrong)
        with pytest.raises(PassError, match=f"'{step}' gives as evidence"):
            compress(recipe(PASSES[step]), tmp_path / "again")


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("how", ["in place", "another"])
def test_a_pass_that_changes_the_model_instead_of_deciding_is_noticed(how, offload, recipe, tmp_path):
    given = recipe(Changes(how=how))
    with pytest.raises(PassError, match=r"'changes' changed the weight 'lm_head\.weight' of the model itself"):
        compress(replace(given, settings=replace(given.settings, offload=offload)), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", PASSES)
def test_an_interrupt_that_a_pass_swallows_ends_the_run_all_the_same(step, recipe, doing, tmp_path):
    def swallow():
        try:
            signal.raise_signal(signal.SIGINT)
        except BaseException:
            raise RuntimeError("what became of it") from None

    def forget():
        try:
            signal.raise_signal(signal.SIGINT)
        except BaseException:
            return

    for number, what in enumerate((swallow, forget)):
        doing(what)
        with pytest.raises(KeyboardInterrupt), interrupts.raised():
            compress(recipe(PASSES[step]), tmp_path / f"out-{number}")
        assert not (tmp_path / f"out-{number}").exists()

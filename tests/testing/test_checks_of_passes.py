"""The checks of passes accept those that are right, and no others."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import tiny
import torch
from folder_passes import Archive, Halve

from optimum_prune import Cuts, Decision, Depth, OptimumPruneError, Osscar, PrunePass, option
from optimum_prune import testing as conformance
from optimum_prune.builtin.prune.block_pruner import BlockPruner
from optimum_prune.errors import VerificationError
from optimum_prune.evaluation.runtime import TransformersRuntime

MLP = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize(
    "step",
    [Osscar(ratio=0.3), Osscar(ratio=0.25, allocation="global"), Depth(layers=2), BlockPruner(blocks=2)],
    ids=["osscar", "osscar-global", "depth", "block-pruner"],
)
def test_passes_that_are_right_pass_and_the_model_stays_as_it_is(name, step, tmp_path):
    model = tiny.model(name)
    before = {path: value.clone() for path, value in model.named_parameters()}
    outcome = conformance.check_pass(step, model, tmp_path)
    assert outcome.name == step.name
    assert outcome.cuts != Cuts()
    assert all(torch.equal(value, before[path]) for path, value in model.named_parameters())


@dataclass(frozen=True, kw_only=True)
class Faulty(PrunePass):
    """Leaves out the last layer, and has one fault."""

    name: ClassVar[str] = "faulty"
    fault: str = option("Which.", "")

    def foresee(self, shape):
        return shape.keep(range(len(shape.layers) - (2 if self.fault == "foresees fewer layers" else 1)))

    def decide(self, decoder, calibration):
        layers, weights, chance = len(decoder), {}, random.SystemRandom()
        kept = tuple(range(layers - 1))
        old = decoder.model.get_parameter(MLP).detach()
        if self.fault == "decides by chance":
            gone = chance.randrange(layers)
            kept = tuple(index for index in range(layers) if index != gone)
        if self.fault == "weights by chance":
            weights = {MLP: old * (1 + chance.random())}
        if self.fault == "changes a weight itself":
            old *= 1.5
        if self.fault == "changes a weight at last":
            yield Decision(Cuts(layers=kept))
            decoder.model.get_parameter(MLP).data *= 1.5
            return
        if self.fault == "weights that are not finite":
            weights = {MLP: old * torch.nan}
        if self.fault == "weights of another shape":
            weights = {MLP: old[:, :-1]}
        if self.fault == "cuts a layer twice":
            yield Decision(Cuts.along("channels", {0: (0, 1)}))
            yield Decision(Cuts.along("channels", {0: (0,)}))
        evidence = {"model": decoder.model} if self.fault == "evidence that is no plain data" else {}
        yield Decision(Cuts(layers=kept), weights, evidence)


FAULTS = {
    "decides by chance": "another way each time|not close",
    "weights by chance": "not close|not equal",
    "changes a weight itself": f"changed the weight '{MLP}' of the model itself",
    "changes a weight at last": f"changed the weight '{MLP}' of the model itself",
    "foresees fewer layers": "foresaw",
    "weights that are not finite": "not finite",
    "weights of another shape": "shape",
    "cuts a layer twice": "twice",
    "evidence that is no plain data": "evidence, at 'model', a LlamaForCausalLM, which JSON cannot hold",
}


def test_without_a_fault_it_passes(tmp_path):
    assert conformance.check_pass(Faulty(), tiny.model("llama"), tmp_path).cuts == Cuts(layers=(0, 1, 2, 3, 4))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_pass_with_a_fault_does_not_pass(fault, tmp_path):
    seen = None
    for attempt in range(8 if fault == "decides by chance" else 1):  # chance may agree once
        try:
            conformance.check_pass(Faulty(fault=fault), tiny.model("llama"), tmp_path / str(attempt))
        except (AssertionError, OptimumPruneError) as error:
            seen = error
            break
    with pytest.raises((AssertionError, OptimumPruneError), match=FAULTS[fault]):
        raise seen or RuntimeError("it passed")


# From folder to folder


@pytest.fixture
def target(tmp_path):
    folder = tmp_path / "target"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("step", [Halve(), Archive()], ids=["quantizer", "exporter"])
def test_conversions_that_are_right_pass(step, llama, target):
    done = conformance.check_conversion(step, llama, target)
    assert done.comparison.difference <= done.tolerance
    assert done.bytes > 0


class Forgetful(TransformersRuntime):
    """Generates as if it had seen the last token only."""

    def generate(self, tokens, count):
        return [super(Forgetful, self).generate(tokens[-1:], 1)[0] for _ in range(count)]


@dataclass(frozen=True, kw_only=True)
class WithoutCache(Archive):
    """Writes the weights once more, and loses its cache when it runs."""

    def open(self, folder, device):
        return Forgetful(super().open(folder, device).model)


@dataclass(frozen=True, kw_only=True)
class Refuses(Archive):
    """Takes nothing."""

    def check(self, spec):
        raise OptimumPruneError(f"It has {len(spec.shape.layers)} layers.")


@dataclass(frozen=True, kw_only=True)
class WithExample(Archive):
    """Writes the weights once more, and an example that does not run."""

    def convert(self, job):
        (job.target / "example.py").write_text("import no_such_module_anywhere\n")
        return super().convert(job)


@pytest.mark.parametrize(
    ("step", "error", "why"),
    [
        (Archive(fail="noise"), VerificationError, "differ .* tolerated"),
        (Archive(fail="raise"), OptimumPruneError, "the exporter broke"),
        (replace(Halve(), tolerance=0.0), VerificationError, "0 is tolerated"),
        (Halve(group_size=5), OptimumPruneError, "group"),
        (WithoutCache(), VerificationError, "generation goes wrong"),
        (Refuses(), OptimumPruneError, "It has 6 layers"),
        (WithExample(), AssertionError, "no_such_module_anywhere"),
    ],
    ids=["noise", "raises", "not within its tolerance", "groups", "no cache", "refuses", "example"],
)
def test_a_conversion_with_a_fault_does_not_pass(step, error, why, llama, target):
    with pytest.raises(error, match=why):
        conformance.check_conversion(step, llama, target)

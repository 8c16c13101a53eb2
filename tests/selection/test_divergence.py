from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import tiny
import torch
from divergences import divergence_by_hand

from optimum_prune import Calibration, Cuts, Decision, Decoder, Windows
from optimum_prune import testing as conformance
from optimum_prune.selection import divergence
from optimum_prune.selection.divergence import Divergence, split
from optimum_prune.surgery.config import sync_config
from optimum_prune.surgery.operation import carry_out

# Windows to fit to and windows to measure on


@pytest.mark.parametrize(("count", "fitted", "measured"), [(1, 1, 1), (2, 1, 1), (5, 4, 1), (8, 6, 2), (40, 36, 4)])
def test_a_few_windows_are_held_out_to_measure_on(count, fitted, measured, monkeypatch):
    monkeypatch.setattr(divergence, "LENGTH", 16)
    windows = tiny.windows(count, padded=True)
    to_fit, to_measure = split(windows)
    assert len(to_fit.tokens) == fitted
    assert len(to_measure.tokens) == measured
    assert torch.equal(to_fit.tokens, windows.tokens[:fitted])
    assert torch.equal(to_measure.tokens, windows.tokens[-measured:, :16])
    assert torch.equal(to_fit.mask, windows.mask[:fitted])
    assert torch.equal(to_measure.mask, windows.mask[-measured:, :16])
    assert to_fit.source == windows.source


# What a change costs the model


def costs(decoder: Decoder, windows: Windows, index: int, decisions: Sequence[Decision]) -> list[float]:
    """As `Divergence` has them, for decisions about one layer."""
    calibration = Calibration(windows)
    diverging = Divergence(decoder, calibration)
    for visit in calibration.walk(decoder, ""):
        if visit.index == index:
            found = diverging.of(visit, decisions)
    return found


def changed(decoder: Decoder, decision: Decision) -> Decoder:
    other = copy.deepcopy(decoder)
    carry_out(other, decision)
    sync_config(other)
    return other


SOME = ("llama", "llama-tied", "gemma2", "gemma3-vision", "cohere2", "gpt2", "gpt_neox", "opt", "opt-post-norm")


def decisions_about(index: int, decoder: Decoder) -> list[Decision]:
    """Cuts of channels, of heads where they can be cut, of experts, and new weights alone."""
    layer, shape = decoder.layer(index), decoder.shape().layers[index]
    halves = {name: shape.units(name) // 2 for name in ("channels", "experts")}
    every_other = conformance.cuts_to(decoder, conformance.at_random(1), halves)
    decisions = [Decision(Cuts(units={(index, name): kept for name, kept in every_other.of(index)}))]
    if "heads" in layer.axes:
        decisions.append(Decision(Cuts.along("heads", {index: (1,)})))
    if "channels" in layer.axes:
        linear = layer.linear_of(layer.axes["channels"].output)
        weights = {layer.axes["channels"].output: linear.module.weight.detach().roll(1, -1)}
        decisions.append(Decision(weights=layer.named(weights)))
    return decisions


@pytest.mark.parametrize("name", [*SOME, *tiny.MIXTURES])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("index", [1, 4])
def test_a_decision_costs_what_the_predictions_of_the_model_that_is_really_changed_diverge(
    name, decoder, padded, index
):
    windows = tiny.windows(3, padded=padded)
    decisions = decisions_about(index, decoder)
    expected = [divergence_by_hand(decoder, changed(decoder, each), windows) for each in decisions]
    found = costs(decoder, windows, index, decisions)
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert min(found) > 1e-4


@pytest.mark.parametrize("name", [*SOME, "mixtral"])
def test_a_decision_that_changes_nothing_costs_nothing(name, decoder):
    shape = decoder.shape().layers[2]
    whole = Cuts.along("channels", {2: tuple(range(shape.units("channels")))}) if shape.units("channels") else Cuts()
    before = {key: value.clone() for key, value in decoder.model.state_dict().items()}
    config = decoder.model.config.to_dict()
    assert costs(decoder, tiny.windows(3), 2, [Decision(), Decision(whole)]) == pytest.approx([0, 0], abs=1e-6)
    costs(decoder, tiny.windows(3), 2, decisions_about(2, decoder))
    assert all(torch.equal(value, before[key]) for key, value in decoder.model.state_dict().items())
    assert decoder.model.config.to_dict() == config

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from torch.testing import assert_close

from optimum_prune import Calibration, Cuts, Decision, Decoder
from optimum_prune import testing as conformance
from optimum_prune.anatomy.shape import ATTENTION, FEED_FORWARD
from optimum_prune.refit import rebuilding
from optimum_prune.refit.narrowing import Narrowing
from optimum_prune.refit.rebuilding import pool
from optimum_prune.refit.sequential import Repairs, Wanted, brought_to
from optimum_prune.selection.measures import cuts_of
from optimum_prune.surgery.config import sync_config
from optimum_prune.surgery.operation import carry_out, changed_layer, sharing_copy

PLAIN = Repairs(Narrowing(0.01))
EVERYTHING = Repairs(Narrowing(0.2, 0.25), reading=0.5)


def made(decoder: Decoder, wanted: Wanted, repairs: Repairs, windows) -> tuple[Decoder, list[Decision]]:
    """A copy of a model brought to sizes, and the decisions."""
    small = replace(decoder, model=sharing_copy(decoder.model).requires_grad_(False))
    decisions = []
    for decision in brought_to(small, decoder, Calibration(windows), wanted, repairs):
        carry_out(small, decision)
        decisions.append(decision)
    sync_config(small)
    return small, decisions


def mixed(decoder: Decoder) -> Wanted:
    """A layer gone, another without attention, others narrower."""
    layers = list(decoder.shape().layers)
    narrow = [
        layer.narrowed(
            {axis.name: axis.fewer[len(axis.fewer) // 2] for axis in layer.axes if axis.inner and axis.fewer}
        )
        for layer in layers
    ]
    lacking = changed_layer(decoder, Decision(Cuts(blocks={1: (FEED_FORWARD,)})), 1)
    attention = layers[1].parameters - sum(each.numel() for each in lacking.parameters())
    return Wanted([narrow[0], layers[1].without(ATTENTION, attention), layers[2], None, narrow[4], layers[5]])


@pytest.mark.parametrize("name", tiny.SOME)
@pytest.mark.parametrize("repairs", [PLAIN, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_a_model_gets_the_sizes_that_are_wanted_and_reloads(name, repairs, padded, decoder, tmp_path):
    windows = tiny.windows(8, padded=padded)
    before = {key: value.clone() for key, value in decoder.model.state_dict().items()}
    wanted = mixed(decoder)
    small, _ = made(decoder, wanted, repairs, windows)
    for key, value in decoder.model.state_dict().items():
        assert torch.equal(value, before[key]), "the dense model stays"
    left = [layer for layer in wanted.layers if layer is not None]
    assert len(small) == len(left)
    for layer, shape in zip(small.layers, left, strict=True):
        assert layer.blocks == shape.blocks
        for axis in shape.axes:
            if axis.inner:
                assert layer.axes[axis.name].units == axis.units
    planned = sum(layer.parameters for layer in left) + decoder.shape().rest.parameters
    norm = 2 * decoder.config.hidden_size  # that in front of attention that is gone, which nothing reads
    assert planned - norm <= small.shape().parameters <= planned
    if not padded:
        conformance.reloads_exactly(small.model, tmp_path, windows)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_where_everything_stays_nothing_changes(name, decoder):
    small, decisions = made(decoder, Wanted(decoder.shape().layers), EVERYTHING, tiny.windows(4))
    assert [decision.weights for decision in decisions] == [{}]
    for key, value in small.model.state_dict().items():
        assert torch.equal(value, decoder.model.state_dict()[key])


@pytest.mark.parametrize(
    ("name", "axis"), [("llama", "heads"), ("qwen3", "heads"), ("llama", "channels"), ("opt", "channels")]
)
def test_with_nothing_but_elimination_it_is_osscar(name, axis, decoder):
    from optimum_prune import Osscar

    windows = tiny.windows(8)
    step = Osscar(ratio=0.5) if axis == "channels" else Osscar(head_ratio=0.5)
    expected = replace(decoder, model=sharing_copy(decoder.model).requires_grad_(False))
    for decision in step.decide(expected, Calibration(windows)):
        carry_out(expected, decision)
    layers = [layer.narrowed({axis: layer.units(axis) // 2}) for layer in decoder.shape().layers]
    found, _ = made(decoder, Wanted(layers), PLAIN, windows)
    for key, value in found.model.state_dict().items():
        assert_close(value, expected.model.state_dict()[key])


def lost(decoder: Decoder, small: Decoder, windows) -> float:
    """How far the hidden states behind the last layer are from those of the dense model."""
    with torch.no_grad():
        states = [each.model.base_model(input_ids=windows.tokens).last_hidden_state for each in (decoder, small)]
    return ((states[1] - states[0]).norm() / states[0].norm()).item()


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "phi3"])
@pytest.mark.parametrize(
    "better", [Repairs(Narrowing(0.01, 0.5)), Repairs(Narrowing(0.01), reading=0.8)], ids=["moved", "reading"]
)
def test_each_repair_brings_hidden_states_nearer_to_those_of_the_dense_model(name, better, decoder):
    windows = tiny.windows(40)
    wanted = Wanted([layer.narrowed({"channels": 24}) for layer in decoder.shape().layers])
    plain, repaired = (made(decoder, wanted, repairs, windows)[0] for repairs in (PLAIN, better))
    assert lost(decoder, repaired, windows) < lost(decoder, plain, windows)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "phi3"])
def test_an_ffn_in_front_of_a_gap_is_better_with_the_units_of_those_that_go(name, decoder):
    windows = tiny.windows(40)
    layers = list(decoder.shape().layers)
    wanted = Wanted([layers[0], layers[1], None, None, *layers[4:]])
    rebuilt, own = (made(decoder, wanted, replace(PLAIN, rebuild=each), windows)[0] for each in (True, False))
    assert rebuilt.shape() == own.shape()
    assert lost(decoder, rebuilt, windows) < lost(decoder, own, windows)


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "gemma3"])
def test_a_pool_computes_what_the_ffns_compute_together_from_the_same_hidden_states(name, decoder, monkeypatch):
    """With all of its units, a widened FFN puts out the sum of what the others put out if each were in its place."""
    monkeypatch.setattr(rebuilding, "AMONG", 3)
    windows = tiny.windows(3)
    visit = next(each for each in Calibration(windows).walk(decoder, "") if each.index == 1)
    found = pool(decoder, decoder.hidden(), visit, [2, 3])
    if name == "gemma3":  # it has norms behind its blocks
        assert found is None
        return
    assert found is not None
    outputs = []
    for layer in (decoder.layer(1), decoder.layer(2), decoder.layer(3), found.visit.layer):
        other = replace(visit.layer, module=layer.module)
        heard = []
        handle = other.part(other.modules_of(FEED_FORWARD)[-1]).register_forward_hook(
            lambda _, __, out, heard=heard: heard.append(out)
        )
        batch, hidden = visit.stream[0]
        own = decoder.layer(1).module.self_attn
        before, other.module.self_attn = other.module.self_attn, own  # the same hidden states in front of each FFN
        first, other.module.input_layernorm = other.module.input_layernorm, decoder.layer(1).module.input_layernorm
        batch.run(other.module, 1, hidden)
        other.module.self_attn, other.module.input_layernorm = before, first
        handle.remove()
        bias = getattr(layer.module.mlp.down_proj, "bias", None)
        outputs.append(heard[0] if bias is None else heard[0] - bias)
    assert_close(outputs[3], outputs[0] + outputs[1] + outputs[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_of_a_longer_gap_twice_as_many_units_are_in_the_pool_those_that_add_most(name, decoder, monkeypatch):
    windows = tiny.windows(3)
    visit = next(each for each in Calibration(windows).walk(decoder, "") if each.index == 1)
    some = pool(decoder, decoder.hidden(), visit, [2, 3])
    monkeypatch.setattr(rebuilding, "AMONG", 3)
    every = pool(decoder, decoder.hidden(), visit, [2, 3])
    own, output = some.own, decoder.layer(1).output_of(FEED_FORWARD).rpartition(".")[0]
    assert (some.axis.units, every.axis.units) == (2 * own, 3 * own)
    inputs = torch.cat([batch.flatten(0, -2) for batch in every.visit.inputs_of(every.axis.output)]).double()
    weight = every.visit.layer.part(output).weight.double()
    added = torch.stack([(inputs[:, [unit]] @ weight[:, [unit]].T).norm() for unit in range(3 * own)])
    best = added.topk(2 * own).indices.sort().values
    assert_close(some.visit.layer.part(output).weight, every.visit.layer.part(output).weight[:, best])
    assert some.origins == [(1 + unit // own, unit % own) for unit in best.tolist()]


def test_gaps_and_cuts_are_read_off_what_is_wanted():
    from optimum_prune.anatomy.shape import LayerShape, Shape

    whole, lacking = LayerShape(), LayerShape(blocks=(FEED_FORWARD,))
    wanted, shape = Wanted([whole, None, None, lacking, whole, None]), Shape((whole,) * 6)
    assert [wanted.gap_behind(index) for index in (0, 3, 4)] == [range(1, 3), range(4, 4), range(5, 6)]
    assert cuts_of(wanted.layers, shape) == Cuts(layers=(0, 3, 4), blocks={3: (FEED_FORWARD,)})
    assert [wanted.changed_before(index, shape) for index in (0, 1, 2)] == [False, False, True]

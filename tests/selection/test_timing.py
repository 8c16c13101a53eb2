from __future__ import annotations

import copy

import pytest
import tiny
import torch

from optimum_prune.anatomy.shape import ATTENTION, LayerShape
from optimum_prune.selection.allowed import Allowed
from optimum_prune.selection.measures import Times, _between, whole
from optimum_prune.selection.timing import Stopwatch, of_sizes
from optimum_prune.surgery.operation import copy_of


def narrowed(index: int, layer: LayerShape, allowed: Allowed) -> LayerShape | None:
    """Each third layer goes, one lacks its attention, and the others are narrower the further behind they are."""
    if index % 3 == 2:
        return None
    sizes = {name: each[index % len(each)] for name, each in allowed.seen(index, layer).items()}
    left = layer.narrowed(sizes)
    return left.without(ATTENTION, 0) if index == 1 and len(layer.blocks) > 1 else left


@pytest.mark.parametrize("name", [*tiny.SOME, "qwen3_moe", "gpt2", "gemma3"])
def test_a_model_to_be_timed_has_the_sizes_that_are_asked_for(name, decoder):
    allowed, before = Allowed("budget", multiple_of=4), copy.deepcopy(decoder.model.state_dict())
    wanted = [narrowed(index, layer, allowed) for index, layer in enumerate(decoder.shape().layers)]
    made = of_sizes(decoder, wanted)
    left = [layer for layer in wanted if layer is not None]
    assert len(made) == len(left)
    for layer, asked in zip(made.shape().layers, left, strict=True):
        assert layer.blocks == asked.blocks
        assert {axis.name: axis.units for axis in layer.axes} == {axis.name: axis.units for axis in asked.axes}
    tokens = tiny.windows(2).tokens
    past = made.model(input_ids=tokens, use_cache=True).past_key_values
    step = made.model(input_ids=tokens[:, -1:], past_key_values=past, use_cache=True)
    assert step.logits.isfinite().all()
    after = decoder.model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


@pytest.mark.parametrize("name", ["llama"])
@pytest.mark.parametrize("step", ["prefill", "decode"])
def test_a_table_tells_the_time_of_whole_models(name, step, decoder, monkeypatch):
    """Where a model's time is that of its parameters, whatever the table is made of says the same of any other model."""
    monkeypatch.setattr(
        Stopwatch, "beside", lambda self, other: (decoder.shape().parameters, ratio_of(other, self.dense))
    )
    allowed = Allowed("budget", multiple_of=4)
    shape = decoder.shape()
    table = Stopwatch(decoder, step, 1, 16).table(allowed)
    assert whole(table, shape.layers, shape.rest) == pytest.approx(shape.parameters)
    width = shape.layers[0].units("channels")
    wanted = [layer.narrowed({"channels": width // 2}) if index else layer for index, layer in enumerate(shape.layers)]
    assert whole(table, wanted, shape.rest) == pytest.approx(of_sizes(decoder, wanted).shape().parameters, rel=1e-6)
    wanted[3] = None
    assert whole(table, wanted, shape.rest) == pytest.approx(of_sizes(decoder, wanted).shape().parameters, rel=1e-6)
    assert Times.read(table.told(), shape).told() == table.told()


def ratio_of(other, dense) -> float:
    return other.shape().parameters / dense.shape().parameters


@pytest.mark.parametrize("name", ["llama"])
@pytest.mark.parametrize("step", ["prefill", "decode"])
def test_two_models_are_timed_in_turn(name, step, decoder, monkeypatch):
    monkeypatch.setattr("optimum_prune.selection.timing.LONG_ENOUGH", 0.0)
    turns = []
    for each in (decoder, other := of_sizes(decoder, [*decoder.shape().layers[:3], None, None, None])):
        each.model.register_forward_pre_hook(lambda module, _: turns.append(module))
    seconds, ratio = Stopwatch(decoder, step, 2, 8).beside(other)
    assert seconds > 0
    assert ratio > 0
    measured = turns[2:] if step == "decode" else turns
    per_turn = 4 if step == "decode" else 1
    order = [decoder.model if place // per_turn % 2 == 0 else other.model for place in range(len(measured))]
    assert all(one is two for one, two in zip(measured, order, strict=True))


def test_times_beyond_what_was_tried_go_on_as_they_led_there():
    layer = LayerShape()
    times = Times(1.0, 2.0, [layer], {"channels": {0.5: 0.4, 0.75: 0.2}})
    known = times.saved["channels"]
    assert [_between(known, share) for share in (1.0, 0.875, 0.75, 0.625, 0.5, 0.25)] == pytest.approx(
        [0.0, 0.1, 0.2, 0.3, 0.4, 0.6]
    )
    assert _between({}, 0.3) == 0.0


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_each_turn_writes_behind_as_many_tokens(name, decoder, monkeypatch):
    """A cache that goes on growing would time other contexts, and lead out of what a model with learned positions takes."""
    other, lengths = copy_of(decoder), []
    forward = type(decoder.model).forward

    def watched(self, *args, past_key_values=None, **kwargs):
        if past_key_values is not None:
            lengths.append(past_key_values.get_seq_length())
        return forward(self, *args, past_key_values=past_key_values, **kwargs)

    monkeypatch.setattr(type(decoder.model), "forward", watched)
    Stopwatch(decoder, "decode", 2, 16).beside(other)
    assert set(lengths) == {16, 17, 18, 19}
    assert len(lengths) >= 2 * 4 * 7

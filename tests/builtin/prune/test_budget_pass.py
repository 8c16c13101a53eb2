from __future__ import annotations

import copy
import json
import math

import pytest
import tiny
import torch

from optimum_prune import Calibration, Decoder
from optimum_prune import testing as conformance
from optimum_prune.anatomy.shape import ATTENTION
from optimum_prune.builtin.prune.budget import Budget
from optimum_prune.errors import RecipeError
from optimum_prune.hooks.plugins import Plugins
from optimum_prune.selection.goals import NEAR
from optimum_prune.selection.measures import Times, Weights, whole
from optimum_prune.selection.shapes import PriceList
from optimum_prune.selection.timing import Stopwatch

WINDOWS = tiny.windows(10)


def pruned(step: Budget, decoder: Decoder, plugins: Plugins):
    small = Decoder(copy.deepcopy(decoder.model), decoder.family)
    return small, conformance.pruned(step, small, WINDOWS, plugins)


def considered(outcome) -> list[dict]:
    return outcome.evidence[0]["considered"]


@pytest.mark.parametrize("name", [*tiny.SOME, "qwen3_moe"])
@pytest.mark.parametrize("form", ["heterogeneous", "stock"])
def test_a_model_of_the_size_comes_out_and_reloads(name, form, decoder, plugins, tmp_path):
    step = Budget(params=0.8, form=form, multiple_of=4)
    before = decoder.shape().parameters
    if form == "stock" and not decoder.shape().even:
        with pytest.raises(RecipeError, match="those of this model are not"):
            step.foresee(decoder.shape())
        return
    small, outcome = pruned(step, decoder, plugins)
    left = small.shape().parameters / before
    assert left <= 0.8 + (0 if form == "heterogeneous" else 0.05)
    assert left >= 0.72
    assert considered(outcome)
    conformance.reloads_exactly(small.model, tmp_path, WINDOWS)
    if form == "stock":
        assert len(set(small.shape().layers)) == 1
        assert getattr(small.model.config, "pruned", None) is None


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_it_keeps_the_rules_of_passes(name, decoder, plugins, tmp_path):
    conformance.check_pass(Budget(params=0.8, multiple_of=4), decoder.model, tmp_path)


@pytest.mark.parametrize("name", ["llama"])
def test_the_fewer_parameters_stay_the_more_is_lost_and_prices_tell(name, decoder, plugins):
    tellings = []
    for params in (0.9, 0.7):
        _, outcome = pruned(Budget(params=params, multiple_of=4, finalists=1), decoder, plugins)
        tellings.append(considered(outcome)[0]["nats_per_token_by_prices"])
    assert 0 < tellings[0] < tellings[1]
    front = outcome.evidence[0]["frontier"]
    assert front[0] == [1.0, 0.0]
    assert [cost for _, cost in front] == sorted(cost for _, cost in front)


@pytest.mark.parametrize("name", ["llama"])
@pytest.mark.parametrize("allow", [("layers",), ("channels",), ("heads", "blocks")], ids=str)
def test_nothing_becomes_less_but_what_is_allowed(name, allow, decoder, plugins):
    before = decoder.shape()
    small, _ = pruned(Budget(params=0.9, allow=allow, multiple_of=4), decoder, plugins)
    after = small.shape()
    found = set()
    if len(after.layers) < len(before.layers):
        found.add("layers")
    found |= {"blocks" for layer in after.layers if ATTENTION not in layer.blocks}
    found |= {
        axis.name for layer in after.layers for axis in layer.axes if axis.units < before.layers[0].units(axis.name)
    }
    assert found
    assert found <= set(allow)


@pytest.mark.parametrize("name", ["llama"])
def test_protected_layers_stay_as_wide_as_they_are(name, decoder, plugins):
    before = decoder.shape().layers[0]
    small, _ = pruned(
        Budget(params=0.85, protect=(0, 2, 5), allow=("channels", "heads"), multiple_of=4), decoder, plugins
    )
    after = small.shape().layers
    assert [after[index] == before for index in range(6)] == [True, False, True, False, False, True] or sum(
        layer != before for layer in after
    ) >= 2
    assert all(after[index] == before for index in (0, 2, 5))


@pytest.mark.parametrize("name", ["llama"])
def test_of_several_that_are_made_the_one_that_loses_least_is_left(name, decoder, plugins):
    _, outcome = pruned(Budget(params=0.7, finalists=3, multiple_of=4), decoder, plugins)
    found = considered(outcome)
    assert len(found) > 1
    means = [sum(each["nats_per_token"].values()) / len(each["nats_per_token"]) for each in found]
    assert [each.get("best", False) for each in found] == [mean == min(means) for mean in means]
    best = next(each for each in found if each.get("best"))
    assert outcome.evidence[0]["chosen"] == best["sizes"]
    assert set(best["nats_per_token"]) == {"the text given", "the model's own", "a passage twice"}
    assert outcome.notes
    json.dumps(outcome.to_plain())


@pytest.mark.parametrize("name", ["llama"])
def test_without_text_of_its_own_only_the_given_text_counts(name, decoder, plugins):
    _, outcome = pruned(Budget(params=0.7, finalists=2, own_text=0.0, multiple_of=4), decoder, plugins)
    assert all(set(each["nats_per_token"]) == {"the text given", "a passage twice"} for each in considered(outcome))


@pytest.mark.parametrize("name", ["llama"])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"params": 0.1}, "at best"),
        ({"params": 0.8, "allow": ("feathers",)}, "'feathers'"),
        ({"params": 0.3, "allow": ("channels",)}, "or allow more to go"),
        ({"params": 0.8, "protect": (9,)}, "the layer 9"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_before_anything_runs(name, options, said, decoder):
    with pytest.raises(RecipeError, match=said):
        Budget(**options).foresee(decoder.shape())


@pytest.mark.parametrize("options", [{"protect": (1,)}, {"allow": ("blocks",)}], ids=str)
def test_a_stock_form_takes_nothing_that_makes_layers_differ(options):
    with pytest.raises(RecipeError, match="stock"):
        Budget(params=0.9, form="stock", **options)


@pytest.mark.parametrize("name", ["llama"])
@pytest.mark.parametrize("bytes", ["0.8", "0.18MB"])
def test_weights_take_no_more_bytes_than_may_be(name, bytes, decoder, plugins):
    dense = saved_bytes(decoder)
    small, outcome = pruned(Budget(bytes=bytes, multiple_of=4, finalists=1), decoder, plugins)
    limit = 0.8 * dense if bytes == "0.8" else 180_000
    assert 0.9 * limit <= saved_bytes(small) <= limit
    assert considered(outcome)[0]["bytes"] == saved_bytes(small)


def saved_bytes(decoder: Decoder) -> int:
    """Of all weights, each once."""
    return sum(value.numel() * value.element_size() for value in decoder.model.parameters())


@pytest.mark.parametrize("name", ["llama"])
@pytest.mark.parametrize("form", ["heterogeneous", "stock"])
def test_what_a_served_model_takes_is_no_more_than_may_be(name, form, decoder, plugins):
    step = Budget(serving_memory="0.7", batch=8, context=64, multiple_of=4, finalists=1, form=form)
    small, outcome = pruned(step, decoder, plugins)
    before, after = served_bytes(decoder, 8, 64), served_bytes(small, 8, 64)
    assert considered(outcome)[0]["serving_memory"] == after
    assert after == pytest.approx(0.7 * before, rel=0.06)
    assert sum(layer.units("heads") for layer in small.shape().layers) < sum(
        layer.units("heads") for layer in decoder.shape().layers
    )


def served_bytes(decoder: Decoder, batch: int, context: int) -> int:
    """Weights and what the model keeps of so many tokens."""
    tokens = torch.zeros(batch, context, dtype=torch.long)
    kept = decoder.model(input_ids=tokens, use_cache=True).past_key_values
    caches = (each for layer in kept.layers if layer.is_initialized for each in (layer.keys, layer.values))
    return saved_bytes(decoder) + sum(each.numel() * each.element_size() for each in caches)


@pytest.mark.parametrize("name", ["llama"])
@pytest.mark.parametrize("step", ["prefill_speed", "decode_speed"])
def test_a_model_is_to_be_so_much_faster_by_a_table_of_times(name, step, decoder, plugins, tmp_path):
    """Of a layer's ten milliseconds, the FFN takes six; a sixth of it one."""
    table = {"rest": 0.02, "layer": 0.01, "saved": {"channels": {"0.166667": 0.005}}, "saved_without": {}}
    (tmp_path / "times.json").write_text(json.dumps(table))
    options = {step: 1.25, "speed_table": str(tmp_path / "times.json"), "allow": ("channels", "layers")}
    small, outcome = pruned(Budget(**options, multiple_of=4, finalists=1), decoder, plugins)
    units = [layer.units("channels") for layer in small.shape().layers]
    time = 0.02 + sum(0.01 - 0.006 * (1 - width / 64) for width in units)
    assert time <= 0.08 / 1.25 + 1e-9
    assert time >= 0.08 / 1.25 - 0.01
    assert considered(outcome)[0][step] == pytest.approx(0.08 / time, rel=1e-3)
    assert outcome.evidence[0]["times"] == table


@pytest.mark.parametrize("name", ["llama"])
def test_what_is_measured_to_be_too_slow_is_asked_for_again(name, decoder, plugins, monkeypatch):
    """Where the table believes in twice as much as there is to gain."""
    shapes = decoder.shape().layers
    told = {"rest": 0.02, "layer": 0.01, "saved": {"channels": {"0.166667": 0.008}}, "saved_without": {}}
    truth = Times(0.02, 0.01, shapes, {"channels": {1 / 6: 0.005}})
    asked = []

    def of(_: Stopwatch, choice) -> float:
        asked.append(choice)
        return whole(truth, choice, decoder.shape().rest) / 0.08

    monkeypatch.setattr(Stopwatch, "table", lambda *_: Times.read(told, decoder.shape()))
    monkeypatch.setattr(Stopwatch, "of", of)
    step = Budget(decode_speed=1.2, context=16, allow=("channels",), multiple_of=1, finalists=1)
    small, outcome = pruned(step, decoder, plugins)
    assert len(asked) > 1
    assert whole(truth, small.shape().layers, decoder.shape().rest) == pytest.approx(0.08 / 1.2, rel=NEAR)
    assert considered(outcome)[0]["decode_speed"] == pytest.approx(1.2, rel=NEAR)


@pytest.mark.parametrize("name", ["llama"])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bytes": "900MB"}, "so it is already"),
        ({"bytes": "1KB"}, "0.001 MB of weights, and by what may go here .* it can leave"),
        ({"serving_memory": "1KB"}, "weights and cache"),
        ({"decode_speed": 1.1, "context": 10**6}, "takes .* tokens at most"),
    ],
    ids=str,
)
def test_what_only_the_model_can_tell_is_refused_before_it_is_run_for_long(name, options, said, decoder):
    step = Budget(**options)
    step.foresee(decoder.shape())
    with pytest.raises(RecipeError, match=said):
        next(step.decide(decoder, Calibration(WINDOWS)))


@pytest.mark.parametrize("name", ["llama"])
@pytest.mark.parametrize(
    ("speed", "table", "said"),
    [
        (50.0, "TABLE", "can decode .* times as fast at best"),
        (1.1, "EMPTY", "does not have the times"),
        (1.1, "MISSING", "does not exist"),
        (1.1, "ZEROS", "does not have the times"),
        (1.1, "INFINITE", "does not have the times"),
        (1.1, "WORDS", "does not have the times"),
        (1.1, "STRANGE", "does not have the times"),
        (1.1, "SHARES", "does not have the times"),
    ],
)
def test_what_a_table_tells_is_refused_before_there_is_a_model(
    name, speed, table, said, decoder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    times = {"rest": 0.02, "layer": 0.01, "saved": {"channels": {"0.5": 0.005}}, "saved_without": {}}
    wrong = {
        "ZEROS": {"layer": 0},
        "INFINITE": {"rest": math.inf},
        "WORDS": {"layer": "0.01"},
        "STRANGE": {"saved": {"wings": {"0.5": 0.005}}},
        "SHARES": {"saved": {"channels": {"-3": 0.005}}},
    }
    for file, changes in {"TABLE": {}, **wrong}.items():
        (tmp_path / file).write_text(json.dumps(times | changes))
    (tmp_path / "EMPTY").write_text("{}")
    with pytest.raises(RecipeError, match=said):
        Budget(decode_speed=speed, speed_table=table).foresee(decoder.shape())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "is not told how small"),
        ({"params": 0.8, "bytes": "0.8"}, "params and bytes"),
        ({"params": 0.8, "context": 5}, "Leave context out"),
        ({"params": 0.8, "speed_table": "x"}, "Leave speed_table out"),
        ({"bytes": "a lot"}, "is no size"),
        ({"decode_speed": 0.9}, "above 1"),
    ],
    ids=str,
)
def test_one_limit_is_given_and_what_belongs_to_it(options, said):
    with pytest.raises(RecipeError, match=said):
        Budget(**options)


@pytest.mark.parametrize("name", ["llama"])
def test_even_choices_are_near_the_size_and_alike(name, decoder):
    from optimum_prune.refit.narrowing import Narrowing
    from optimum_prune.refit.pricing import priced
    from optimum_prune.selection.allowed import Allowed

    calibration = Calibration(WINDOWS)
    allowed = Allowed("budget", multiple_of=4, even=True)
    prices = priced(decoder, calibration, calibration, allowed, Narrowing(0.05))
    shape = decoder.shape()
    wanted = 0.8 * shape.parameters
    pricelist = PriceList(prices, shape.rest, Weights())
    found = pricelist.even(wanted, 5)
    assert 2 <= len(found) <= 5
    assert [cost for _, cost in found] == sorted(cost for _, cost in found)
    for choice, cost in found:
        stay = [layer for layer in choice if layer is not None]
        assert len(set(stay)) == 1
        assert choice[0] is not None
        assert cost > 0
        assert abs(pricelist.size(choice) - wanted) < 0.06 * wanted


@pytest.mark.parametrize("name", ["llama"])
def test_the_price_of_an_axis_is_what_the_model_loses(name, decoder):
    """The size at which an axis is measured costs what the divergence of the narrowed model is, computed by hand."""
    from divergences import divergence_by_hand

    from optimum_prune.refit.narrowing import Narrowing
    from optimum_prune.refit.pricing import STRIDE, priced
    from optimum_prune.selection.allowed import Allowed
    from optimum_prune.surgery.config import sync_config
    from optimum_prune.surgery.operation import carry_out

    calibration, allowed = Calibration(WINDOWS), Allowed("budget", ("channels",), multiple_of=4)
    prices = priced(decoder, calibration, calibration, allowed, Narrowing(0.05))
    sizes = allowed.seen(2, decoder.shape().layers[2])["channels"]
    middle = sizes[len(sizes) // 2]
    visit = next(each for each in calibration.walk(decoder, "") if each.index == 2)
    (decision,) = Narrowing(0.05).decisions(visit, "channels", (middle,))
    small = Decoder(copy.deepcopy(decoder.model), decoder.family)
    carry_out(small, decision)
    sync_config(small)
    expected = divergence_by_hand(decoder, small, WINDOWS, STRIDE)
    assert prices[2].curves["channels"].at(middle) == pytest.approx(expected, rel=1e-3)

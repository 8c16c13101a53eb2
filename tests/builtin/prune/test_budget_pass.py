from __future__ import annotations

import copy
import json

import pytest
import tiny

from optimum_prune import Calibration, Decoder
from optimum_prune import testing as conformance
from optimum_prune.anatomy.shape import ATTENTION
from optimum_prune.builtin.prune.budget import Budget
from optimum_prune.errors import RecipeError
from optimum_prune.hooks.plugins import Plugins
from optimum_prune.selection.shapes import even_choices, size_of

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
    assert set(best["nats_per_token"]) == {"the text given", "the model's own"}
    assert outcome.notes
    json.dumps(outcome.to_plain())


@pytest.mark.parametrize("name", ["llama"])
def test_without_text_of_its_own_only_the_given_text_counts(name, decoder, plugins):
    _, outcome = pruned(Budget(params=0.7, finalists=2, own_text=0.0, multiple_of=4), decoder, plugins)
    assert all(set(each["nats_per_token"]) == {"the text given"} for each in considered(outcome))


@pytest.mark.parametrize("name", ["llama"])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"params": 0.1}, "at least"),
        ({"params": 0.8, "allow": ("feathers",)}, "'feathers'"),
        ({"params": 0.3, "allow": ("channels",)}, "or allow more"),
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
def test_even_choices_are_near_the_size_and_alike(name, decoder):
    from optimum_prune.refit.narrowing import Narrowing
    from optimum_prune.refit.pricing import priced
    from optimum_prune.selection.allowed import Allowed

    calibration = Calibration(WINDOWS)
    allowed = Allowed("budget", multiple_of=4, even=True)
    prices = priced(decoder, calibration, calibration, allowed, Narrowing(0.05))
    shape = decoder.shape()
    wanted = 0.8 * sum(layer.parameters for layer in shape.layers)
    found = even_choices(prices, wanted, 5)
    assert 2 <= len(found) <= 5
    assert [cost for _, cost in found] == sorted(cost for _, cost in found)
    for choice, cost in found:
        stay = [layer for layer in choice if layer is not None]
        assert len(set(stay)) == 1
        assert choice[0] is not None
        assert cost > 0
        assert abs(sum(map(size_of, choice)) - wanted) < 0.06 * wanted


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

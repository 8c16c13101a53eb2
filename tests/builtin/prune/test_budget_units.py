"""What `budget` makes less besides layers, heads and channels, and what else it measures by."""

from __future__ import annotations

import copy
import json

import pytest
import tiny
import torch

from optimum_prune import Calibration, Decoder
from optimum_prune import testing as conformance
from optimum_prune.builtin.prune.budget import Budget
from optimum_prune.errors import RecipeError, TextError
from optimum_prune.hooks.plugins import Plugins
from optimum_prune.run.pruning import prune

WINDOWS = tiny.windows(10)


def pruned(step: Budget, decoder: Decoder, plugins: Plugins, calibration: Calibration | None = None):
    small = Decoder(copy.deepcopy(decoder.model), decoder.family)
    return small, prune(step, small, calibration or Calibration(WINDOWS), plugins)


def units(decoder: Decoder, name: str) -> list[int]:
    return [layer.units(name) for layer in decoder.shape().layers]


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_whole_experts_go_where_they_cost_least(name, decoder, plugins, tmp_path):
    step = Budget(params=0.94, allow=("whole_experts",), multiple_of=4, finalists=1)
    step.foresee(decoder.shape())
    small, outcome = pruned(step, decoder, plugins)
    before, after = units(decoder, "whole_experts"), units(small, "whole_experts")
    assert sum(after) < sum(before)
    assert units(small, "experts") == units(decoder, "experts")
    assert small.shape().parameters <= 0.94 * decoder.shape().parameters
    prices = outcome.evidence[0]["nats_per_token_alone"]
    narrowed = [index for index, layer in enumerate(decoder.shape().layers) if layer.units("whole_experts")]
    assert all(prices[index]["experts"][before[index]] == 0 for index in narrowed)
    assert all(max(prices[index]["experts"].values()) > 0 for index in narrowed)
    conformance.reloads_exactly(small.model, tmp_path, WINDOWS)


@pytest.mark.parametrize("name", ["qwen3_moe"])
def test_the_price_of_fewer_experts_is_what_the_model_loses(name, decoder):
    from divergences import divergence_by_hand

    from optimum_prune.refit.narrowing import Narrowing
    from optimum_prune.refit.pricing import STRIDE, priced
    from optimum_prune.selection.allowed import Allowed
    from optimum_prune.selection.mixtures import best_members
    from optimum_prune.surgery.config import sync_config
    from optimum_prune.surgery.operation import carry_out

    calibration, allowed = Calibration(WINDOWS), Allowed("budget", ("whole_experts",))
    index = next(place for place, count in enumerate(units(decoder, "whole_experts")) if count)
    curve = priced(decoder, calibration, calibration, allowed, Narrowing(0.05))[index].curves["whole_experts"]
    visit = next(each for each in calibration.walk(decoder, "") if each.index == index)
    for size, decision in zip(curve.sizes[:-1], best_members(visit, curve.sizes[:-1], "reap"), strict=True):
        small = Decoder(copy.deepcopy(decoder.model), decoder.family)
        carry_out(small, decision)
        sync_config(small)
        assert curve.at(size) == pytest.approx(divergence_by_hand(decoder, small, WINDOWS, STRIDE), rel=1e-3)


@pytest.mark.parametrize("name", ["mixtral"])
def test_experts_and_their_channels_go_together_where_all_layers_are_alike(name, decoder, plugins, tmp_path):
    step = Budget(params=0.7, form="stock", allow=("whole_experts", "experts"), multiple_of=4, finalists=4)
    small, outcome = pruned(step, decoder, plugins)
    assert len(set(small.shape().layers)) == 1
    ways = {
        tuple(sorted({part.split()[0] for part in each["sizes"][0].split(": ")[1].split(", ")}))
        for each in outcome.evidence[0]["considered"]
    }
    assert any("experts" in way for way in ways)
    conformance.reloads_exactly(small.model, tmp_path, WINDOWS)


@pytest.mark.parametrize("name", ["llama", "qwen3", "llama-tied"])
def test_hidden_states_become_narrower_where_that_is_allowed(name, decoder, plugins, tmp_path):
    step = Budget(params=0.75, form="stock", allow=("hidden",), multiple_of=4)
    step.foresee(decoder.shape())
    small, outcome = pruned(step, decoder, plugins)
    before, after = units(decoder, "hidden"), units(small, "hidden")
    assert after[0] < before[0]
    assert len(set(after)) == 1
    assert outcome.evidence[0]["considered"][0]["nats_per_token_by_prices"] > 0
    shape = decoder.shape()
    possible = [shape.narrowed({"hidden": size}).parameters for size in shape.rest.axis_named("hidden").fewer]
    assert small.shape().parameters == max(size for size in possible if size <= 0.75 * shape.parameters)
    conformance.reloads_exactly(small.model, tmp_path, WINDOWS)
    assert getattr(small.model.config, "pruned", None) is None


@pytest.mark.parametrize("name", ["llama"])
def test_narrower_hidden_states_are_one_way_among_others(name, decoder, plugins):
    allow = ("hidden", "channels", "layers")
    _, outcome = pruned(Budget(params=0.7, form="stock", allow=allow, multiple_of=4, finalists=4), decoder, plugins)
    found = outcome.evidence[0]["considered"]
    assert all(abs(each["parameters"] - 0.7) < 0.08 for each in found)
    best = next(each for each in found if each.get("best"))
    means = [sum(each["nats_per_token"].values()) for each in found]
    assert sum(best["nats_per_token"].values()) == min(means)


@pytest.mark.parametrize("name", ["llama"])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"params": 0.8, "allow": ("hidden",)}, "form 'stock'"),
        ({"decode_speed": 1.1, "form": "stock", "allow": ("hidden",)}, "decode_speed: no table"),
        ({"params": 0.01, "form": "stock", "allow": ("hidden",)}, "at best"),
    ],
    ids=str,
)
def test_hidden_states_are_refused_where_they_cannot_become_narrower(name, options, said, decoder):
    with pytest.raises(RecipeError, match=said):
        Budget(**options).foresee(decoder.shape())


@pytest.fixture
def tasks(tmp_path):
    file = tmp_path / "tasks.jsonl"
    lines = [{"query": f"The color of {word} is", "choices": ["red", "blue"], "gold": 1} for word in "abcdefgh"]
    file.write_text("\n".join(map(json.dumps, lines)))
    return str(file)


@pytest.mark.parametrize("name", ["llama"])
def test_what_a_model_loses_is_measured_on_tasks_as_well(name, decoder, plugins, tasks):
    calibration = Calibration(tiny.windows(10, 24), tokenizer=tiny.tokenizer())
    step = Budget(params=0.7, tasks=(tasks,), multiple_of=4)
    _, outcome = pruned(step, decoder, plugins, calibration)
    without = pruned(Budget(params=0.7, multiple_of=4), decoder, plugins)[1]
    found = outcome.evidence[0]["considered"]
    assert all(each["nats_per_token"]["the tasks"] > 0 for each in found)
    assert found[0]["nats_per_token_by_prices"] != without.evidence[0]["considered"][0]["nats_per_token_by_prices"]


@pytest.mark.parametrize("name", ["llama"])
def test_tasks_without_a_tokenizer_are_refused(name, decoder, plugins, tasks):
    with pytest.raises(RecipeError, match="no tokenizer"):
        pruned(Budget(params=0.7, tasks=(tasks,), multiple_of=4), decoder, plugins)


def test_a_file_of_tasks_that_is_not_there_is_refused_at_once():
    with pytest.raises(TextError, match="does not exist"):
        Budget(params=0.7, tasks=("nowhere.jsonl",))


@pytest.mark.parametrize("name", ["llama"])
def test_text_of_its_own_is_the_same_in_bfloat16_however_it_attends(name, decoder):
    """Attention in float32 for the time of writing is the model's own again behind it."""
    from optimum_prune.calibration.own_text import own_text

    half = Decoder(copy.deepcopy(decoder.model).to(torch.bfloat16), decoder.family)
    before = half.model.config._attn_implementation
    first, second = (own_text(half, WINDOWS, 3) for _ in range(2))
    assert torch.equal(first.tokens, second.tokens)
    assert half.model.config._attn_implementation == before


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("share", [0.9, 0.8, 0.7, 0.6])
@pytest.mark.parametrize("limit", ["params", "bytes"])
def test_a_stock_form_is_near_the_fraction_and_has_no_more_bytes_than_it_may(limit, share, name, decoder, plugins):
    options = {limit: share if limit == "params" else str(share)}
    small, outcome = pruned(Budget(**options, form="stock", finalists=1, multiple_of=4), decoder, plugins)
    left = small.shape().parameters / decoder.shape().parameters
    step = 4 * decoder.shape().layers[0].per_unit("channels") * len(decoder) / decoder.shape().parameters
    assert share - step < left <= share + (step / 2 if limit == "params" else 0)
    assert outcome.evidence[0]["considered"][0]["parameters"] == pytest.approx(left)


@pytest.mark.parametrize("name", ["llama"])
def test_a_stock_form_of_fewer_layers_alone_is_the_largest_that_fits(name, decoder, plugins):
    small, _ = pruned(Budget(params=0.8, form="stock", allow=("layers",), finalists=1), decoder, plugins)
    of_layer = decoder.shape().layers[0].parameters
    left = small.shape().parameters
    assert left <= 0.8 * decoder.shape().parameters < left + of_layer


@pytest.mark.parametrize("name", ["llama"])
def test_windows_of_a_few_tokens_still_tell_what_it_costs(name, decoder, plugins):
    calibration = Calibration(tiny.windows(1, 4))
    small, outcome = pruned(Budget(params=0.9, multiple_of=4, finalists=1), decoder, plugins, calibration)
    assert outcome.evidence[0]["considered"][0]["nats_per_token_by_prices"] > 0
    assert 0.86 < small.shape().parameters / decoder.shape().parameters <= 0.9


@pytest.mark.parametrize("text", ["1.5", "0", "999", "-1"])
@pytest.mark.parametrize("limit", ["bytes", "serving_memory"])
def test_a_number_that_is_no_size_of_a_model_is_refused(limit, text):
    with pytest.raises(RecipeError, match=r"fraction above 0 and below 1|is no size"):
        Budget(**{limit: text})


def test_a_library_that_is_a_file_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RecipeError, match="is no folder"):
        Budget(params=0.8, library=str(tmp_path / "file"))


@pytest.mark.parametrize("name", ["llama"])
@pytest.mark.parametrize("garbage", ["{}", '{"value": {"axes": 5}, "digest": "x"}', "[1]", "null", '{"value": 1'])
def test_what_is_not_as_it_was_written_in_a_library_is_found_out_anew(garbage, name, decoder, plugins, tmp_path):
    step = Budget(params=0.8, library=str(tmp_path / "library"), multiple_of=4, finalists=1)
    _, first = pruned(step, decoder, plugins)
    for file in (tmp_path / "library").rglob("*.json"):
        file.write_text(garbage)
    _, second = pruned(step, decoder, plugins)
    assert first.evidence == second.evidence


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"form": "stock", "allow": ("hidden", "channels")}),
        ("mixtral", {"form": "stock", "allow": ("whole_experts", "experts")}),
        ("qwen3_moe", {"allow": ("whole_experts", "heads", "layers")}),
    ],
    ids=str,
)
def test_it_keeps_the_rules_of_passes_whatever_becomes_less(name, options, decoder, tmp_path):
    conformance.check_pass(Budget(params=0.85, multiple_of=4, **options), decoder.model, tmp_path)

"""Masks learned from losses alone: what does nothing is found and goes, budgets hold, and the end is no worse than the beginning."""

from __future__ import annotations

import copy
import math

import pytest
import tiny
import torch
from torch.testing import assert_close

from optimum_prune import Decoder
from optimum_prune.builtin.prune.bernoulli import Bernoulli
from optimum_prune.errors import RecipeError
from optimum_prune.selection.bernoulli import Baseline, Kind, drawn, gradient, projected
from optimum_prune.selection.masked import Masked, some_windows
from optimum_prune.surgery.cuts import Cuts
from optimum_prune.testing import check_pass, cut, pruned
from optimum_prune.testing.models import logits

GROUP = 16
DEAD = {0: (1,), 2: (0, 3), 3: (2,), 5: (0, 1, 3)}
"""Layer -> groups of channels that put out nothing."""
DEAD_HEADS = {1: 0, 4: 1}


def planted(decoder: Decoder, dead, axis: str) -> Decoder:
    """Lets some units put out nothing, and all others of their kind much."""
    for layer in decoder.layers:
        layer.projection(layer.axes[axis].output).maps[0].mul_(6)
    for index, units in dead.items():
        found = decoder.layer(index).axes[axis]
        decoder.layer(index).projection(found.output).maps[0][:, found.inputs(units)] = 0
    return decoder


@pytest.mark.parametrize("name", ["llama"])
@pytest.mark.parametrize("start", ["flat", "metric"])
def test_it_finds_channels_that_do_nothing(name, start, decoder, plugins):
    groups = {index: [group * GROUP + unit for group in gone for unit in range(GROUP)] for index, gone in DEAD.items()}
    planted(decoder, groups, "channels")
    windows = tiny.spoken(decoder.model, 12)
    before, total = logits(decoder.model, windows), tiny.WIDTH // GROUP * len(decoder)
    budget = {"steps": 300, "batch": 240, "masks": 4, "learning_rate": 0.05}
    step = Bernoulli(ratio=sum(map(len, DEAD.values())) / total, start=start, multiple_of=GROUP, **budget)
    outcome = pruned(step, decoder, windows, plugins)
    gone = {index: sorted(set(range(tiny.WIDTH)) - set(kept)) for (index, _), kept in outcome.cuts.units.items()}
    assert gone == groups
    assert_close(logits(decoder.model, windows), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["llama"])
def test_it_finds_heads_that_do_nothing(name, decoder, plugins):
    planted(decoder, {index: (unit,) for index, unit in DEAD_HEADS.items()}, "heads")
    windows = tiny.spoken(decoder.model, 12)
    heads = decoder.layer(0).axes["heads"].units
    budget = {"steps": 300, "batch": 240, "masks": 4, "learning_rate": 0.05}
    step = Bernoulli(head_ratio=len(DEAD_HEADS) / (heads * len(decoder)), start="flat", **budget)
    outcome = pruned(step, decoder, windows, plugins)
    assert {place: set(range(heads)) - set(kept) for place, kept in outcome.cuts.units.items()} == {
        (index, "heads"): {unit} for index, unit in DEAD_HEADS.items()
    }


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "phi3"])
@pytest.mark.parametrize("options", [{"ratio": 0.3}, {"ratio": 0.3, "layers": 2}, {"head_ratio": 0.4, "ratio": 0.2}])
def test_it_leaves_what_it_foresees_decides_the_same_and_reloads(name, decoder, options, tmp_path):
    if name == "gpt2":
        options = {key: value for key, value in options.items() if key != "head_ratio"}
    outcome = check_pass(Bernoulli(**options, steps=4, multiple_of=4), decoder.model, tmp_path)
    units = {key: kept for key, kept in outcome.cuts.units.items() if key[1] == "channels"}
    if "layers" not in options:
        kept = sum(len(units.get((index, "channels"), range(tiny.WIDTH))) for index in range(len(decoder)))
        share = kept / (tiny.WIDTH * len(decoder))
        assert share == pytest.approx(1 - options["ratio"], abs=0.02)
    assert all(len(kept) >= 1 for kept in outcome.cuts.units.values())


@pytest.mark.parametrize("name", ["llama"])
def test_a_masked_model_is_one_that_is_cut(name, decoder):
    windows = tiny.windows(3, padded=True)
    kinds = {
        "feed_forward": Kind(((1, "channels", 8), (3, "channels", 8)), 9, {}),
        "attention": Kind(((0, "heads", 4),), 2, {})
        if decoder.layer(0).axes["heads"].units == 4
        else Kind(((0, "heads", 2),), 1, {}),
        "layers": Kind(tuple((index, "", 1) for index in range(len(decoder))), len(decoder) - 1, {}),
    }
    torch.manual_seed(0)
    masks = {name: torch.rand(kind.units) < 0.5 for name, kind in kinds.items()}
    masks["layers"] = torch.arange(len(decoder)) != 4
    masks["attention"][0] = True
    with Masked(decoder, kinds).ready() as masked:
        found = masked.loss(masks, windows)
    smaller = Decoder(copy.deepcopy(decoder.model), decoder.family)
    size = tiny.WIDTH // 8
    units = {
        (index, axis): tuple(mask.repeat_interleave(size if axis == "channels" else 1).nonzero().flatten().tolist())
        for name, kind in kinds.items()
        if name != "layers"
        for (index, axis, _), mask in zip(kind.places, kind.split(masks[name]), strict=True)
    }
    for (index, axis), kept in units.items():
        weight = smaller.layer(index).projection(smaller.layer(index).axes[axis].output).maps[0]
        gone = torch.ones(weight.shape[1], dtype=torch.bool)
        gone[smaller.layer(index).axes[axis].inputs(kept)] = False
        weight[:, gone] = 0
    cut(smaller, Cuts(layers=tuple(index for index in range(len(decoder)) if index != 4)))
    scores = logits(smaller.model, windows)[:, :-1].log_softmax(-1)
    counted = windows.mask[:, 1:]
    losses = -scores.gather(-1, windows.tokens[:, 1:, None])[..., 0]
    assert found == pytest.approx(losses[counted].mean().item(), rel=1e-5)


@pytest.mark.parametrize("name", ["llama"])
def test_it_ends_no_worse_than_it_began_and_says_which_it_took(name, decoder, plugins):
    windows = tiny.spoken(decoder.model, 12)
    outcome = pruned(Bernoulli(ratio=0.4, steps=3, multiple_of=8, learning_rate=0.9), decoder, windows, plugins)
    (found,) = [each["perplexity_with_cut"] for each in outcome.evidence if "perplexity_with_cut" in each]
    (note,) = outcome.notes
    assert list(found) == ["start", "a third", "two thirds", "learned"]
    assert ("so it is cut as it began" in note) == (found["start"] == min(found.values()))
    assert len(outcome.evidence[0]["losses"]) == 3


def test_probabilities_are_lowered_by_the_same_until_no_more_stay_than_wanted():
    torch.manual_seed(0)
    values = torch.rand(50, dtype=torch.float64) * 1.4 - 0.2
    found = projected(values, 12)
    assert found.sum().item() == pytest.approx(12, abs=1e-6)
    inside = (found > 0) & (found < 1)
    assert_close((values - found)[inside], (values - found)[inside].mean().expand(int(inside.sum())))
    assert_close(projected(values, 45), values.clamp(0, 1))


def test_the_gradient_is_that_of_the_expected_loss_but_for_the_root():
    """Of two units, over all masks: the mean of the estimate is the derivative times the root of s (1 - s)."""
    values = torch.tensor([0.3, 0.8], dtype=torch.float64)

    def loss(mask):
        return 2.0 * mask[0] - 3.0 * mask[1] + 1.5 * mask[0] * mask[1]

    generator, total, count = torch.Generator().manual_seed(0), torch.zeros(2, dtype=torch.float64), 40000
    for _ in range(count // 2):
        masks = drawn(values, 2, generator)
        total += gradient(values, masks, [float(loss(mask.double())) for mask in masks])
    spread = (values * (1 - values)).sqrt()
    derivative = torch.tensor([2.0 + 1.5 * 0.8, -3.0 + 1.5 * 0.3], dtype=torch.float64)
    assert_close(total / count, derivative * spread, rtol=0.05, atol=0.02)


def test_every_place_keeps_one_and_only_numbers_that_can_be_said():
    kind = Kind(((0, "a", 4), (1, "a", 4), (2, "a", 4)), 6, {1: (1, 4)})
    values = torch.tensor([0.9, 0.9, 0.9, 0.9, 0.8, 0.7, 0.1, 0.1, 0.0, 0.05, 0.0, 0.0])
    kept = [mask.nonzero().flatten().tolist() for mask in kind.best(values)]
    assert kept == [[0, 1, 2, 3], [0], [1]]


def test_masks_are_compared_with_those_of_the_same_step():
    first = Baseline().after([4.0, 2.0])
    assert first.square == 1.0
    assert first.advantages([104.0, 102.0]) == [1.0, -1.0]  # text that is harder moves none
    after = first.after([8.0, 0.0])
    assert math.isclose(after.square, 1.0 + (16.0 - 1.0) / 5)
    assert after.advantages([1.0, 1.0, 1.0]) == [0.0, 0.0, 0.0]


def test_windows_of_a_step_are_parts_of_those_there_are():
    windows = tiny.windows(4, 24)
    some = some_windows(windows, 40, 16, torch.Generator().manual_seed(0))
    assert some.tokens.shape == (2, 16)
    whole = [row.tolist() for row in windows.tokens]
    assert all(
        any(row.tolist() == each[start : start + 16] for each in whole for start in range(9)) for row in some.tokens
    )


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        (
            "llama",
            {"ratio": 0.5, "multiple_of": 7},
            "groups of 7, and a layer has 64 channels of the FFN. Give a multiple_of that divides these",
        ),
        ("llama", {"layers": tiny.LAYERS}, "Leave at least one in"),
        ("llama", {"ratio": 0.5, "multiple_of": tiny.WIDTH}, "by which none of 6 units or groups of them would go"),
        ("llama", {"head_ratio": 0.01}, "by which none of 12 units"),
        ("gpt2", {"head_ratio": 0.5}, "no layer of this model has units"),
        ("mixtral", {"ratio": 0.5}, "no layer of this model has units"),
    ],
)
def test_what_a_model_cannot_give_is_refused(name, decoder, options, why):
    with pytest.raises(RecipeError, match=why):
        Bernoulli(**options).foresee(decoder.shape())


@pytest.mark.parametrize(
    "options", [{}, {"ratio": 0.5, "steps": 3, "minutes": 2}, {"ratio": 0.5, "masks": 1}, {"ratio": 0.5, "minutes": 0}]
)
def test_options_that_cannot_be_are_refused(options):
    with pytest.raises(RecipeError, match="bernoulli"):
        Bernoulli(**options)


def test_units_learn_with_all_others_of_their_place():
    kind = Kind(((0, "channels", 4), (1, "channels", 100)), 50, {})
    gradient = torch.arange(104, dtype=torch.float64)
    moved = kind.shared(gradient) - gradient
    torch.testing.assert_close(moved[:4], torch.full((4,), 0.2 * 6.0, dtype=torch.float64))
    rest = torch.full((100,), 0.1 * gradient[4:].sum().item(), dtype=torch.float64)  # one over the root of so many
    torch.testing.assert_close(moved[4:], rest)


def test_scores_are_compared_within_their_place():
    kind = Kind(((0, "channels", 3), (1, "channels", 3), (2, "channels", 2)), 4, {})
    found = kind.standardized(torch.tensor([1.0, 2.0, 3.0, 100.0, 200.0, 300.0, 5.0, 5.0]))
    torch.testing.assert_close(found[:3], found[3:6])
    assert found[:3].mean().item() == pytest.approx(0, abs=1e-6)
    assert found[:3].std(unbiased=False).item() == pytest.approx(1)
    assert found[6:].tolist() == [0, 0]  # alike, and no reason to divide by nothing

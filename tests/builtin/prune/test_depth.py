from __future__ import annotations

import copy
import math
from collections.abc import Iterable

import pytest
import tiny
import torch
from healed import healed_model
from shortened import loss, losses_without_windows, without
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_prune import Calibration, Cuts, Decoder, Depth, Windows
from optimum_prune import testing as conformance
from optimum_prune.errors import NumericalError
from optimum_prune.selection import importance

CALIBRATION = tiny.windows(20)


def lowest(scores: Iterable[float]) -> int:
    scores = list(scores)
    return scores.index(min(scores))


def dropped(step: Depth, decoder: Decoder, windows: Windows) -> list[int]:
    """The layers that a step leaves out."""
    *_, decision = step.decide(decoder, Calibration(windows))
    gone = set(range(len(decoder))) - set(decision.cuts.layers)
    assert decision.evidence["dropped"] == sorted(gone)
    return sorted(gone)


@pytest.fixture
def tall(plugins) -> Decoder:
    """A model with more layers than the others here."""
    model = LlamaForCausalLM(LlamaConfig(**{**tiny.SIZES, "num_hidden_layers": 9})).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.2 * noise if parameter.ndim > 1 else 1 + 0.2 * noise)
    return Decoder.of(model, plugins.families)


# Which layers go


@pytest.mark.parametrize("name", tiny.FAMILIES)
@pytest.mark.parametrize("size", [1, 3])
def test_the_window_with_the_lowest_perplexity_goes_and_the_evidence_says_why(name, decoder, size):
    windows = tiny.windows(3, padded=True)
    losses = losses_without_windows(decoder, windows, size)
    best = lowest(losses)
    (decision,) = Depth(layers=size, search="exact", heal=False).decide(decoder, Calibration(windows))
    gone = list(range(best, best + size))
    assert decision.cuts == Cuts(layers=tuple(i for i in range(tiny.LAYERS) if i not in gone))
    assert not decision.weights
    assert decision.evidence["dropped"] == gone
    assert decision.evidence["perplexity_dense"] == pytest.approx(math.exp(loss(decoder, windows)), rel=1e-4)
    found = decision.evidence["perplexity_without_window_from"]
    assert found == pytest.approx({start: math.exp(loss) for start, loss in enumerate(losses)}, rel=1e-4)
    measured = decision.evidence["measured_on_tokens"]
    assert measured == dict.fromkeys(range(len(losses)), int(windows.mask[:, 1:].sum()))


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("search", ["racing", "exact"])
def test_greedily_the_layer_goes_whose_loss_is_lowest_on_top_of_those_gone(name, decoder, search):
    windows = tiny.windows(3)
    gone, rounds = [], []
    for _ in range(3):
        left = [index for index in range(tiny.LAYERS) if index not in gone]
        losses = {index: loss(without(decoder, [*gone, index]), windows) for index in left}
        rounds.append({index: math.exp(value) for index, value in losses.items()})
        gone.append(min(losses, key=losses.get))
    step = Depth(layers=3, shape="greedy", search=search, heal=False)
    (decision,) = step.decide(decoder, Calibration(windows))
    assert decision.evidence["dropped"] == sorted(gone)
    assert [each["removed"] for each in decision.evidence["rounds"]] == gone
    for found, expected in zip(decision.evidence["rounds"], rounds, strict=True):
        assert found["perplexity_without_window_from"] == pytest.approx(expected, rel=1e-4)


def scores_of(criterion: str, decoder: Decoder, windows: Windows) -> list[float]:
    """Of each layer, as the criterion has it."""
    if criterion == "perplexity":
        return losses_without_windows(decoder, windows, 1)
    if criterion == "magnitude":
        return importance.magnitudes(decoder)
    if criterion == "taylor":
        return importance.taylor(decoder, Calibration(windows))
    return importance.distances(decoder, Calibration(windows), 1, angular=criterion == "angular")


CRITERIA = ("perplexity", "taylor", "magnitude", "cosine", "angular")


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_ranked_the_layers_that_matter_least_one_by_one_go(name, decoder, criterion):
    windows = tiny.windows(3)
    scores = scores_of(criterion, decoder, windows)
    for count in (1, 3):
        step = Depth(layers=count, shape="ranked", criterion=criterion, heal=False, protect_first=0, protect_last=0)
        (decision,) = step.decide(decoder, Calibration(windows))
        expected = sorted(range(tiny.LAYERS), key=lambda index: scores[index])[:count]
        assert decision.evidence["dropped"] == sorted(expected)
        if criterion != "perplexity":
            found = decision.evidence[f"{criterion}_from"]
            assert found == pytest.approx(dict(enumerate(scores)), rel=1e-6)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("criterion", ["taylor", "magnitude"])
def test_of_windows_the_one_with_the_lowest_sum_of_scores_goes(name, decoder, criterion):
    windows = tiny.windows(3)
    scores = scores_of(criterion, decoder, windows)
    best = lowest(sum(scores[start : start + 2]) for start in range(tiny.LAYERS - 1))
    step = Depth(layers=2, criterion=criterion, heal=False, protect_first=0, protect_last=0)
    assert dropped(step, decoder, windows) == [best, best + 1]


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("criterion", ["cosine", "angular"])
def test_of_windows_the_one_goes_over_which_hidden_states_turn_least(name, decoder, criterion):
    windows = tiny.windows(3)
    best = lowest(importance.distances(decoder, Calibration(windows), 2, angular=criterion == "angular"))
    step = Depth(layers=2, criterion=criterion, heal=False)
    assert dropped(step, decoder, windows) == [best, best + 1]


@pytest.mark.parametrize("shape", ["window", "greedy", "ranked"])
def test_a_race_drops_the_layers_that_hardly_matter(shape, tall):
    with torch.no_grad():
        for index in (5, 6):
            for block in (tall.modules[index].self_attn.o_proj, tall.modules[index].mlp.down_proj):
                block.weight.mul_(0.01)
        tokens = conformance.logits(tall.model, tiny.windows(40)).argmax(-1)  # what the model says comes next
        windows = tiny.windows(40)
        windows.tokens[:, 1::2] = tokens[:, ::2]
    for search in ("racing", "exact"):
        step = Depth(layers=2, shape=shape, search=search, heal=False)
        assert dropped(step, tall, windows) == [5, 6]


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("shape", ["window", "ranked"])
def test_by_default_taylor_and_magnitude_protect_the_first_four_and_the_last_two(criterion, shape, tall):
    windows = tiny.windows(2)
    with torch.no_grad():  # by their weights, the first layers and the last hardly matter
        for index in (0, 1, 7, 8):
            for weight in tall.modules[index].parameters():
                weight.mul_(0.01)
    step = Depth(layers=2, shape=shape, criterion=criterion, heal=False)
    among_all = Depth(layers=2, shape=shape, criterion=criterion, heal=False, protect_first=0, protect_last=0)
    gone, freely = (dropped(each, tall, windows) for each in (step, among_all))
    if criterion in ("taylor", "magnitude"):
        assert set(gone) <= {4, 5, 6}
        assert set(freely) <= {0, 1, 7, 8}
    else:
        assert gone == freely


@pytest.mark.parametrize(
    ("shape", "criterion"),
    [("greedy", "perplexity"), *((shape, criterion) for shape in ("window", "ranked") for criterion in CRITERIA)],
)
def test_what_is_named_protected_stays(shape, criterion, tall):
    step = Depth(layers=3, shape=shape, criterion=criterion, heal=False, protect_first=3, protect_last=2)
    assert set(dropped(step, tall, tiny.windows(2))) <= {3, 4, 5, 6}
    step = Depth(layers=3, shape=shape, criterion=criterion, heal=False, protect_first=1, protect_last=5)
    assert dropped(step, tall, tiny.windows(2)) == [1, 2, 3]


@pytest.mark.parametrize("name", ["llama"])
def test_searching_changes_nothing(name, decoder):
    before = {key: value.clone() for key, value in decoder.model.state_dict().items()}
    for options in ({}, {"shape": "greedy"}, {"shape": "ranked"}, {"criterion": "taylor", "protect_first": 0}):
        list(Depth(layers=2, **options).decide(decoder, Calibration(tiny.windows(5))))
        assert len(decoder) == tiny.LAYERS
        assert all(torch.equal(value, before[key]) for key, value in decoder.model.state_dict().items())


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize(
    "step",
    [
        *(Depth(layers=2, shape=shape) for shape in ("window", "greedy", "ranked")),
        *(Depth(layers=2, criterion=criterion, protect_first=0) for criterion in ("magnitude", "angular")),
        Depth(drop=(2, 4)),
    ],
    ids=lambda step: f"{step.shape}-{step.criterion}-{step.drop}",
)
def test_searching_and_healing_record_nothing_for_a_backward_pass(name, decoder, step):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda packed: packed):
        decisions = list(step.decide(decoder, Calibration(tiny.windows(5))))
    assert not saved
    assert not any(weight.requires_grad for decision in decisions for weight in decision.weights.values())


@pytest.mark.parametrize("name", ["llama"])
@pytest.mark.parametrize(("drop", "kept"), [((0,), (1, 2, 3, 4, 5)), ((5, 1, 2), (0, 3, 4)), ((1, 2, 3, 4, 5), (0,))])
@pytest.mark.parametrize("healed", [False, True], ids=["unhealed", "healed"])
def test_named_layers_are_dropped(name, decoder, drop, kept, healed):
    *_, decision = Depth(drop=drop, heal=healed).decide(decoder, Calibration(tiny.windows(2)))
    assert decision.cuts == Cuts(layers=kept)
    assert decision.evidence["dropped"] == sorted(drop)


@pytest.mark.parametrize("name", ["llama"])
@pytest.mark.parametrize("search", ["racing", "exact"])
def test_a_window_that_holds_the_broken_layer_wins(name, decoder, search):
    step = Depth(layers=1, search=search, heal=False)
    with torch.no_grad():
        decoder.modules[3].mlp.up_proj.weight[0, 0] = torch.nan
    assert dropped(step, decoder, tiny.windows(2)) == [3]
    with torch.no_grad():
        decoder.modules[5].mlp.up_proj.weight[0, 0] = torch.nan
    for shape in ("window", "greedy", "ranked"):
        with pytest.raises(NumericalError, match="without which the model has a finite perplexity"):
            list(Depth(layers=1, shape=shape, search=search).decide(decoder, Calibration(tiny.windows(2))))


@pytest.mark.parametrize("name", ["llama"])
def test_a_broken_layer_can_be_left_out_and_the_gap_is_not_healed(name, decoder, plugins):
    with torch.no_grad():
        decoder.modules[3].mlp.up_proj.weight[0, 0] = torch.nan
    for step in (Depth(layers=1), Depth(drop=(3,)), Depth(drop=(2, 3))):
        smaller = copy.deepcopy(decoder)
        outcome = conformance.pruned(step, smaller, tiny.windows(5), plugins)
        assert 3 in outcome.evidence[-1]["dropped"]
        assert "layer 3 " in outcome.evidence[-2]["not_healed"]
        assert conformance.logits(smaller.model, tiny.windows(5)).isfinite().all()


# What the run leaves


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "mixtral", "deepseek_v3"])
@pytest.mark.parametrize(
    "step", [Depth(layers=2), Depth(drop=(2, 3, 5)), Depth(drop=(0, 1))], ids=lambda step: str(step.drop)
)
def test_a_healed_model_reloads_exactly_and_the_report_says_what_was_healed(name, decoder, step, plugins, tmp_path):
    in_full = copy.deepcopy(decoder)
    outcome = conformance.pruned(step, decoder, CALIBRATION, plugins)
    conformance.reloads_exactly(decoder.model, tmp_path, tiny.windows(2, seed=1))
    gone = outcome.evidence[-1]["dropped"]
    by_hand, told = healed_model(in_full, CALIBRATION, gone)
    assert [(each["healed"], each["projection"], each["strength"]) for each in outcome.evidence[:-1]] == told
    assert torch.equal(conformance.logits(by_hand.model, CALIBRATION), conformance.logits(decoder.model, CALIBRATION))


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_single_window_serves_to_fit_and_to_measure(name, decoder, plugins):
    one = Windows.from_tokens(tiny.windows(1, length=40).tokens)
    conformance.pruned(Depth(layers=2), decoder, one, plugins)
    assert len(decoder) == tiny.LAYERS - 2


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_the_report_can_draw_the_search(name, decoder, plugins):
    outcome = conformance.pruned(Depth(layers=2), decoder, tiny.windows(5), plugins)
    drawn = outcome.evidence[-1]
    assert list(drawn["influence_of_layer"]) == list(range(tiny.LAYERS))
    assert all(0 < turned < 2 for turned in drawn["influence_of_layer"].values())
    assert list(drawn["perplexity_without_window_from"]) == list(range(tiny.LAYERS - 1))
    assert drawn["perplexity_dense"] > 1

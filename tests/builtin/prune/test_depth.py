from __future__ import annotations

import copy
import math
from collections.abc import Iterable

import conformance
import pytest
import tiny
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_prune import Calibration, Cuts, Depth, LayerShape, Progress, Shape, importance, surgery
from optimum_prune.allocation import split
from optimum_prune.anatomy import find_family, parameters
from optimum_prune.errors import NumericalError, OptimumPruneError, RecipeError
from optimum_prune.healing import heal
from optimum_prune.methods.depth import FINALISTS


def loss(model, windows) -> float:
    targets = windows.tokens[:, 1:].masked_fill(~windows.mask[:, 1:], -100)
    return cross_entropy(conformance.logits(model, windows)[:, :-1].flatten(0, 1).double(), targets.flatten()).item()


def without(dense, family, gone: Iterable[int]):
    """A model from which layers are really removed."""
    model = copy.deepcopy(dense)
    gone = set(gone)
    count = len(family.layers_of(model))
    conformance.cut(model, family, Cuts(layers=tuple(index for index in range(count) if index not in gone)))
    return model


def losses_without_windows(dense, family, windows, size) -> list[float]:
    """Of each model from which a window of layers is really removed."""
    starts = range(len(family.layers_of(dense)) - size + 1)
    return [loss(without(dense, family, range(start, start + size)), windows) for start in starts]


def lowest(scores: Iterable[float]) -> int:
    scores = list(scores)
    return scores.index(min(scores))


def dropped(step, model, family, windows) -> list[int]:
    """The layers that a step leaves out."""
    *_, decision = step.decide(model, family, windows, Progress())
    gone = set(range(len(family.layers_of(model)))) - set(decision.cuts.layers)
    assert decision.evidence["dropped"] == sorted(gone)
    return sorted(gone)


def taller(layers: int = 9, seed: int = 0):
    """A model with more layers than the others here."""
    model = LlamaForCausalLM(LlamaConfig(**{**tiny.SIZES, "num_hidden_layers": layers})).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.2 * noise if parameter.ndim > 1 else 1 + 0.2 * noise)
    return model


@pytest.fixture
def tall(plugins):
    model = taller()
    return model, find_family(model.config, plugins.families)


# Which layers go


@pytest.mark.parametrize("name", tiny.FAMILIES)
@pytest.mark.parametrize("size", [1, 3])
def test_the_window_with_the_lowest_perplexity_goes_and_the_evidence_says_why(name, subject, size):
    model, family = subject
    windows = tiny.windows(3, padded=True)
    losses = losses_without_windows(model, family, windows, size)
    best = lowest(losses)
    (decision,) = Depth(layers=size, search="exact", heal=False).decide(model, family, windows, Progress())
    gone = list(range(best, best + size))
    assert decision.cuts == Cuts(layers=tuple(i for i in range(tiny.LAYERS) if i not in gone))
    assert not decision.weights
    assert decision.evidence["dropped"] == gone
    assert decision.evidence["perplexity_dense"] == pytest.approx(math.exp(loss(model, windows)), rel=1e-4)
    found = decision.evidence["perplexity_without_window_from"]
    assert found == pytest.approx({start: math.exp(loss) for start, loss in enumerate(losses)}, rel=1e-4)
    measured = decision.evidence["measured_on_tokens"]
    assert measured == dict.fromkeys(range(len(losses)), int(windows.mask[:, 1:].sum()))


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("search", ["racing", "exact"])
def test_greedily_the_layer_goes_whose_loss_is_lowest_on_top_of_those_gone(name, subject, search):
    model, family = subject
    windows = tiny.windows(3)
    gone, rounds = [], []
    for _ in range(3):
        left = [index for index in range(tiny.LAYERS) if index not in gone]
        losses = {index: loss(without(model, family, [*gone, index]), windows) for index in left}
        rounds.append({index: math.exp(value) for index, value in losses.items()})
        gone.append(min(losses, key=losses.get))
    step = Depth(layers=3, shape="greedy", search=search, heal=False)
    (decision,) = step.decide(model, family, windows, Progress())
    assert decision.evidence["dropped"] == sorted(gone)
    assert [each["removed"] for each in decision.evidence["rounds"]] == gone
    for found, expected in zip(decision.evidence["rounds"], rounds, strict=True):
        assert found["perplexity_without_window_from"] == pytest.approx(expected, rel=1e-4)


def scores_of(criterion, model, family, windows) -> list[float]:
    """Of each layer, as the criterion has it."""
    if criterion == "perplexity":
        return losses_without_windows(model, family, windows, 1)
    if criterion == "magnitude":
        return importance.magnitudes(model, family)
    if criterion == "taylor":
        return importance.taylor(model, family, windows, Progress())
    return importance.distances(model, family, windows, 1, criterion == "angular", Progress())


CRITERIA = ("perplexity", "taylor", "magnitude", "cosine", "angular")


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_ranked_the_layers_that_matter_least_one_by_one_go(name, subject, criterion):
    model, family = subject
    windows = tiny.windows(3)
    scores = scores_of(criterion, model, family, windows)
    for count in (1, 3):
        step = Depth(layers=count, shape="ranked", criterion=criterion, heal=False, protect_first=0, protect_last=0)
        (decision,) = step.decide(model, family, windows, Progress())
        expected = sorted(range(tiny.LAYERS), key=lambda index: scores[index])[:count]
        assert decision.evidence["dropped"] == sorted(expected)
        if criterion != "perplexity":
            found = decision.evidence[f"{criterion}_from"]
            assert found == pytest.approx(dict(enumerate(scores)), rel=1e-6)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("criterion", ["taylor", "magnitude"])
def test_of_windows_the_one_with_the_lowest_sum_of_scores_goes(name, subject, criterion):
    model, family = subject
    windows = tiny.windows(3)
    scores = scores_of(criterion, model, family, windows)
    best = lowest(sum(scores[start : start + 2]) for start in range(tiny.LAYERS - 1))
    step = Depth(layers=2, criterion=criterion, heal=False, protect_first=0, protect_last=0)
    assert dropped(step, model, family, windows) == [best, best + 1]


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("criterion", ["cosine", "angular"])
def test_of_windows_the_one_goes_over_which_hidden_states_turn_least(name, subject, criterion):
    model, family = subject
    windows = tiny.windows(3)
    best = lowest(importance.distances(model, family, windows, 2, criterion == "angular", Progress()))
    step = Depth(layers=2, criterion=criterion, heal=False)
    assert dropped(step, model, family, windows) == [best, best + 1]


@pytest.mark.parametrize("shape", ["window", "greedy", "ranked"])
def test_a_race_drops_the_layers_that_hardly_matter(shape, tall):
    model, family = tall
    with torch.no_grad():
        for index in (5, 6):
            for block in (model.model.layers[index].self_attn.o_proj, model.model.layers[index].mlp.down_proj):
                block.weight.mul_(0.01)
        tokens = conformance.logits(model, tiny.windows(40)).argmax(-1)  # what the model says comes next
        windows = tiny.windows(40)
        windows.tokens[:, 1::2] = tokens[:, ::2]
    for search in ("racing", "exact"):
        step = Depth(layers=2, shape=shape, search=search, heal=False)
        assert dropped(step, model, family, windows) == [5, 6]


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("shape", ["window", "ranked"])
def test_by_default_taylor_and_magnitude_protect_the_first_four_and_the_last_two(criterion, shape, tall):
    model, family = tall
    windows = tiny.windows(2)
    with torch.no_grad():  # by their weights, the first layers and the last hardly matter
        for index in (0, 1, 7, 8):
            for weight in model.model.layers[index].parameters():
                weight.mul_(0.01)
    step = Depth(layers=2, shape=shape, criterion=criterion, heal=False)
    among_all = Depth(layers=2, shape=shape, criterion=criterion, heal=False, protect_first=0, protect_last=0)
    gone, freely = (dropped(each, model, family, windows) for each in (step, among_all))
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
    model, family = tall
    step = Depth(layers=3, shape=shape, criterion=criterion, heal=False, protect_first=3, protect_last=2)
    assert set(dropped(step, model, family, tiny.windows(2))) <= {3, 4, 5, 6}
    step = Depth(layers=3, shape=shape, criterion=criterion, heal=False, protect_first=1, protect_last=5)
    assert dropped(step, model, family, tiny.windows(2)) == [1, 2, 3]


@pytest.mark.parametrize("name", ["llama"])
def test_searching_changes_nothing(name, subject):
    model, family = subject
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for options in ({}, {"shape": "greedy"}, {"shape": "ranked"}, {"criterion": "taylor", "protect_first": 0}):
        list(Depth(layers=2, **options).decide(model, family, tiny.windows(5), Progress()))
        assert len(family.layers_of(model)) == tiny.LAYERS
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


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
def test_searching_and_healing_record_nothing_for_a_backward_pass(name, subject, step):
    model, family = subject
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda packed: packed):
        decisions = list(step.decide(model, family, tiny.windows(5), Progress()))
    assert not saved
    assert not any(weight.requires_grad for decision in decisions for weight in decision.weights.values())


@pytest.mark.parametrize("name", ["llama"])
@pytest.mark.parametrize(("drop", "kept"), [((0,), (1, 2, 3, 4, 5)), ((5, 1, 2), (0, 3, 4)), ((1, 2, 3, 4, 5), (0,))])
@pytest.mark.parametrize("healed", [False, True], ids=["unhealed", "healed"])
def test_named_layers_are_dropped(name, subject, drop, kept, healed):
    model, family = subject
    *_, decision = Depth(drop=drop, heal=healed).decide(model, family, tiny.windows(2), Progress())
    assert decision.cuts == Cuts(layers=kept)
    assert decision.evidence["dropped"] == sorted(drop)


@pytest.mark.parametrize("name", ["llama"])
@pytest.mark.parametrize("search", ["racing", "exact"])
def test_a_window_that_holds_the_broken_layer_wins(name, subject, search):
    model, family = subject
    step = Depth(layers=1, search=search, heal=False)
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight[0, 0] = torch.nan
    assert dropped(step, model, family, tiny.windows(2)) == [3]
    with torch.no_grad():
        model.model.layers[5].mlp.up_proj.weight[0, 0] = torch.nan
    for shape in ("window", "greedy", "ranked"):
        with pytest.raises(NumericalError, match="without which the model has a finite perplexity"):
            list(Depth(layers=1, shape=shape, search=search).decide(model, family, tiny.windows(2), Progress()))


@pytest.mark.parametrize("name", ["llama"])
def test_a_broken_layer_can_be_left_out_and_the_gap_is_not_healed(name, subject, plugins):
    model, family = subject
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight[0, 0] = torch.nan
    for step in (Depth(layers=1), Depth(drop=(3,)), Depth(drop=(2, 3))):
        smaller = copy.deepcopy(model)
        outcome = conformance.pruned(step, smaller, family, tiny.windows(5), plugins)
        assert 3 in outcome.evidence[-1]["dropped"]
        assert "layer 3 " in outcome.evidence[-2]["not_healed"]
        assert conformance.logits(smaller, tiny.windows(5)).isfinite().all()


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_broken_layer_in_front_of_a_gap_is_named(name, subject, plugins):
    model, family = subject
    linear = family.linear(family.layers_of(model)[2], family.feed_forward.inputs[0])
    with torch.no_grad():
        linear.module.weight[0, 0] = torch.nan
    with pytest.raises(OptimumPruneError, match=r"ayers?[ .]2.* not finite"):
        conformance.pruned(Depth(drop=(3,)), model, family, tiny.windows(5), plugins)


# How many go


SIX = Shape(tuple(LayerShape(parameters=1000 + index, width=64, per_channel=10) for index in range(6)), 500)


@pytest.mark.parametrize(
    ("ratio", "gone"), [(0.01, 1), (0.2, 1), (0.3, 2), (1 / 3, 2), (0.5, 3), (0.6, 4), (0.8, 5), (0.9, 5)]
)
def test_a_ratio_is_the_nearest_number_of_layers_but_at_least_one(ratio, gone):
    assert len(Depth(ratio=ratio).foresee(SIX).layers) == 6 - gone


@pytest.mark.parametrize("name", ["llama", "gemma3-vision", "gpt2"])
@pytest.mark.parametrize("params", [0.4, 0.5, 0.6, 0.75, 0.9, 0.999])
def test_no_other_number_of_layers_comes_nearer_to_the_parameters_asked_for(name, subject, params, plugins):
    model, family = subject
    total = parameters(model)["total"]
    shape = family.shape(model)
    sizes = [shape.keep(range(tiny.LAYERS - gone)).parameters for gone in range(1, tiny.LAYERS)]
    step = Depth(params=params, heal=False)
    foreseen = step.foresee(shape)
    assert abs(foreseen.parameters - params * total) <= min(abs(size - params * total) for size in sizes)
    conformance.pruned(step, model, family, tiny.windows(2), plugins)
    assert parameters(model)["total"] == foreseen.parameters


@pytest.mark.parametrize(
    "step",
    [
        Depth(layers=6),
        Depth(layers=60),
        Depth(drop=(6,)),
        Depth(drop=(0, -1)),
        Depth(drop=tuple(range(6))),
        Depth(ratio=0.99),
        Depth(params=0.01),
        Depth(layers=1, criterion="taylor"),
        Depth(layers=2, criterion="magnitude", protect_first=3),
        Depth(layers=2, protect_last=5),
        Depth(layers=1, protect_first=4, protect_last=4),
    ],
    ids=str,
)
def test_more_layers_than_there_are_or_may_go_cannot_go(step):
    with pytest.raises(RecipeError, match="depth is asked to"):
        step.foresee(SIX)


@pytest.mark.parametrize(
    "step",
    [Depth(layers=5), Depth(ratio=0.8), Depth(drop=(5, 0, 1, 3, 2)), Depth(layers=5, protect_first=1)],
    ids=str,
)
def test_all_layers_but_one_can_go(step):
    (left,) = step.foresee(SIX).layers
    assert left in SIX.layers
    assert step.foresee(SIX).elsewhere == SIX.elsewhere


@pytest.mark.parametrize("drop", [(0,), (5,), (1, 4), (4, 1), (0, 2, 3)], ids=str)
def test_of_layers_that_differ_it_is_foreseen_which_are_left(drop):
    assert Depth(drop=drop).foresee(SIX).layers == tuple(SIX.layers[i] for i in range(6) if i not in drop)


def test_layers_that_are_named_may_be_among_those_a_criterion_protects():
    assert len(Depth(drop=(0, 5), criterion="taylor").foresee(SIX).layers) == 4


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({}, "needs exactly one of 'layers'"),
        ({"heal": False}, "needs exactly one of 'layers'"),
        ({"layers": 1, "drop": (1,)}, "needs exactly one of"),
        ({"layers": 1, "ratio": 0.5}, "needs exactly one of"),
        ({"ratio": 0.5, "params": 0.5}, "needs exactly one of"),
        ({"layers": 0}, "leave out 0 layers"),
        ({"layers": -2}, "leave out -2 layers"),
        ({"ratio": 0.0}, "ratio 0.0"),
        ({"ratio": 1.0}, "ratio 1.0"),
        ({"ratio": float("nan")}, "ratio nan"),
        ({"params": 1.5}, "params 1.5"),
        ({"params": -0.5}, "params -0.5"),
        ({"drop": ()}, r"drop the layers \[\]"),
        ({"drop": (1, 1)}, r"drop the layers \[1, 1\]"),
        ({"layers": 1, "shape": "greedy", "criterion": "taylor"}, "shape 'greedy'.* criterion 'taylor'"),
        ({"layers": 1, "damping": 0.0}, "damping 0.0"),
        ({"layers": 1, "damping": float("nan")}, "damping nan"),
        ({"layers": 1, "damping": float("inf")}, "damping inf"),
        ({"layers": 1, "protect_first": -1}, "protect_first -1"),
        ({"layers": 1, "protect_last": -3}, "protect_last -3"),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused(options, why):
    with pytest.raises(RecipeError, match=f"depth .*{why}") as caught:
        Depth(**options)
    assert str(caught.value).endswith(".")


# Healing


def behind(model, family, windows, index) -> Tensor:
    """Hidden states behind a layer, padding left out."""
    seen: list[Tensor] = []

    def hear(_, __, output):
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = family.layers_of(model)[index].register_forward_hook(hear)
    conformance.logits(model, windows)
    handle.remove()
    return seen[0][windows.mask]


def error(wanted: Tensor, found: Tensor) -> float:
    return (wanted - found).double().square().mean().item()


def healed_model(dense, family, windows, gone, damping=0.1):
    """A copy without these layers, healed; and of each decision which layer it was about, which projection, how far."""
    model = copy.deepcopy(dense)
    layers = enumerate(family.layers_of(model))
    kept = {index: () if index in gone else family.blocks_of(layer) for index, layer in layers}
    told = []
    for decision in heal(model, family, windows, kept, damping, Progress()):
        surgery.carry_out(model, family, decision)
        assert all(f".{decision.evidence['projection']}." in name for name in decision.weights)
        told.append((decision.evidence["healed"], decision.evidence["projection"], decision.evidence["strength"]))
    return without(model, family, gone), told


def with_ffn_bridged(dense, family, windows, gone: range):
    """A copy without these layers, where the FFN in front of them was refitted by a ridge regression of its own."""
    front = gone.start - 1
    model = copy.deepcopy(dense)
    if front >= 0 and family.experts_of(family.layers_of(model)[front]) is None:
        linear = family.linear(family.layers_of(model)[front], family.feed_forward.output)
        rows = conformance.inputs_of(model, linear.module, windows)
        lack = behind(model, family, windows, gone[-1]).double() - behind(model, family, windows, front).double()
        means = (rows.mean(0), lack.mean(0)) if linear.bias is not None else (0 * rows[0], 0 * lack[0])
        rows, lack = rows - means[0], lack - means[1]
        gram = rows.T @ rows
        gram += 0.1 * gram.diagonal().mean() * torch.eye(len(gram))
        move = torch.linalg.solve(gram, rows.T @ lack).T
        with torch.no_grad():
            linear.module.weight.copy_(linear.stored(linear.weight + move))
            if linear.bias is not None:
                linear.module.bias.add_(means[1] - move @ means[0])
    return without(model, family, gone)


CALIBRATION = tiny.windows(20)


@pytest.mark.parametrize("name", ["llama", "qwen3", "cohere", "gpt2", "gpt2-wide", "gpt_neox", "opt", "phi3"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_healing_brings_hidden_states_nearer_to_those_behind_the_gap(name, subject, padded):
    dense, family = subject
    windows = tiny.windows(20, padded=padded)
    unhealed = without(dense, family, (3, 4))
    healed, told = healed_model(dense, family, windows, (3, 4))
    wanted = behind(dense, family, windows, 4)
    before = error(wanted, behind(unhealed, family, windows, 2))
    after = error(wanted, behind(healed, family, windows, 2))
    assert [index for index, _, _ in told] == [2, 2, 5, 5]
    assert after < 0.9 * before
    assert after > 0


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "opt", "gpt_neox"])
def test_healing_lowers_the_perplexity_on_the_windows_it_is_fitted_to(name, subject):
    dense, family = subject
    windows = tiny.windows(30)
    with torch.no_grad():  # text that the dense model expects
        windows.tokens[:, 1::2] = conformance.logits(dense, windows).argmax(-1)[:, ::2]
    unhealed = loss(without(dense, family, (3, 4)), windows)
    healed, _ = healed_model(dense, family, windows, (3, 4))
    assert loss(healed, windows) < unhealed


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("gone", [(0,), (0, 1), (3,), (2, 3), (5,), (1, 4), (0, 2, 5), (1, 2, 4)], ids=str)
def test_only_output_projections_in_front_of_gaps_and_behind_them_get_new_weights(name, subject, gone):
    dense, family = subject
    healed, told = healed_model(dense, family, CALIBRATION, gone)
    unhealed = without(dense, family, gone)
    kept = [index for index in range(tiny.LAYERS) if index not in gone]
    fronts = [index for index in kept if index + 1 in gone]
    touched = {index for index, _, _ in told}
    assert all(index >= fronts[0] for index in touched) if fronts else not touched
    projections = {(index, projection) for index, projection, _ in told}
    changed = {
        name
        for (name, value), other in zip(healed.state_dict().items(), unhealed.state_dict().values(), strict=True)
        if not torch.equal(value, other)
    }
    prefixes = tuple(f"{family.layers}.{kept.index(index)}.{projection}." for index, projection in projections)
    assert all(name.startswith(prefixes) for name in changed)
    assert all(any(name.startswith(prefix) for name in changed) for prefix in prefixes)
    for index in kept:
        if family.experts_of(family.layers_of(dense)[index]) is not None:
            assert (index, family.feed_forward.output) not in projections
        elif index in fronts:
            assert (index, family.feed_forward.output, 1.0) in told


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "glm4", "opt-post-norm"])
def test_where_a_norm_follows_each_projection_nothing_is_healed_or_said_to_be(name, subject):
    dense, family = subject
    healed, told = healed_model(dense, family, CALIBRATION, (1, 3))
    unhealed = without(dense, family, (1, 3))
    assert torch.equal(conformance.logits(healed, CALIBRATION), conformance.logits(unhealed, CALIBRATION))
    assert told == []


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "opt"])
def test_each_of_several_gaps_is_healed_in_the_stream_of_those_healed_before(name, subject):
    dense, family = subject
    unhealed, (healed, told) = without(dense, family, (1, 2, 4)), healed_model(dense, family, CALIBRATION, (1, 2, 4))
    assert [index for index, projection, _ in told if projection == family.feed_forward.output] == [0, 3, 5]
    first_only, _ = healed_model(dense, family, CALIBRATION, (1, 2))
    assert torch.equal(behind(first_only, family, CALIBRATION, 0), behind(healed, family, CALIBRATION, 0))
    for position, until in ((0, 2), (1, 4), (2, 5)):  # of layers that stay, and where their gap ends
        wanted = behind(dense, family, CALIBRATION, until)
        before, after = (error(wanted, behind(each, family, CALIBRATION, position)) for each in (unhealed, healed))
        assert after < before


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_the_farther_behind_a_gap_the_less_a_layer_is_moved(name, subject):
    dense, family = subject
    _, told = healed_model(dense, family, CALIBRATION, (1,))
    behind_it = [
        strength for index, projection, strength in told if index > 1 and projection == family.feed_forward.output
    ]
    assert len(behind_it) == 4
    assert behind_it == sorted(set(behind_it), reverse=True)
    assert 0 < behind_it[-1] < behind_it[0] < 1


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_gap_that_does_nothing_asks_for_no_healing(name, subject):
    dense, family = subject
    with torch.no_grad():
        for part in (family.feed_forward.output, "self_attn.o_proj" if name == "llama" else "self_attn.out_proj"):
            linear = family.linear(family.layers_of(dense)[3], part)
            linear.module.weight.zero_()
            linear.module.bias.zero_()
    healed, _ = healed_model(dense, family, CALIBRATION, (3,))
    expected = conformance.logits(dense, CALIBRATION)
    assert (conformance.logits(healed, CALIBRATION) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_less_damping_heals_more_of_the_calibration_windows(name, subject):
    dense, family = subject
    wanted = behind(dense, family, CALIBRATION, 4)
    errors = [
        error(wanted, behind(healed_model(dense, family, CALIBRATION, (3, 4), damping)[0], family, CALIBRATION, 2))
        for damping in (1e6, 10, 1, 0.1, 0.001)
    ]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "qwen3_moe", "phi3", "gpt_neox"])
@pytest.mark.parametrize("size", [1, 2])
def test_of_the_best_windows_the_one_goes_that_is_best_when_healed(name, subject, size):
    dense, family = subject
    losses = losses_without_windows(dense, family, CALIBRATION, size)
    finalists = sorted(range(len(losses)), key=lambda start: losses[start])[:FINALISTS]
    fitted, held_out = split(CALIBRATION)
    healed = {
        start: loss(with_ffn_bridged(dense, family, fitted, range(start, start + size)), held_out)
        for start in finalists
    }
    best = min(healed, key=healed.get)
    *_, decision = Depth(layers=size, search="exact").decide(dense, family, CALIBRATION, Progress())
    assert decision.evidence["dropped"] == list(range(best, best + size))
    found = decision.evidence["perplexity_healed_without_window_from"]
    assert found == pytest.approx({start: math.exp(value) for start, value in healed.items()}, rel=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "mixtral", "deepseek_v3"])
@pytest.mark.parametrize(
    "step", [Depth(layers=2), Depth(drop=(2, 3, 5)), Depth(drop=(0, 1))], ids=lambda step: str(step.drop)
)
def test_a_healed_model_reloads_exactly_and_the_report_says_what_was_healed(name, subject, step, plugins, tmp_path):
    model, family = subject
    in_full = copy.deepcopy(model)
    outcome = conformance.pruned(step, model, family, CALIBRATION, plugins)
    conformance.reloads_exactly(model, tmp_path, tiny.windows(2, seed=1))
    gone = outcome.evidence[-1]["dropped"]
    by_hand, told = healed_model(in_full, family, CALIBRATION, gone)
    assert [(each["healed"], each["projection"], each["strength"]) for each in outcome.evidence[:-1]] == told
    assert torch.equal(conformance.logits(by_hand, CALIBRATION), conformance.logits(model, CALIBRATION))


@pytest.mark.parametrize("name", ["llama"])
@pytest.mark.parametrize("shape", ["greedy", "ranked"])
def test_layers_here_and_there_are_healed_as_well(name, subject, shape):
    model, family = subject
    *healing, decision = Depth(layers=3, shape=shape).decide(model, family, CALIBRATION, Progress())
    gone = decision.evidence["dropped"]
    fronts = {index for index in range(tiny.LAYERS) if index not in gone and index + 1 in gone}
    healed = {each.evidence["healed"] for each in healing}
    assert fronts <= healed
    assert not healed & set(gone)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_single_window_serves_to_fit_and_to_measure(name, subject, plugins):
    model, family = subject
    one = Calibration.from_tokens(tiny.windows(1, length=40).tokens)
    conformance.pruned(Depth(layers=2), model, family, one, plugins)
    assert len(family.layers_of(model)) == tiny.LAYERS - 2


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_the_report_can_draw_the_search(name, subject, plugins):
    model, family = subject
    outcome = conformance.pruned(Depth(layers=2), model, family, tiny.windows(5), plugins)
    drawn = outcome.evidence[-1]
    assert list(drawn["influence_of_layer"]) == list(range(tiny.LAYERS))
    assert all(0 < turned < 2 for turned in drawn["influence_of_layer"].values())
    assert list(drawn["perplexity_without_window_from"]) == list(range(tiny.LAYERS - 1))
    assert drawn["perplexity_dense"] > 1

from __future__ import annotations

import copy
import math

import conformance
import pytest
import tiny
import torch
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from optimum_prune import Cuts, Depth, LayerShape, Progress, Shape
from optimum_prune.anatomy import find_family
from optimum_prune.errors import NumericalError, RecipeError
from optimum_prune.methods.depth import window_losses


def mean_loss(model, windows) -> float:
    targets = windows.tokens[:, 1:].masked_fill(~windows.mask[:, 1:], -100)
    return cross_entropy(conformance.logits(model, windows)[:, :-1].flatten(0, 1).double(), targets.flatten()).item()


def naive(dense, family, windows, size) -> list[float]:
    """The loss of the whole model, then of each model from which a window of layers is really removed."""
    losses = [mean_loss(dense, windows)]
    for start in range(tiny.LAYERS - size + 1):
        model = copy.deepcopy(dense)
        conformance.cut(
            model, family, Cuts(layers=tuple(i for i in range(tiny.LAYERS) if not start <= i < start + size))
        )
        losses.append(mean_loss(model, windows))
    return losses


@pytest.fixture
def subject(name, plugins):
    model = tiny.model(name)
    return model, find_family(model.config, plugins.families)


@pytest.mark.parametrize("name", tiny.FAMILIES)
@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_the_shared_search_is_the_naive_search(name, subject, size, padded):
    model, family = subject
    windows = tiny.windows(3, padded=padded)
    found = window_losses(model, family, windows, size, Progress())
    assert_close(found, torch.tensor(naive(model, family, windows, size), dtype=torch.float64), rtol=1e-5, atol=0)


def test_the_search_does_not_depend_on_how_windows_are_batched(plugins, monkeypatch):
    model = tiny.model("gemma3")
    family = find_family(model.config, plugins.families)
    windows = tiny.windows(5, padded=True)
    together = window_losses(model, family, windows, 2, Progress())
    monkeypatch.setattr("optimum_prune.layerwise.TOKENS_PER_BATCH", 2 * windows.tokens.shape[1])
    assert_close(window_losses(model, family, windows, 2, Progress()), together, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3-vision", "opt"])
@pytest.mark.parametrize("size", [1, 3])
def test_the_window_with_the_lowest_perplexity_goes_and_the_evidence_says_why(name, subject, size):
    model, family = subject
    windows = tiny.windows(4)
    dense, *losses = naive(model, family, windows, size)
    best = losses.index(min(losses))
    (decision,) = Depth(layers=size).decide(model, family, windows, Progress())
    gone = list(range(best, best + size))
    assert decision.cuts == Cuts(layers=tuple(i for i in range(tiny.LAYERS) if i not in gone))
    assert decision.evidence["dropped"] == gone
    assert decision.evidence["perplexity_dense"] == pytest.approx(math.exp(dense), rel=1e-5)
    found = decision.evidence["perplexity_without_window_from"]
    assert found == pytest.approx({start: math.exp(loss) for start, loss in enumerate(losses)}, rel=1e-5)


@pytest.mark.parametrize("name", ["llama"])
def test_searching_changes_nothing(name, subject):
    model, family = subject
    before = {key: value.clone() for key, value in model.state_dict().items()}
    list(Depth(layers=2).decide(model, family, tiny.windows(2), Progress()))
    assert len(family.layers_of(model)) == tiny.LAYERS
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["llama"])
@pytest.mark.parametrize(("drop", "kept"), [((0,), (1, 2, 3, 4, 5)), ((5, 1, 2), (0, 3, 4)), ((1, 2, 3, 4, 5), (0,))])
def test_named_layers_are_dropped(name, subject, drop, kept):
    model, family = subject
    (decision,) = Depth(drop=drop).decide(model, family, tiny.windows(2), Progress())
    assert decision.cuts == Cuts(layers=kept)
    assert decision.evidence["dropped"] == sorted(drop)


SIX = Shape(tuple(LayerShape(parameters=1000 + index, width=64, per_channel=10) for index in range(6)), 500)


@pytest.mark.parametrize(
    "step",
    [Depth(layers=6), Depth(layers=60), Depth(drop=(6,)), Depth(drop=(0, -1)), Depth(drop=tuple(range(6)))],
    ids=str,
)
def test_more_layers_than_there_are_cannot_go(step):
    with pytest.raises(RecipeError, match="depth is asked to"):
        step.foresee(SIX)


@pytest.mark.parametrize("step", [Depth(layers=5), Depth(drop=(5, 0, 1, 3, 2))], ids=str)
def test_all_layers_but_one_can_go(step):
    (left,) = step.foresee(SIX).layers
    assert left in SIX.layers
    assert step.foresee(SIX).elsewhere == SIX.elsewhere


@pytest.mark.parametrize("drop", [(0,), (5,), (1, 4), (4, 1), (0, 2, 3)], ids=str)
def test_of_layers_that_differ_it_is_foreseen_which_are_left(drop):
    assert Depth(drop=drop).foresee(SIX).layers == tuple(SIX.layers[i] for i in range(6) if i not in drop)


@pytest.mark.parametrize(
    "options",
    [{}, {"layers": 1, "drop": (1,)}, {"layers": 0}, {"layers": -2}, {"drop": ()}, {"drop": (1, 1)}],
    ids=str,
)
def test_options_that_cannot_be_are_refused(options):
    with pytest.raises(RecipeError, match="depth"):
        Depth(**options)


@pytest.mark.parametrize("name", ["llama"])
def test_a_window_that_holds_the_broken_layer_wins(name, subject):
    model, family = subject
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight[0, 0] = torch.nan
    (decision,) = Depth(layers=1).decide(model, family, tiny.windows(2), Progress())
    assert decision.evidence["dropped"] == [3]
    with torch.no_grad():
        model.model.layers[5].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(NumericalError, match="No window of layers leaves"):
        list(Depth(layers=1).decide(model, family, tiny.windows(2), Progress()))

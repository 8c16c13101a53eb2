"""Depth: how many layers go, and which options can be."""

from __future__ import annotations

import pytest
import tiny

from optimum_prune import AxisShape, Depth, LayerShape, Shape
from optimum_prune import testing as conformance
from optimum_prune.anatomy.counts import count_parameters
from optimum_prune.anatomy.shape import FEED_FORWARD
from optimum_prune.errors import RecipeError

CHANNELS = AxisShape("channels", 64, FEED_FORWARD)
SIX = Shape(
    tuple(LayerShape((CHANNELS,), ((("channels",), 10), ((), 360 + index))) for index in range(6)),
    LayerShape(terms=(((), 500),)),
)
"""Six layers, each a little larger than the one before."""


@pytest.mark.parametrize(
    ("ratio", "gone"), [(0.01, 1), (0.2, 1), (0.3, 2), (1 / 3, 2), (0.5, 3), (0.6, 4), (0.8, 5), (0.9, 5)]
)
def test_a_ratio_is_the_nearest_number_of_layers_but_at_least_one(ratio, gone):
    assert len(Depth(ratio=ratio).foresee(SIX).layers) == 6 - gone


@pytest.mark.parametrize("name", ["llama", "gemma3-vision", "gpt2"])
@pytest.mark.parametrize("params", [0.4, 0.5, 0.6, 0.75, 0.9, 0.999])
def test_no_other_number_of_layers_comes_nearer_to_the_parameters_asked_for(name, decoder, params, plugins):
    total = count_parameters(decoder.model).total
    shape = decoder.shape()
    sizes = [shape.keep(range(tiny.LAYERS - gone)).parameters for gone in range(1, tiny.LAYERS)]
    step = Depth(params=params, heal=False)
    foreseen = step.foresee(shape)
    assert abs(foreseen.parameters - params * total) <= min(abs(size - params * total) for size in sizes)
    conformance.pruned(step, decoder, tiny.windows(2), plugins)
    assert count_parameters(decoder.model).total == foreseen.parameters


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
    assert step.foresee(SIX).rest == SIX.rest


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
        ({"layers": 0}, "layers 0"),
        ({"layers": -2}, "layers -2"),
        ({"ratio": 0.0}, "ratio 0.0"),
        ({"ratio": 1.0}, "ratio 1.0"),
        ({"ratio": float("nan")}, "'ratio' of depth is nan"),
        ({"params": 1.5}, "params 1.5"),
        ({"params": -0.5}, "params -0.5"),
        ({"drop": ()}, r"drop the layers \[\]"),
        ({"drop": (1, 1)}, r"drop the layers \[1, 1\]"),
        ({"layers": 1, "shape": "greedy", "criterion": "taylor"}, "shape 'greedy'.* criterion 'taylor'"),
        ({"layers": 1, "damping": 0.0}, "damping 0.0"),
        ({"layers": 1, "damping": float("nan")}, "'damping' of depth is nan"),
        ({"layers": 1, "damping": float("inf")}, "'damping' of depth is inf"),
        ({"layers": 1, "protect_first": -1}, "protect_first -1"),
        ({"layers": 1, "protect_last": -3}, "protect_last -3"),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused(options, why):
    with pytest.raises(RecipeError, match=why) as caught:
        Depth(**options)
    assert "depth " in str(caught.value)
    assert str(caught.value).endswith(".")

from __future__ import annotations

import json

import pytest

from optimum_prune import Cuts
from optimum_prune.cuts import indices, ranges
from optimum_prune.errors import SurgeryError


@pytest.mark.parametrize(
    ("numbers", "text"),
    [((), ""), ((0,), "0"), ((0, 1), "0-1"), ((0, 1, 2, 5, 7, 8), "0-2,5,7-8"), ((3, 10, 11, 12, 100), "3,10-12,100")],
)
def test_ranges_and_indices_are_inverses(numbers, text):
    assert ranges(numbers) == text
    assert indices(text) == numbers


def test_ranges_sort():
    assert ranges([8, 0, 7, 1]) == "0-1,7-8"


@pytest.mark.parametrize(
    "cuts",
    [
        Cuts(),
        Cuts(layers=(0, 1, 4)),
        Cuts(channels={0: (1, 2, 9), 3: (0,)}),
        Cuts(layers=(2,), channels={11: tuple(range(0, 64, 2))}),
        Cuts(heads={0: (0,), 12: (1, 2, 5)}),
        Cuts(experts={3: ((0, 1, 2), (1, 5, 6)), 4: ((7,), (0,))}, shared={3: (0, 4, 5), 4: (2,)}),
        Cuts(experts={3: ((0, 8),)}),
        Cuts((0, 3), {0: (1,)}, {3: (2, 3)}, {5: ((0,), (1,))}, {5: (0,)}),
    ],
    ids=str,
)
def test_cuts_survive_json(cuts):
    assert Cuts.from_json(json.loads(json.dumps(cuts.to_json()))) == cuts


def test_cuts_of_different_parts_merge():
    merged = Cuts(channels={0: (1,)}).merge(Cuts(channels={1: (2,)})).merge(Cuts(layers=(0, 1)))
    assert merged == Cuts(layers=(0, 1), channels={0: (1,), 1: (2,)})


@pytest.mark.parametrize(
    ("cuts", "part"),
    [
        (Cuts(layers=(0,)), "decoder layers"),
        (Cuts(channels={3: (0,)}), "channels of layer 3"),
        (Cuts(heads={3: (0,)}), "heads of layer 3"),
        (Cuts(experts={3: ((0,),)}), "experts of layer 3"),
        (Cuts(shared={3: (0,)}), "shared of layer 3|shared experts of layer 3"),
    ],
    ids=["layers", "channels", "heads", "experts", "shared"],
)
def test_cutting_one_part_twice_is_refused(cuts, part):
    with pytest.raises(SurgeryError, match=part):
        cuts.merge(cuts)

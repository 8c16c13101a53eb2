from __future__ import annotations

import json

import pytest

from optimum_prune import Cuts
from optimum_prune.errors import SurgeryError
from optimum_prune.surgery.cuts import indices, ranges


@pytest.mark.parametrize(
    ("numbers", "text"),
    [((), ""), ((0,), "0"), ((0, 1), "0-1"), ((0, 1, 2, 5, 7, 8), "0-2,5,7-8"), ((3, 10, 11, 12, 100), "3,10-12,100")],
)
def test_ranges_and_indices_are_inverses(numbers, text):
    assert ranges(numbers) == text
    assert indices(text) == numbers


def test_ranges_sort():
    assert ranges([8, 0, 7, 1]) == "0-1,7-8"


EVERYTHING = Cuts(
    (0, 3),
    {1: ("feed_forward",)},
    {
        (None, "hidden"): (0, 1, 2, 7),
        (0, "channels"): (1,),
        (3, "heads"): (2, 3),
        (5, "experts"): ((0,), (1,)),
        (5, "shared"): (0,),
        (5, "whole_experts"): (0, 2),
        (11, "an axis of a plugin"): (4, 5),
    },
)


@pytest.mark.parametrize(
    "cuts",
    [
        Cuts(),
        Cuts(layers=(0, 1, 4)),
        Cuts(blocks={0: ("attention",), 10: ("feed_forward",)}),
        Cuts.along("channels", {0: (1, 2, 9), 3: (0,)}),
        Cuts((2,), units={(11, "channels"): tuple(range(0, 64, 2))}),
        Cuts.along("heads", {0: (0,), 12: (1, 2, 5)}),
        Cuts.along("experts", {3: ((0, 1, 2), (1, 5, 6)), 4: ((7,), (0,))}).merge(
            Cuts.along("shared", {3: (0, 4, 5), 4: (2,)})
        ),
        Cuts.along("experts", {3: ((0, 8),)}),
        Cuts.along("whole_experts", {3: (0, 2)}),
        Cuts.along("hidden", {None: (0, 1, 5)}),
        EVERYTHING,
    ],
    ids=str,
)
def test_cuts_survive_json(cuts):
    assert Cuts.from_json(json.loads(json.dumps(cuts.to_json()))) == cuts


def test_json_has_a_range_for_the_model_or_for_each_layer_and_each_expert():
    assert EVERYTHING.to_json() == {
        "layers": "0,3",
        "blocks": {"1": ["feed_forward"]},
        "hidden": "0-2,7",
        "channels": {"0": "1"},
        "heads": {"3": "2-3"},
        "experts": {"5": ["0", "1"]},
        "shared": {"5": "0"},
        "whole_experts": {"5": "0,2"},
        "an axis of a plugin": {"11": "4-5"},
    }


def test_what_is_cut_can_be_asked_by_layer_and_axis():
    assert EVERYTHING.kept(3, "heads") == (2, 3)
    assert EVERYTHING.kept(None, "hidden") == (0, 1, 2, 7)
    with pytest.raises(KeyError):
        EVERYTHING.kept(2, "heads")
    assert dict(EVERYTHING.of(5)) == {"experts": ((0,), (1,)), "shared": (0,), "whole_experts": (0, 2)}
    assert dict(EVERYTHING.of(2)) == {}
    assert EVERYTHING.touched == [0, 1, 3, 5, 11]


def test_cuts_of_different_parts_merge():
    merged = (
        Cuts.along("channels", {0: (1,)})
        .merge(Cuts.along("channels", {1: (2,)}))
        .merge(Cuts.along("heads", {1: (0,)}))
        .merge(Cuts(layers=(0, 1)))
        .merge(Cuts(blocks={2: ("attention",)}))
        .merge(Cuts.along("hidden", {None: (3,)}))
    )
    assert merged == Cuts(
        (0, 1),
        {2: ("attention",)},
        {(0, "channels"): (1,), (1, "channels"): (2,), (1, "heads"): (0,), (None, "hidden"): (3,)},
    )


@pytest.mark.parametrize(
    ("cuts", "part"),
    [
        (Cuts(layers=(0,)), "the decoder layers"),
        (Cuts(blocks={3: ("attention",)}), "the blocks of layer 3"),
        (Cuts.along("channels", {3: (0,)}), "the channels of layer 3"),
        (Cuts.along("heads", {3: (0,)}), "the heads of layer 3"),
        (Cuts.along("experts", {3: ((0,),)}), "the experts of layer 3"),
        (Cuts.along("shared", {3: (0,)}), "the shared of layer 3"),
        (Cuts.along("hidden", {None: (0,)}), "the hidden of the model"),
    ],
    ids=["layers", "blocks", "channels", "heads", "experts", "shared", "hidden"],
)
def test_cutting_one_part_twice_is_refused(cuts, part):
    with pytest.raises(SurgeryError, match=f"One pass cut {part} twice"):
        cuts.merge(cuts)

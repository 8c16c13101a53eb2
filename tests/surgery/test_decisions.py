"""Decisions of a stranger's pass that are none: each is said in a sentence that names the pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import tiny
import torch

from optimum_prune import Calibration, Cuts, Decision, Decoder, PrunePass
from optimum_prune.errors import PassError, SurgeryError
from optimum_prune.run.pruning import prune
from optimum_prune.surgery.decisions import check_decision

NORM = "model.norm.weight"


@dataclass(frozen=True, kw_only=True)
class Stranger(PrunePass):
    """Yields what it is given."""

    name: ClassVar[str] = "stranger"
    foresees_layers: ClassVar[bool] = False
    made: ClassVar[Any] = None

    def foresee(self, shape):
        return shape

    def decide(self, decoder, calibration):
        yield type(self).made


WRONG = [
    None,
    {"layers": (0, 1)},
    Cuts(),
    Decision(None),
    Decision({"layers": (0,)}),
    Decision(Cuts(layers=[0, 1.5])),
    Decision(Cuts(layers=(0, True))),
    Decision(Cuts(layers="0-2")),
    Decision(Cuts(layers=3)),
    Decision(Cuts(layers=torch.tensor([0, 1]))),
    Decision(Cuts(layers=(1, 1))),
    Decision(Cuts(layers=(2, 1))),
    Decision(Cuts(layers=(-1, 1))),
    Decision(Cuts(blocks=[(0, "attention")])),
    Decision(Cuts(blocks={"0": ("attention",)})),
    Decision(Cuts(blocks={0: "attention"})),
    Decision(Cuts(blocks={0: ("attention", "attention")})),
    Decision(Cuts(units=[0, 1])),
    Decision(Cuts(units={"channels": (0, 1)})),
    Decision(Cuts(units={(0, 1): (0, 1)})),
    Decision(Cuts(units={(0, "channels"): "0-3"})),
    Decision(Cuts(units={(0, "channels"): (0, 1.0)})),
    Decision(Cuts(units={(0, "experts"): ((0, 1), (1, 0))})),
    Decision(weights=[torch.ones(2)]),
    Decision(weights={NORM: [1.0]}),
    Decision(weights={3: torch.ones(2)}),
    Decision(weights={NORM: torch.ones(32, device="meta")}),
]
IMPOSSIBLE = [
    Decision(Cuts(layers=(0, 99))),
    Decision(Cuts(layers=())),
    Decision(Cuts(blocks={0: ("norm",)})),
    Decision(Cuts(blocks={0: ()})),
    Decision(Cuts.along("channels", {0: (0, 64)})),
    Decision(Cuts.along("colours", {0: (0,)})),
    Decision(weights={NORM: torch.ones(3)}),
    Decision(weights={NORM: torch.full((32,), float("nan"))}),
    Decision(weights={"model.nothing": torch.ones(32)}),
]


@pytest.fixture(scope="module")
def decoder(plugins):
    return Decoder.of(tiny.model("llama"), plugins.families)


@pytest.mark.parametrize(
    ("made", "error"),
    [*((each, PassError) for each in WRONG), *((each, SurgeryError) for each in IMPOSSIBLE)],
    ids=str,
)
def test_what_is_no_decision_or_cannot_be_carried_out_is_said_in_a_sentence_with_the_pass(
    made, error, decoder, plugins
):
    Stranger.made = made
    with pytest.raises(error, match="The pass 'stranger' ") as caught:
        prune(Stranger(), decoder, Calibration(tiny.windows(2)), plugins)
    assert str(caught.value).isprintable()


def test_numbers_of_numpy_and_lists_are_taken():
    check_decision(Decision(Cuts(layers=[np.int64(0), 2], units={(0, "experts"): [[0, 1], [1, 2]]})), "mine")

"""Models whose layers differ, filled up with zeros: they compute the same, and are stock checkpoints."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from optimum_prune import Cuts
from optimum_prune import testing as conformance
from optimum_prune.surgery.padding import padded

WINDOWS = tiny.windows(2)
GONE = Cuts(blocks={0: ("feed_forward",), 2: ("attention",), 4: ("feed_forward",)})


def random_cuts(decoder):
    """Of some layers other units each."""
    cuts, choose = Cuts(), conformance.at_random(0)
    wanted = {1: {"channels": 24, "heads": 1}, 3: {"channels": 40}, 5: {"heads": 1}}
    every = {axis for layer in decoder.layers for axis in layer.axes if axis in ("channels", "heads")}
    for index, units in wanted.items():
        of_all = conformance.cuts_to(decoder, choose, {name: keep for name, keep in units.items() if name in every})
        kept = {(layer, name): some for (layer, name), some in of_all.units.items() if layer == index}
        cuts = cuts.merge(Cuts(units=kept))
    return cuts


@pytest.mark.parametrize("name", tiny.FAMILIES)
@pytest.mark.parametrize("blocks", [False, True], ids=["all blocks", "blocks gone"])
def test_it_computes_the_same_and_is_a_stock_checkpoint(name, blocks, decoder, tmp_path):
    cuts = random_cuts(decoder)
    dense = decoder.shape()
    conformance.cut(decoder, cuts.merge(GONE) if blocks else cuts)
    model, before = decoder.model, decoder.shape()
    expected = conformance.logits(model, WINDOWS)
    whole = padded(decoder)
    assert type(whole.model) is type(tiny.model(name))
    assert_close(conformance.logits(whole.model, WINDOWS), expected, rtol=1e-5, atol=1e-5)
    assert decoder.shape() == before
    assert torch.equal(conformance.logits(model, WINDOWS), expected)
    assert whole.shape() == dense != before
    whole.model.save_pretrained(tmp_path)
    found = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(found) is type(whole.model)
    assert torch.equal(conformance.logits(found, WINDOWS), conformance.logits(whole.model, WINDOWS))
    conformance.generates_as_it_scores(found, WINDOWS)

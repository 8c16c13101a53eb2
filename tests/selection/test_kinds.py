from __future__ import annotations

import pytest
import tiny
import torch

from optimum_prune import Calibration
from optimum_prune.anatomy.workload import Workload
from optimum_prune.selection.kinds import TextKinds, held_out_work


def rows(windows) -> set[tuple[int, ...]]:
    return {tuple(row) for row in windows.tokens.tolist()}


@pytest.mark.parametrize("name", ["llama"])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 9, 12])
def test_what_is_measured_on_is_not_fitted_to(name, count, decoder):
    given = tiny.windows(16, 25)
    texts = TextKinds.with_own(decoder, Calibration(given), count)
    assert len(texts.all) == 16 + count
    assert sum(len(each) for each in (texts.own, texts.continued) if each is not None) == count
    fitted, held_out = texts.fitted(6), texts.held_out()
    assert len(fitted) <= 6 + 6
    assert rows(fitted) <= rows(texts.all)
    single = texts.own is not None and len(texts.own) == 1  # which serves for both
    assert not rows(held_out["the text given"]) & rows(fitted)
    if "the model's own" in held_out and not single:
        assert not rows(held_out["the model's own"]) & rows(fitted)
    twice = held_out["a passage twice"]
    assert torch.equal(twice.tokens[:, :12], twice.tokens[:, 13:])
    assert torch.equal(twice.tokens[:, :13], held_out["the text given"].tokens[:, :13])
    assert {each.length for each in held_out.values()} == {25}
    work = held_out_work(Workload(8, 8, 4, 16, 25), count)
    assert work.windows == sum(map(len, held_out.values()))


@pytest.mark.parametrize("name", ["llama"])
def test_passages_to_continue_are_none_that_is_measured_on(name, decoder):
    given = tiny.windows(16, 25)
    texts = TextKinds.with_own(decoder, Calibration(given), 30)
    begun = {tuple(row[:6]) for row in texts.continued.tokens.tolist()}
    measured = {tuple(each) for row in given.part(slice(12, None)).tokens.unfold(1, 6, 1) for each in row.tolist()}
    assert not begun & measured

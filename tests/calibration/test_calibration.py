from __future__ import annotations

import pytest
import tiny
import torch

from optimum_prune import Calibration, Cuts, Decision
from optimum_prune.machine.activation_store import InMemory, MappedActivations
from optimum_prune.machine.progress import Progress
from optimum_prune.surgery import operation


class Bars(Progress):
    """Remembers what is counted."""

    def __init__(self):
        super().__init__()
        object.__setattr__(self, "seen", [])

    def track(self, items, description):
        self.seen.append(description)
        yield from items


def test_it_holds_windows_and_makes_do_with_them():
    windows = tiny.windows(3, padded=True)
    calibration = Calibration(windows)
    assert calibration.tokens is windows.tokens
    assert calibration.mask is windows.mask
    assert isinstance(calibration.activations, InMemory)
    tokens = Calibration.from_tokens(windows.tokens, "a text", bos=True)
    assert tokens.mask.all()
    assert (tokens.windows.source, tokens.windows.bos) == ("a text", True)


def test_without_a_journal_everything_is_computed_each_time():
    calibration, asked = Calibration(tiny.windows(1)), []
    for _ in range(2):
        assert calibration.once("a sum", lambda: asked.append(1) or len(asked)) == len(asked)
    assert len(asked) == 2


def test_a_journal_is_asked_by_name():
    class Journal:
        def once(self, what, compute):
            return what, compute()

    calibration = Calibration(tiny.windows(1), journal=Journal())
    assert calibration.once("scores", lambda: [1.0]) == ("scores", [1.0])
    assert calibration.on(tiny.windows(2)).once("scores", lambda: 2) == ("scores", 2), "other windows, same journal"


@pytest.mark.parametrize("name", ["llama"])
def test_bars_are_shown_unless_it_is_quiet(name, decoder):
    progress = Bars()
    calibration = Calibration(tiny.windows(2), progress=progress)
    list(calibration.walk(decoder, "looking"))
    list(calibration.track("abc", "letters"))
    list(calibration.quiet().walk(decoder, "in silence"))
    assert progress.seen == ["looking", "letters"]


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_moe"])
@pytest.mark.parametrize("budget", [0, 40_000])
def test_where_activations_are_kept_changes_nothing(name, decoder, budget, tmp_path):
    windows = tiny.windows(5, padded=True)

    def walked(calibration, decoder):
        for visit in calibration.walk(decoder, ""):
            grams = []
            for axis in visit.layer.axes.values():
                if axis.output and not axis.follows:
                    (found,) = visit.grams(axis)
                    grams += [gram.exact for gram in found]
            yield [*(hidden.clone() for _, hidden in visit.stream), *grams]

    on_disk = Calibration(windows, MappedActivations(tmp_path / "activations", budget))
    for found, expected in zip(walked(on_disk, decoder), walked(Calibration(windows), decoder), strict=True):
        assert len(found) == len(expected) > 1
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["llama"])
def test_a_visit_sees_the_layer_as_earlier_cuts_left_it(name, decoder):
    for visit in Calibration(tiny.windows(2)).walk(decoder, ""):
        if visit.index == 2:
            assert visit.layer.axes["channels"].units == 9
            break
        operation.carry_out(
            decoder, Decision(Cuts.along("channels", {2: tuple(range(9))}) if not visit.index else Cuts())
        )

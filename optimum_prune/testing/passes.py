"""The check of a pass that works on a model in memory: what it foresees comes out, the same each time, and reloads."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.testing import assert_close

from optimum_prune.anatomy.decoder import Decoder
from optimum_prune.calibration.calibration import Calibration
from optimum_prune.checkpoint.taking import taken
from optimum_prune.errors import RecipeError, shown
from optimum_prune.hooks.plugins import Plugins, load
from optimum_prune.machine.given_files import named
from optimum_prune.passes.outcome import Outcome
from optimum_prune.passes.prune import PrunePass
from optimum_prune.run.pruning import prune
from optimum_prune.surgery.config import sync_config
from optimum_prune.surgery.cuts import Cuts, Decision
from optimum_prune.surgery.operation import carry_out
from optimum_prune.testing.models import generates_as_it_scores, logits, random_windows, reloads_exactly
from optimum_prune.text.domains import apart
from optimum_prune.text.windows import Windows
from optimum_prune.training.lesson import Lesson

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def pruned(step: PrunePass, decoder: Decoder, windows: Windows, plugins: Plugins) -> Outcome:
    """A pruning pass carried out on a model in place, as a run does it; one that trains is trained on the windows."""
    with _lesson(step, windows) as lesson:
        return prune(step, decoder, Calibration(windows), plugins, lesson=lesson)


@contextmanager
def _lesson(step: PrunePass, windows: Windows) -> Iterator[Lesson | None]:
    """What a pass is trained on, if it is one that trains."""
    with tempfile.TemporaryDirectory() as folder:
        yield Lesson((apart("the windows", windows),), Path(folder) / step.name) if step.trains else None


def check_pass(step: PrunePass, model: PreTrainedModel, folder: Path) -> Outcome:
    """Checks a pruning pass on a small model in float32, which stays as it is.

    It must change nothing itself, leave what it foresees, decide the same each time, and leave a model that reloads with the very
    same logits and generates as it scores.

    Args:
        folder: an empty folder for a checkpoint.

    Raises:
        AssertionError: it does not.
        OptimumPruneError: it cannot be carried out on this model.
    """
    if isinstance(step, type) or not hasattr(step, "decide"):
        raise RecipeError(
            f"{shown(step)} is given where a pass should be. Give one with its options, such as Depth(layers=1)."
        )
    model, folder = taken(model), named(folder, "folder")
    plugins = load()
    windows = random_windows(model.config.get_text_config().vocab_size)
    decoder, again = (Decoder.of(copy.deepcopy(model).eval(), plugins.families) for _ in range(2))
    foreseen = step.foresee(decoder.shape())
    outcome = pruned(step, decoder, windows, plugins)
    if step.foresees_layers:
        left = len(decoder)
        assert left == len(foreseen.layers), f"{left} layers are left, and {len(foreseen.layers)} were foreseen."
    assert outcome.cuts == _decided_alone(step, again, windows), "It decides another way each time."
    assert_close(logits(decoder.model, windows), logits(again.model, windows), rtol=0, atol=0)
    generates_as_it_scores(reloads_exactly(decoder.model, folder, windows), windows)
    return outcome


def _decided_alone(step: PrunePass, decoder: Decoder, windows: Windows) -> Cuts:
    """What a pass decides, which is carried out; it must change no weight itself."""
    with _lesson(step, windows) as lesson:
        decide: Callable[..., Iterator[Decision]] = step.decide
        given = (decoder, Calibration(windows), *([] if lesson is None else [lesson]))
        return _carried_out(decoder, decide(*given))


def _carried_out(decoder: Decoder, decisions: Iterator[Decision]) -> Cuts:
    """The cuts of decisions, when they are carried out."""
    cuts = Cuts()
    while True:
        before = {name: value.detach().clone() for name, value in decoder.model.named_parameters()}
        decision = next(decisions, None)
        for name, value in decoder.model.named_parameters():
            same = name in before and torch.equal(value, before[name])
            assert same, (
                f"It changed '{name}' itself, where it is to decide only, and to give new weights with its decision."
            )
        if decision is None:
            sync_config(decoder)
            return cuts
        carry_out(decoder, decision)
        cuts = cuts.merge(decision.cuts)

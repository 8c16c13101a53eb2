"""Healing a model that whole layers or blocks are left out of, by least squares: no training, and no parameter more.

In front of each gap, the output projections of attention and of the FFN are refitted so that the hidden states behind their layer come
near to what those of the dense model are behind the gap; attention takes half of the way, the FFN what then is left. Behind
the gap, every layer's projections are moved some way towards the dense model's hidden states, the farther from the gap the less: all
the way would fit the calibration text too closely.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from optimum_prune import layerwise
from optimum_prune.cuts import Decision
from optimum_prune.errors import NumericalError
from optimum_prune.progress import Progress
from optimum_prune.reconstruction import refitted

SHARE = 0.5
"""How much of the way over a gap attention is to go."""
CORRECTION, FADING = 0.4, 0.85
"""How far the first layer behind a gap is moved towards the dense model, and how much less each one behind."""
DAMPING = 0.15
"""Of these corrections."""

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor
    from transformers import PreTrainedModel

    from optimum_prune.anatomy import Family
    from optimum_prune.calibration import Calibration
    from optimum_prune.layerwise import Visit


def heal(
    model: PreTrainedModel,
    family: Family,
    calibration: Calibration,
    kept: Mapping[int, Sequence[str]],
    damping: float,
    progress: Progress,
) -> Iterator[Decision]:
    """New weights for what stays in front of each gap, one decision after the other; what is to go is still there.

    A gap at the very beginning stays as it is, and so does what has a norm behind it, or a mixture of experts in front of it.

    Args:
        kept: of each layer, the blocks that stay; of a layer that goes, none.
        damping: added to the gram's diagonal, relative to its mean.
    """
    visits = layerwise.walk(model, family, calibration, progress, "Healing")
    dense = layerwise.walk(model, family, calibration, Progress(), "")
    strength = 0.0
    for visit, reference in zip(visits, dense, strict=True):
        blocks = kept[visit.index]
        if not blocks:
            visit.skip()
            reference.leave()
            if reason := _not_finite(reference, f"Decoder layer {visit.index}"):
                yield Decision(evidence={"not_healed": reason})
                return
            continue
        missing = [block for block in family.blocks_of(visit.layer) if block not in blocks]
        gap = _gap_behind(visit.index, kept)
        visit.leave_out(missing)
        attended = reference.attended() if gap or missing or strength else []
        reference.leave()
        behind = [hidden for _, hidden in reference.stream]
        layerwise.check_finite(behind, f"Decoder layer {visit.index}", visit.shelf)
        if gap or missing:
            try:
                goal = through(model, family, reference, gap)
            except NumericalError as error:
                yield Decision(evidence={"not_healed": str(error)})
                return
            yield from _bridge(visit, family, blocks, attended, behind, goal, damping, progress)
            strength = CORRECTION
        elif strength:
            yield from _correct(visit, family, blocks, attended, behind, strength, progress)
            strength *= FADING


def _not_finite(reference: Visit, what: str) -> str:
    """What is wrong with the dense model's hidden states, if they are not finite."""
    try:
        layerwise.check_finite((hidden for _, hidden in reference.stream), what, reference.shelf)
    except NumericalError as error:
        return str(error)
    return ""


def _bridge(
    visit: Visit,
    family: Family,
    blocks: Sequence[str],
    attended: list[Tensor],
    behind: list[Tensor],
    goal: list[Tensor],
    damping: float,
    progress: Progress,
) -> Iterator[Decision]:
    """Refits what is left of a layer so that it puts out the goal, which lies behind the gap."""
    path = projection(visit, family, blocks)
    if path is None:
        return
    if len(blocks) > 1:
        wanted = []
        for middle, far, near in zip(attended, goal, behind, strict=True):
            wanted.append(visit.keep(middle + far.to(middle.device) - near))
            visit.put_back(middle, far, near)
        yield from _refit(visit, family, wanted, damping, family.attention_output, SHARE, progress)
    yield from _refit(visit, family, goal, damping, path, 1.0, progress)


def _correct(
    visit: Visit,
    family: Family,
    blocks: Sequence[str],
    attended: list[Tensor],
    behind: list[Tensor],
    strength: float,
    progress: Progress,
) -> Iterator[Decision]:
    """Moves what a layer puts out some way towards what it puts out in the dense model."""
    if "attention" in blocks:
        yield from _refit(visit, family, attended, DAMPING, family.attention_output, strength, progress)
    if projection(visit, family, blocks) == family.feed_forward.output:
        yield from _refit(visit, family, behind, DAMPING, family.feed_forward.output, strength, progress)


def _refit(
    visit: Visit,
    family: Family,
    goal: list[Tensor],
    damping: float,
    path: str,
    strength: float,
    progress: Progress,
) -> Iterator[Decision]:
    """New weights of one projection; none where a norm follows it."""

    def refit() -> Decision | None:
        weights = refitted(visit, family, goal, damping, path, strength)
        evidence = {"healed": visit.index, "projection": path, "strength": strength}
        return Decision(weights=weights, evidence=evidence) if weights else None

    if decision := progress.once(f"{path} of layer {visit.index}", refit):
        yield decision


def projection(visit: Visit, family: Family, blocks: Sequence[str]) -> str | None:
    """Path of the projection in the visited layer that can be refitted, if only these blocks of it stay."""
    if "feed_forward" in blocks:
        return family.feed_forward.output if family.experts_of(visit.layer) is None else None
    return family.attention_output


@torch.no_grad()
def through(model: PreTrainedModel, family: Family, visit: Visit, layers: range) -> list[Float[Tensor, "w t h"]]:
    """Hidden states behind some consecutive layers, from those of a visit, batch by batch.

    Raises:
        NumericalError: a layer puts out a value that is not finite.
    """
    behind = [hidden for _, hidden in visit.stream]
    for index in layers:
        for position, (batch, _) in enumerate(visit.stream):
            before = behind[position]
            behind[position] = visit.keep(layerwise.run_layers(model, family, batch, before, [index]))
            visit.put_back(before)
        layerwise.check_finite(behind, f"Decoder layer {index}", visit.shelf)
    return behind


def _gap_behind(index: int, kept: Mapping[int, Sequence[str]]) -> range:
    """The layers right behind a layer that go."""
    end = index + 1
    while end in kept and not kept[end]:
        end += 1
    return range(index + 1, end)

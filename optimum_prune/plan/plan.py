"""The plan of a run: a recipe and the model that it is for, checked, and what follows from both before a weight is read.

`compress plan` prints what a plan costs, and a run carries it out; neither decides anything that the plan has decided.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from optimum_prune.anatomy.decoder import Decoder
from optimum_prune.anatomy.family import Family, find_family
from optimum_prune.anatomy.shape import Shape
from optimum_prune.checkpoint.loading import dtype_of
from optimum_prune.checkpoint.opening import length_limit, meta_model
from optimum_prune.hooks.plugins import Plugins
from optimum_prune.passes.base import Pass
from optimum_prune.passes.checkpoint_spec import CheckpointSpec
from optimum_prune.plan.checks import check_conversions, foresee, look_at
from optimum_prune.plan.source import ModelSource, device_of
from optimum_prune.recipe import Recipe
from optimum_prune.text.text import Wanted, window_counts
from optimum_prune.text.windows import Texts

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Plan:
    """What a recipe will do to a model."""

    recipe: Recipe
    source: ModelSource
    """The model."""
    family: Family
    shapes: tuple[Shape, ...]
    """Of the model before the first pass, and after each."""
    dtype: torch.dtype
    """Of the weights, as loaded and as saved."""
    device: str
    calibration: Wanted
    """The windows that are asked for to choose by."""
    evaluation: Wanted
    """The windows that are asked for to report on."""

    @property
    def resolved(self) -> Recipe:
        """The recipe with the model that it is carried out on."""
        return replace(self.recipe, settings=replace(self.recipe.settings, model=self.source.name))

    @property
    def config(self) -> PreTrainedConfig:
        """The config of the decoder, as it is before the recipe."""
        return self.family.text_config(self.source.config)

    @property
    def offloads(self) -> bool:
        """Whether the weights stay on disk."""
        return self.source.offloads

    @property
    def activation_budget(self) -> float:
        """Bytes of activations that are kept in memory."""
        return self.recipe.settings.activation_budget(self.offloads)

    @property
    def needs_teacher(self) -> bool:
        """Whether a pass looks at the dense model."""
        return any(self.teaches(step) for step in self.recipe.in_memory)

    def teaches(self, step: Pass) -> bool:
        """Whether a pass looks at the dense model, or is told by it what loss of each domain is to be reached."""
        return step.needs_teacher or (step.trains and self.recipe.training.measures_references)

    @property
    def teacher_bytes(self) -> int:
        """Bytes that the dense model takes beside the one that is pruned; none where it is mapped from its files."""
        mapped = self.source.mappable or not self.source.resident
        return self.bytes_of(self.shapes[0]) if self.needs_teacher and not mapped else 0

    @property
    def disk(self) -> int:
        """Bytes of the checkpoint that the passes in memory leave."""
        return self.bytes_of(self.shapes[-1])

    def bytes_of(self, shape: Shape) -> int:
        """What the weights of a model of this shape take."""
        return shape.parameters * self.dtype.itemsize


def make_plan(recipe: Recipe, plugins: Plugins, source: ModelSource, texts: Texts | None = None) -> Plan:
    """The plan of a recipe for a model that is opened; reads no weight.

    Args:
        texts: token windows, if they are given and not drawn from the texts that the recipe names.

    Raises:
        OptimumPruneError: whatever would make the run fail that can be known beforehand.
    """
    family = find_family(source.config, plugins.families)
    model = Decoder(meta_model(source.config, recipe.settings.trust_remote_code), family)
    look_at(recipe.in_memory, model)
    shapes = foresee(recipe.passes, model.shape())
    check_conversions(recipe.conversions, CheckpointSpec(source.config, family, shapes[-1]))
    calibration, evaluation = _windows(recipe, texts, length_limit(family.text_config(source.config)))
    return Plan(
        recipe,
        source,
        family,
        shapes,
        dtype=dtype_of(source.config, recipe.settings.dtype),
        device=device_of(recipe.settings),
        calibration=calibration,
        evaluation=evaluation,
    )


def _windows(recipe: Recipe, texts: Texts | None, limit: int) -> tuple[Wanted, Wanted]:
    """Number and length of the windows to choose by and to report on, as they are given or asked for."""
    if texts is None:
        return window_counts(recipe.calibration, recipe.evaluation, limit)
    texts.check(limit)
    chosen, reported = texts.calibration, texts.evaluation or texts.calibration.part(slice(0))
    return Wanted(len(chosen), chosen.length), Wanted(len(reported), reported.length)

"""What is checked of a recipe, a model and texts before a weight is read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from optimum_prune.anatomy.shape import Shape
from optimum_prune.errors import OutputError, PassError, RecipeError, SurgeryError, shown
from optimum_prune.machine.isolation import guarded
from optimum_prune.passes.base import Pass
from optimum_prune.passes.checkpoint_spec import CheckpointSpec
from optimum_prune.passes.folder import FolderPass
from optimum_prune.plan.source import device_of
from optimum_prune.text.windows import Texts

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from optimum_prune.anatomy.decoder import Decoder
    from optimum_prune.recipe import Recipe


def foresee(steps: Iterable[Pass], shape: Shape) -> tuple[Shape, ...]:
    """The shape before the first pass and after each, from the options alone.

    Raises:
        RecipeError: a pass asks for more than a model of its shape has.
    """
    shapes = [shape]
    for step in steps:
        dense, left = (each.rest.units("hidden") for each in (shape, shapes[-1]))
        if step.compares_hidden and left != dense:
            raise RecipeError(
                f"'{step.name}' compares hidden states with those of the dense model, which have {dense} features, and those of the model in front "
                f"of it will have {left}. Recover it by predictions alone: distill, without 'hidden'."
            )
        shapes.append(foreseen(step, shapes[-1]))
    return tuple(shapes)


def look_at(steps: Iterable[Pass], model: Decoder) -> None:
    """Lets passes look at the model, whose weights hold nothing.

    Raises:
        RecipeError: one asks for what it has not.
    """
    for step in steps:
        with guarded(f"The pass '{step.name}'"):
            step.look_at(model)


def foreseen(step: Pass, shape: Shape) -> Shape:
    """The shape that a pass foresees to leave of a model of this shape.

    Raises:
        RecipeError: it asks for more than there is.
        PassError: it fails, or foresees something else.
    """
    with guarded(f"The pass '{step.name}'"):
        found = step.foresee(shape)
    if not isinstance(found, Shape):
        raise PassError(f"The pass '{step.name}' foresees {shown(found)}, which is no Shape. Mend the pass.")
    return found


def check_given(shape: Shape, described: Shape, name: str) -> None:
    """Refuses a model in memory that is not as its config says, as one is whose layers were taken out by hand.

    Args:
        described: the shape that its config describes.

    Raises:
        SurgeryError: it would be saved with a config that does not fit it.
    """
    if not shape.layers:
        raise SurgeryError(f"{name} has no decoder layers, so there is nothing to prune. Give a model that has some.")
    if [(layer.axes, layer.blocks) for layer in shape.layers] != [
        (layer.axes, layer.blocks) for layer in described.layers
    ]:
        raise SurgeryError(
            f"{name} has {shape.describe()}, and its config describes {described.describe()}, so it could not be loaded again. Write into "
            f"model.config what it has, such as num_hidden_layers, before it is pruned."
        )


def check_conversions(steps: Iterable[FolderPass], spec: CheckpointSpec) -> None:
    """Lets passes from folder to folder look at what they will get.

    Raises:
        RecipeError: one could not convert it.
    """
    for step in steps:
        if spec.heterogeneous and not step.takes_heterogeneous:
            raise RecipeError(
                f"'{step.name}' cannot read a model whose layers differ in shape or lack a block, as the passes before it leave it. Prune every "
                f"layer alike (osscar without `allocation: global` and `protect`; depth; block-pruner with `stock: true`), or run 'padded' instead, and "
                f"'{step.name}' on the stock checkpoint that it writes."
            )
        if not step.takes_experts and any(layer.routed for layer in spec.shape.layers):
            raise RecipeError(
                f"'{step.name}' would leave the experts of this mixture as they are, and so most of its weights: it knows linear layers only. "
                f"Leave '{step.name}' out."
            )
        with guarded(f"The pass '{step.name}'"):
            step.check(spec)


def check_texts(texts: Texts, config: PreTrainedConfig) -> None:
    """Refuses token windows that are of another tokenizer than the model's.

    Args:
        config: of the decoder.

    Raises:
        RecipeError: the model does not know one of their tokens.
    """
    every = (texts.calibration, texts.evaluation, *texts.taught)
    largest = max(int(windows.tokens.max()) for windows in every if windows is not None)
    if largest >= config.vocab_size:
        raise RecipeError(
            f"The text has the token {largest}, and the model knows {config.vocab_size}. Use the tokenizer that belongs to the model."
        )


def check_disk(folder: Path, needed: int) -> None:
    """Refuses an output for which there is no room.

    Args:
        folder: one beside the output.
        needed: bytes of the compressed model, and of what is kept until it is there.

    Raises:
        OutputError: there are fewer.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"The run takes {needed / 1e9:.1f} GB on disk, and {folder.parent} has {free / 1e9:.1f} GB left. Make room, or name an "
            f"--output elsewhere."
        )


def check_launch(recipe: Recipe) -> None:
    """Refuses to train a model that processes would share out among them: each is to hold all of it. By FSDP, accelerate never does on CPUs.

    Raises:
        RecipeError: accelerate was told to.
    """
    ways = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}
    asked = [way for name, way in ways.items() if os.environ.get(name, "").lower() in ("1", "true", "yes")]
    trained = [step.name for step in recipe.passes if step.trains]
    if asked and trained and not (asked == ["FSDP"] and device_of(recipe.settings) == "cpu"):
        raise RecipeError(
            f"accelerate is to share out the model among processes by {asked[0]}, and '{trained[0]}' trains one that each process holds whole. "
            f"Launch it without {asked[0]}; where memory is short, take 'lora' or 'reconstruct'."
        )

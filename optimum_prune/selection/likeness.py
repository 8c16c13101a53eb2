"""The shape of one model as the target of another."""

from __future__ import annotations

from dataclasses import replace

from optimum_prune.anatomy.shape import AxisShape, LayerShape, Shape
from optimum_prune.errors import RecipeError
from optimum_prune.selection.targets import check_size, hidden_axis


def as_narrow_as(step: str, shape: Shape, target: Shape, model: str) -> Shape:
    """With as many units of each layer, and of hidden states, as another model has in layers of the same axes.

    Args:
        step: the pass, for errors, as for `model`, which is that other model's name.

    Raises:
        RecipeError: the other model has layers of other axes, or units that no cut leaves.
    """
    found = replace(shape, layers=tuple(_narrowed(step, layer, target, model) for layer in shape.layers))
    features, left = shape.rest.units("hidden"), target.rest.units("hidden")
    if left == features:
        return found
    check_size(step, f"hidden_size like {model}", left, hidden_axis(step, shape))
    return found.narrowed({"hidden": left})


def _narrowed(step: str, layer: LayerShape, target: Shape, model: str) -> LayerShape:
    names = {axis.name for axis in layer.axes}
    like = next((each for each in target.layers if {axis.name for axis in each.axes} == names), None)
    if like is None:
        raise RecipeError(
            f"{step} is to leave the shape of {model}, whose layers are made up otherwise than those of this model. Give the sizes instead of "
            f"'like'."
        )
    units = {}
    for axis in layer.axes:
        wanted = like.axis_named(axis.name)
        if axis.name == "hidden":
            continue
        if axis.inner:
            _check_unit(step, axis, wanted, model)
            units[axis.name] = wanted.units
        elif wanted.units != axis.units:
            raise RecipeError(
                f"{step} is to leave the shape of {model}, which has {wanted.units} {axis.units_are} where this model has {axis.units}, and "
                f"these it keeps. Let another pass see to them, or give the sizes instead of 'like'."
            )
    return layer.narrowed(units)


def _check_unit(step: str, axis: AxisShape, wanted: AxisShape, model: str) -> None:
    """Refuses units of another size, and a number of them that cannot be said."""
    if (axis.width, dict(axis.pinned)) != (wanted.width, dict(wanted.pinned)):
        raise RecipeError(
            f"{step} is to leave the shape of {model}, whose {axis.units_are} are of another size than those of this model, which no cut "
            f"changes. Name a model in which they are alike, or give the sizes instead of 'like'."
        )
    if wanted.units != axis.units:
        check_size(step, f"{axis.size} like {model}", wanted.units, axis)


def check_alike(step: str, found: Shape, target: Shape, model: str) -> None:
    """Refuses to leave layers of another size than those of the model that is the target.

    Raises:
        RecipeError: naming both sizes.
    """
    sizes = [sum(layer.parameters for layer in each.layers) for each in (found, target)]
    if sizes[0] != sizes[1]:
        raise RecipeError(
            f"{step} is to leave the shape of {model}, whose layers have {sizes[1]:,} parameters, and would leave {sizes[0]:,}, since something "
            f"else differs, such as biases. Give the sizes instead of 'like'."
        )

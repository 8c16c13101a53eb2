"""To how many units the axes of a model are to be narrowed, for a ratio or for a number of parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from optimum_prune.anatomy.shape import AxisShape, LayerShape, Shape
from optimum_prune.errors import RecipeError

LARGEST_MULTIPLE = 64


def check_named_once(step: str, protect: Sequence[int]) -> None:
    """Refuses layers to protect that are named twice, or counted from the end.

    Raises:
        RecipeError: naming the pass.
    """
    if len(set(protect)) < len(protect) or any(index < 0 for index in protect):
        raise RecipeError(f"{step} is to protect the layers {list(protect)}. Name each once, counted from 0.")


def check_protected(step: str, protect: Collection[int], shape: Shape) -> None:
    """Refuses layers to protect that are not there, or that are all there are.

    Raises:
        RecipeError: naming the pass.
    """
    unknown = [index for index in protect if index >= len(shape.layers)]
    if unknown:
        raise RecipeError(
            f"{step} is to protect the layer {unknown[0]}, but there are only 0 to {len(shape.layers) - 1}."
        )
    if len(protect) == len(shape.layers):
        raise RecipeError(f"{step} is to protect every layer, so there is nothing to prune. Leave some out.")


def hidden_axis(step: str, shape: Shape) -> AxisShape:
    """The axis of the features of hidden states.

    Raises:
        RecipeError: there is none; naming the pass.
    """
    axis = next((axis for axis in shape.rest.axes if axis.name == "hidden"), None)
    if axis is None:
        raise RecipeError(
            f"{step} is to make hidden states narrower, and the config of this architecture cannot say another size. Use another pass."
        )
    return axis


def sizes_of(axis: AxisShape) -> list[int]:
    """The smaller numbers of units that a config can say and kernels take."""
    return [count for count in axis.fewer if count % axis.multiple == 0]


def check_size(step: str, option: str, size: int, axis: AxisShape) -> None:
    """Refuses a number of units that cannot be said.

    Args:
        option: of the pass, in which it was given.

    Raises:
        RecipeError: naming the nearest that can be.
    """
    sizes = sizes_of(axis)
    if size in sizes:
        return
    if size >= axis.units or not sizes:
        raise RecipeError(
            f"{step} has {option} {size}, and there are {axis.units} {axis.units_are}"
            + (
                ". Ask for fewer."
                if sizes
                else f", of which the config of this architecture can say no fewer. Leave {option} out."
            )
        )
    near = sorted(sizes, key=lambda count: (abs(count - size), count))[:2]
    raise RecipeError(
        f"{step} has {option} {size}, and of {axis.units} {axis.units_are} the config of this architecture cannot say that so many stay, since "
        f"its sizes have to go together. The nearest that it can say: {' and '.join(map(str, sorted(near)))}."
    )


@dataclass(frozen=True)
class Target:
    """Which layers are narrowed, along the axes in front of the output of which block, and to multiples of what.

    Its errors name the pass that asks, and the option that it was given.
    """

    step: str
    """The pass."""
    block: str
    protect: Collection[int] = ()
    """Layers that stay as they are."""
    multiple_of: int | None = None
    """64 if not given, or less for narrow layers."""

    def _each(self, shape: Shape, change: Callable[[LayerShape], LayerShape]) -> Shape:
        layers = (layer if index in self.protect else change(layer) for index, layer in enumerate(shape.layers))
        return replace(shape, layers=tuple(layers))

    def narrowed(self, shape: Shape, ratio: float) -> Shape:
        """With about this fraction of the units removed from every layer that is not protected."""

        def narrow(layer: LayerShape) -> LayerShape:
            return layer.narrowed({axis.name: self.kept(axis, ratio) for axis in layer.within(self.block)})

        return self._each(shape, narrow)

    def with_whole_units_removed(self, shape: Shape, ratio: float, option: str, fewer: str) -> Shape:
        """With about this fraction removed of units that are few, and not of all numbers of which a config can say.

        Args:
            option: in which the ratio was given.
            fewer: what the config would have to say.

        Raises:
            RecipeError: a layer has no such axis, or the config cannot say that number.
        """

        def narrow(layer: LayerShape) -> LayerShape:
            axes = layer.within(self.block)
            if not axes:
                raise RecipeError(
                    f"{self.step} has a {option}, but the config of this architecture cannot say that there are {fewer}. "
                    f"Leave {option} out."
                )
            return layer.narrowed({axis.name: self._whole(axis, ratio, option) for axis in axes})

        return self._each(shape, narrow)

    def _whole(self, axis: AxisShape, ratio: float, option: str) -> int:
        wanted = min(max(round(axis.units * (1 - ratio)), 1), axis.units - 1)
        if wanted in axis.fewer:
            return wanted
        raise RecipeError(
            f"{self.step} has {option} {ratio}, which keeps {wanted} of {axis.units} {axis.units_are}, and the config of this "
            + (
                f"architecture allows {', '.join(map(str, axis.fewer))}, so that its sizes go together. Choose another {option}."
                if axis.fewer
                else f"architecture allows no fewer. Leave {option} out."
            )
        )

    def solved(self, shape: Shape, parameters: float, total: int) -> Shape:
        """With the widths that bring the model nearest to this many parameters.

        Args:
            total: of the model before the pass, for errors.

        Raises:
            RecipeError: no width does.
        """
        multiples = {(axis.units, self.multiple(axis)) for layer in shape.layers for axis in layer.within(self.block)}
        exact = sorted({kept / units for units, multiple in multiples for kept in range(multiple, units, multiple)})
        between = [(low + high) / 2 for low, high in pairwise(exact)]  # where layers have widths of their own
        found = {1 - kept: self.narrowed(shape, 1 - kept) for kept in (*exact, *between)}
        if not found:
            raise RecipeError(
                f"The layers are too narrow for {self.step} to keep a multiple of 'multiple_of' {self._units(shape)}. Lower it."
            )
        nearest = min(found.values(), key=lambda shape: abs(shape.parameters - parameters))
        sizes = sorted(each.parameters for each in found.values())
        step = max(second - first for first, second in zip(sizes, [*sizes[1:], shape.parameters], strict=True))
        if abs(nearest.parameters - parameters) > step:
            raise RecipeError(
                f"{self.step} is to keep {parameters / total:.4g} of the parameters. By the {self._units(shape)} it can keep "
                f"{sizes[0] / total:.3f} to {sizes[-1] / total:.3f} of them; change 'params', or make the model smaller elsewhere as well."
            )
        return nearest

    def _units(self, shape: Shape) -> str:
        """What the units are that are narrowed."""
        named = dict.fromkeys(axis.units_are for layer in shape.layers for axis in layer.within(self.block))
        return " and ".join(named) or "units"

    def kept(self, axis: AxisShape, ratio: float) -> int:
        """Units kept of an axis: the multiple nearest to what the ratio asks for; never none, never all.

        Raises:
            RecipeError: no multiple lies between none and all.
        """
        multiple, width = self.multiple(axis), axis.units
        kept = round(width * (1 - ratio) / multiple) * multiple
        kept = min(max(kept, multiple), (width - 1) // multiple * multiple)
        if kept < 1:
            raise RecipeError(
                f"{self.step} is to keep a multiple of {multiple} {axis.units_are}, and fewer than {width}. Lower multiple_of."
            )
        return kept

    def multiple(self, axis: AxisShape) -> int:
        """What the number of kept units of an axis is a multiple of."""
        return math.lcm(self.multiple_of or _usual_multiple(axis.units), axis.multiple)

    def least(self, shape: Shape) -> dict[str, int]:
        """What the number of units of each axis will be a multiple of in every layer, narrowed or as it is; by the name of the axis."""
        found: dict[str, int] = {}
        for layer in shape.layers:
            for axis in layer.within(self.block):
                found[axis.name] = math.gcd(found.get(axis.name, 0), axis.units, self.multiple(axis))
        return found


def _usual_multiple(width: int) -> int:
    """64, and for narrow layers the largest power of two that leaves at least 16 multiples."""
    multiple = LARGEST_MULTIPLE
    while multiple > 1 and width // multiple < 16:
        multiple //= 2
    return multiple

"""A checkpoint that is yet to be made, as the passes that will read it may ask about it before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from optimum_prune.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from optimum_prune.anatomy.family import Family
    from optimum_prune.anatomy.shape import Shape


@dataclass(frozen=True)
class CheckpointSpec:
    """What is known beforehand of the checkpoint that a pass from folder to folder will read."""

    config: PreTrainedConfig
    """Of the model as it is before the recipe."""
    family: Family
    shape: Shape
    """As the pruning passes will leave it."""

    @property
    def heterogeneous(self) -> bool:
        """Whether its layers will, or may, differ in shape or lack a block; of a model with layers of several kinds, those of one kind."""
        return self.shape.heterogeneous

    @property
    def text_config(self) -> PreTrainedConfig:
        """The part of the config that is about the decoder."""
        return self.family.text_config(self.config)

    def widths(self) -> dict[str, int]:
        """What the inputs of its linear layers are called and how wide they are; groups of weights divide these.

        Where a search decides on widths, it is the number that all of them will be multiples of.
        """
        found = {"hidden size": self.shape.layers[0].units("hidden") or self.text_config.hidden_size}
        for index, layer in enumerate(self.shape.layers):
            where = "" if self.shape.even else f" of layer {index}"
            for axis in layer.axes:
                if axis.inner:
                    units = self.shape.searched.get(axis.name, axis.units)
                    found[f"{axis.inputs_are}{where}"] = units * axis.width
            found |= {f"{fixed.inputs_are}{where}": fixed.width for fixed in layer.fixed}
        return found

    def check_groups(self, size: int, of: str) -> None:
        """Refuses groups of weights that do not divide the widths.

        Args:
            size: weights of a group; not positive means one group for each row.
            of: the pass that asks.

        Raises:
            RecipeError: some width is no multiple of it.
        """
        if size <= 0:
            return
        for what, width in self.widths().items():
            if width % size == 0:
                continue
            possible = [
                str(group)
                for group in (256, 128, 64, 32, 16, 8)
                if all(w % group == 0 for w in self.widths().values())
            ]
            remedy = (
                f"give {of} a group_size of {', '.join(possible)}" if possible else f"give {of} groups of another size"
            )
            if "width" in what:
                remedy = f"prune with `multiple_of: {size}`, or {remedy}"
            raise RecipeError(
                f"'{of}' has groups of {size} weights, and the {what} of the model will be {width}, which is no multiple of that. "
                f"{remedy[:1].upper()}{remedy[1:]}."
            )

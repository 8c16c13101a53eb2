"""The sizes of a model that pruning changes, as passes foresee them and plans print them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class LayerShape:
    """The sizes of a decoder layer that pruning changes, and how many parameters go with each."""

    parameters: int
    """Of the layer."""
    heads: int = 0
    """Key-value heads; 0 where heads cannot be cut."""
    per_head: int = 0
    """Parameters of a key-value head with its query heads."""
    possible_heads: tuple[int, ...] = ()
    """The numbers of key-value heads that a config can say."""
    width: int = 0
    """FFN channels; 0 where the FFN is a mixture of experts."""
    per_channel: int = 0
    """Parameters of such a channel."""
    expert_width: int = 0
    """Channels of each expert; 0 where there are none."""
    per_expert_channel: int = 0
    """Parameters of one channel of every expert, shared ones included."""

    def narrowed(
        self, *, heads: int | None = None, width: int | None = None, expert_width: int | None = None
    ) -> LayerShape:
        """With other sizes, and the parameters that follow; what is not given, or not there, stays as it is."""
        heads = self.heads if heads is None else heads
        width = self.width if width is None else width
        expert_width = self.expert_width if expert_width is None else expert_width
        fewer = (
            (self.heads - heads) * self.per_head
            + (self.width - width) * self.per_channel
            + (self.expert_width - expert_width) * self.per_expert_channel
        )
        possible = tuple(count for count in self.possible_heads if count <= heads)
        changed = replace(self, heads=heads, possible_heads=possible, width=width, expert_width=expert_width)
        return replace(changed, parameters=self.parameters - fewer)


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that pruning changes."""

    layers: tuple[LayerShape, ...]
    elsewhere: int = 0
    """Parameters that belong to no decoder layer: embeddings, head, last norm."""
    searched_width: int | None = None
    """Where a search decides how wide the FFN of each layer becomes: all will be multiples of this."""
    searched_blocks: bool = False
    """Where a search decides which attention and FFN blocks are left out."""

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return self.elsewhere + sum(layer.parameters for layer in self.layers)

    def keep(self, kept: Iterable[int]) -> Shape:
        """With these layers only."""
        return replace(self, layers=tuple(self.layers[index] for index in kept))

    @property
    def even(self) -> bool:
        """Whether all layers are alike, and no search will change that."""
        return len(set(self.layers)) == 1 and not self.searched_width and not self.searched_blocks

    def describe(self) -> str:
        """In a line."""
        heads = self.describe_heads()
        return f"{len(self.layers)} layers, FFN width {self.describe_width()}" + (f", {heads} heads" if heads else "")

    def describe_width(self) -> str:
        """The FFN width, such as `1280`, `768-1536 (1280 on average)` or `2048, experts 512`."""
        widths = _range([layer.width for layer in self.layers if layer.width])
        experts = _range([layer.expert_width for layer in self.layers if layer.expert_width])
        return ", ".join(filter(None, [widths, experts and f"experts {experts}"]))

    def describe_heads(self) -> str:
        """The key-value heads of a layer likewise."""
        return _range([layer.heads for layer in self.layers if layer.heads])


def _range(sizes: Sequence[int]) -> str:
    if not sizes or min(sizes) == max(sizes):
        return str(sizes[0]) if sizes else ""
    return f"{min(sizes)}-{max(sizes)} ({sum(sizes) / len(sizes):.4g} on average)"

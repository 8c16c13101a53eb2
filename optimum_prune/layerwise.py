"""The one traversal: a model run layer by layer over calibration windows.

The model's own code prepares embeddings, masks and rotary tables before the layers and computes the head behind them, with
stand-ins in place of the decoder layers. Nothing here knows an architecture, and each layer gets the very arguments that
its model gives it: sliding layers their own mask, local layers their own rotary table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from optimum_prune.errors import FamilyError, NumericalError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from transformers import PreTrainedModel

    from optimum_prune.anatomy import Family
    from optimum_prune.calibration import Calibration
    from optimum_prune.progress import Progress

TOKENS_PER_BATCH = 4096

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Batch:
    """Some calibration windows, and the arguments with which the model calls each of its layers on them."""

    tokens: Int[Tensor, "windows length"]
    mask: Bool[Tensor, "windows length"]
    """False where a token is padding."""
    arguments: Sequence[Arguments]
    """Of each layer: positional and keyword arguments after the hidden states."""

    def run(self, layer: nn.Module, index: int, hidden: Float[Tensor, "w t h"]) -> Float[Tensor, "w t h"]:
        """Hidden states behind a layer, which is called as the model calls its layer `index`."""
        positional, keywords = self.arguments[index]
        output: Tensor | tuple[Tensor, ...] = layer(hidden, *positional, **keywords)
        return output[0] if isinstance(output, tuple) else output

    def split(self, hidden: Float[Tensor, "w t h"]) -> Iterator[tuple[Batch, Float[Tensor, "1 t h"]]]:
        """The batch and its hidden states, window by window, for what comes behind the layers."""
        for row in range(len(self.tokens)):
            one = slice(row, row + 1)
            yield Batch(self.tokens[one], self.mask[one], ()), hidden[one]


class _StandIn(nn.Module):
    """Takes a decoder layer's place: hears how it is called, and puts out what it is told to.

    Attributes that the model reads from its layers (an attention type, say) are the layer's own.
    """

    def __init__(self, layer: nn.Module, forward: Callable[..., Tensor]) -> None:
        super().__init__()
        self.__dict__["_layer"] = layer  # not a submodule: its weights are nobody's business here
        self.__dict__["_forward"] = forward

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = self.__dict__["_forward"](hidden, args, kwargs)
        return output


@contextmanager
def _layers_replaced(model: PreTrainedModel, family: Family, layers: Sequence[nn.Module]) -> Iterator[None]:
    parent_path, _, name = family.layers.rpartition(".")
    parent = model.get_submodule(parent_path)
    originals = getattr(parent, name)
    setattr(parent, name, nn.ModuleList(layers))
    try:
        yield
    finally:
        setattr(parent, name, originals)


@torch.no_grad()
def embed(
    model: PreTrainedModel, family: Family, calibration: Calibration
) -> list[tuple[Batch, Float[Tensor, "windows length hidden"]]]:
    """The calibration windows in batches of about `TOKENS_PER_BATCH` tokens, with the hidden states before the first layer."""
    size = max(1, TOKENS_PER_BATCH // calibration.tokens.shape[1])
    device = model.get_input_embeddings().weight.device
    shared: dict[int, Sequence[Arguments]] = {}
    stream = []
    for start in range(0, len(calibration.tokens), size):
        tokens = calibration.tokens[start : start + size].to(device)
        mask = calibration.mask[start : start + size].to(device)
        arguments, hidden = _prepare(model, family, tokens, mask)
        if mask.all():  # without padding, the arguments depend on nothing but the batch's shape
            arguments = shared.setdefault(len(tokens), arguments)
        stream.append((Batch(tokens, mask, arguments), hidden))
    return stream


def _prepare(
    model: PreTrainedModel, family: Family, tokens: Int[Tensor, "w t"], mask: Bool[Tensor, "w t"]
) -> tuple[Sequence[Arguments], Float[Tensor, "w t h"]]:
    """How the model calls each layer on these tokens, and the hidden states in front of the first."""
    calls: list[Arguments] = []
    inputs: list[Tensor] = []

    def listen(hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        inputs.append(hidden)
        calls.append((args, kwargs))
        return hidden

    layers = family.layers_of(model)
    with _layers_replaced(model, family, [_StandIn(layer, listen) for layer in layers]):
        padding = {} if mask.all() else {"attention_mask": mask.long()}
        model(input_ids=tokens, use_cache=False, logits_to_keep=1, **padding)
    if len(calls) != len(layers) or any(hidden.shape != inputs[0].shape for hidden in inputs):
        raise FamilyError(
            f"{type(model).__name__} does not call each of its layers once, one after the other, with hidden states of one "
            f"shape, so it cannot be run layer by layer."
        )
    return calls, inputs[0]


@torch.no_grad()
def logits(
    model: PreTrainedModel, family: Family, batch: Batch, hidden: Float[Tensor, "w t h"]
) -> Float[Tensor, "w t v"]:
    """The logits for hidden states behind the last layer: final norm, head, and what else the model does there."""
    stand_in = _StandIn(family.layers_of(model)[0], lambda *_: hidden)
    with _layers_replaced(model, family, [stand_in]):
        output: Tensor = model(input_ids=batch.tokens, use_cache=False).logits
    return output


@dataclass(frozen=True)
class Visit:
    """A decoder layer, and the hidden states that reach it."""

    index: int
    layer: nn.Module
    stream: list[tuple[Batch, Float[Tensor, "w t h"]]]

    @torch.no_grad()
    def observe(self, path: str, add: Callable[[Float[Tensor, "tokens features"]], None]) -> None:
        """Runs the layer over its stream and hands `add` every input of its submodule at `path`, padding left out."""

        def hand_over(batch: Batch) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            # Some layers flatten windows and positions into one axis before their FFN.
            return lambda _, args: add(args[0].flatten(0, -2)[batch.mask.flatten().to(args[0].device)])

        module = self.layer.get_submodule(path)
        for batch, hidden in self.stream:
            handle = module.register_forward_pre_hook(hand_over(batch))
            try:
                batch.run(self.layer, self.index, hidden)
            finally:
                handle.remove()


@torch.no_grad()
def walk(
    model: PreTrainedModel, family: Family, calibration: Calibration, progress: Progress, description: str
) -> Iterator[Visit]:
    """Visits the decoder layers in order.

    When the next visit is asked for, the stream passes through the layer just visited **as it is by then**: whoever cuts it
    in between hands the pruned stream to the layers behind.

    Raises:
        NumericalError: a layer puts out a value that is not finite.
    """
    stream = embed(model, family, calibration)
    _check_finite(stream, "The embeddings")
    for index, layer in enumerate(progress.track(family.layers_of(model), description)):
        yield Visit(index, layer, stream)
        for position, (batch, hidden) in enumerate(stream):  # in place: only one layer's hidden states are ever held
            stream[position] = (batch, batch.run(layer, index, hidden))
        _check_finite(stream, f"Decoder layer {index}")


def _check_finite(stream: list[tuple[Batch, Tensor]], what: str) -> None:
    if not all(hidden.isfinite().all() for _, hidden in stream):
        raise NumericalError(
            f"{what} of the model puts out values that are not finite. Look for NaN or infinity in its weights, or compute "
            f"in bfloat16 or float32 instead of float16."
        )

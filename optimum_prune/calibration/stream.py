"""Hidden states of the calibration windows, from the embeddings to the logits, layer by layer.

The model's own code prepares embeddings, masks and rotary tables before the layers and computes the head behind them, with
stand-ins in place of the decoder layers. Nothing here knows an architecture, and each layer gets the very arguments that
its model gives it: sliding layers their own mask, local layers their own rotary table.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from optimum_prune.anatomy.shape import Shape
from optimum_prune.anatomy.workload import TOKENS_PER_BATCH, Cost, Workload
from optimum_prune.calibration.stand_ins import StandIn, layers_replaced, silenced
from optimum_prune.errors import FamilyError, NumericalError
from optimum_prune.machine import processes
from optimum_prune.machine.activation_store import ActivationStore

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    from optimum_prune.anatomy.decoder import Decoder, DecoderLayer
    from optimum_prune.text.windows import Windows

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

    def unpadded(self, activations: Float[Tensor, "... features"]) -> Float[Tensor, "tokens features"]:
        """Activations as rows, without padding; some layers flatten windows and positions into one axis before their FFN."""
        rows = activations.flatten(0, -2)
        return rows if self.mask.all() else rows[self.mask.flatten().to(rows.device)]


Stream = list[tuple[Batch, Tensor]]
"""Batches of windows with their hidden states at one place of the model."""


@torch.no_grad()
def embed(
    decoder: Decoder, windows: Windows, store: ActivationStore, tokens_at_once: int | None = None
) -> list[tuple[Batch, Float[Tensor, "windows length hidden"]]]:
    """The windows in batches of about so many tokens, `TOKENS_PER_BATCH` if not given, before the first layer.

    Of several processes, each gets its share of the windows: of a few, maybe none.
    """
    device = decoder.model.get_input_embeddings().weight.device
    shared: dict[int, Sequence[Arguments]] = {}
    stream = []
    for tokens, mask in windows.share().batches(tokens_at_once or TOKENS_PER_BATCH):
        tokens, mask = tokens.to(device), mask.to(device)
        arguments, hidden = _prepare(decoder, tokens, mask)
        if mask.all():  # without padding, the arguments depend on nothing but the batch's shape
            arguments = shared.setdefault(len(tokens), arguments)
        stream.append((Batch(tokens, mask, arguments), store.store(hidden)))
    return stream


def _prepare(
    decoder: Decoder, tokens: Int[Tensor, "w t"], mask: Bool[Tensor, "w t"]
) -> tuple[Sequence[Arguments], Float[Tensor, "w t h"]]:
    """How the model calls each layer on these tokens, and the hidden states in front of the first."""
    calls: list[Arguments] = []
    inputs: list[Tensor] = []

    def listen(hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        inputs.append(hidden)
        calls.append((args, kwargs))
        return hidden

    layers = decoder.modules
    with layers_replaced(decoder, [StandIn(layer, listen) for layer in layers]):
        padding = {} if mask.all() else {"attention_mask": mask.long()}
        decoder.model(input_ids=tokens, use_cache=False, logits_to_keep=1, **padding)
    if len(calls) != len(layers) or any(hidden.shape != inputs[0].shape for hidden in inputs):
        raise FamilyError(
            f"{type(decoder.model).__name__} does not call each of its layers once, one after the other, with hidden states of one "
            f"shape, so it cannot be run layer by layer."
        )
    return calls, inputs[0]


def logits(decoder: Decoder, batch: Batch, hidden: Float[Tensor, "w t h"]) -> Float[Tensor, "w t v"]:
    """The logits for hidden states behind the last layer: final norm, head, and what else the model does there."""
    stand_in = StandIn(decoder.modules[0], lambda *_: hidden)
    with layers_replaced(decoder, [stand_in]):
        output: Tensor = decoder.model(input_ids=batch.tokens, use_cache=False).logits
    return output


@torch.no_grad()
def run_layers(
    decoder: Decoder, batch: Batch, hidden: Float[Tensor, "w t h"], indices: Iterable[int]
) -> Float[Tensor, "w t h"]:
    """Hidden states behind some of the layers, one after the other, from those before the first."""
    layers = decoder.modules
    for index in indices:
        hidden = batch.run(layers[index], index, hidden)
    return hidden


@torch.no_grad()
def run_without(
    layer: DecoderLayer, batch: Batch, hidden: Float[Tensor, "w t h"], gone: Collection[str]
) -> Float[Tensor, "w t h"]:
    """Hidden states behind a layer without some of its blocks; the layer stays."""
    with ExitStack() as stack:
        for block in gone:
            stack.enter_context(silenced(layer, block))
        return batch.run(layer.module, layer.index, hidden)


def check_finite(hidden_states: Iterable[Tensor], what: str, store: ActivationStore) -> None:
    """Refuses what comes out of a part of the model if a value is not finite, in all processes.

    Raises:
        NumericalError: a value is not finite.
    """
    finite = True
    for hidden in hidden_states:
        finite = finite and (len(hidden) == 0 or bool(torch.stack(torch.aminmax(hidden)).isfinite().all()))
        store.release(hidden)
    if not processes.all_true(finite):
        raise NumericalError(
            f"{what} of the model puts out values that are not finite. Look for NaN or infinity in its weights, or compute "
            f"in bfloat16 or float32 instead of float16."
        )


def embedding_cost(work: Workload) -> Cost:
    """The hidden states before the first layer, which are then held."""
    table = work.head() if work.offloaded else 0
    return Cost(memory=work.stored_states() + table, elements=work.tokens * work.hidden)


def walk_cost(work: Workload, shape: Shape, streams: int = 1) -> Cost:
    """Moves so many streams of hidden states through all layers."""
    running = work.run_all(shape.layers, work.tokens, streams).with_memory(work.stored_states(streams))
    return embedding_cost(work).times(streams).with_memory(work.stored_states(streams - 1)).followed_by(running)

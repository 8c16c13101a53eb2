"""The one traversal: a model run layer by layer over calibration windows.

The model's own code prepares embeddings, masks and rotary tables before the layers and computes the head behind them, with
stand-ins in place of the decoder layers. Nothing here knows an architecture, and each layer gets the very arguments that
its model gives it: sliding layers their own mask, local layers their own rotary table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
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
    originals = family.layers_of(model)
    family.put_layers(model, nn.ModuleList(layers))
    try:
        yield
    finally:
        family.put_layers(model, originals)


@torch.no_grad()
def embed(
    model: PreTrainedModel, family: Family, calibration: Calibration
) -> list[tuple[Batch, Float[Tensor, "windows length hidden"]]]:
    """The calibration windows in batches of about `TOKENS_PER_BATCH` tokens, with the hidden states before the first layer."""
    device = model.get_input_embeddings().weight.device
    shared: dict[int, Sequence[Arguments]] = {}
    stream = []
    for tokens, mask in calibration.batches(TOKENS_PER_BATCH):
        tokens, mask = tokens.to(device), mask.to(device)
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


class _Reached(Exception):
    """A layer has got as far as it was to run."""


class Visit:
    """A decoder layer, and the hidden states that reach it.

    A visit evaluates each part of the layer once. `observe_channels` runs the layer as far as the inputs of the FFN's output
    projection and keeps these and what attention put out; when the visit ends, the layer is run again with both given, so that
    only norms, residual sums and the output projection, as it is by then, are computed.
    """

    def __init__(self, index: int, layer: nn.Module, family: Family, stream: list[tuple[Batch, Tensor]]) -> None:
        self.index = index
        self.layer = layer
        self.stream = stream
        self._family = family
        self._attended: list[Any] = []
        self._channels: list[Tensor] = []

    @torch.no_grad()
    def observe_channels(self, add: Callable[[Float[Tensor, "tokens channels"]], None]) -> None:
        """Hands `add` the FFN channels' activations, batch by batch, padding left out. To be called once."""
        attention = self._family.module(self.layer, self._family.attention)
        output = self._family.module(self.layer, self._family.feed_forward.output)

        def keep_channels(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._channels.append(args[0])
            raise _Reached

        def keep_attended(_: nn.Module, __: object, result: Any) -> None:
            self._attended.append(result)

        handles = [
            output.register_forward_pre_hook(keep_channels),
            attention.register_forward_hook(keep_attended),
        ]
        try:
            for batch, hidden in self.stream:
                with suppress(_Reached):
                    batch.run(self.layer, self.index, hidden)
                # Some layers flatten windows and positions into one axis before their FFN.
                rows = self._channels[-1].flatten(0, -2)
                add(rows if batch.mask.all() else rows[batch.mask.flatten().to(rows.device)])
        finally:
            for handle in handles:
                handle.remove()

    def narrow(self, kept: Sequence[int]) -> None:
        """Keeps only these of the observed channels, as the cut of this layer will."""
        index = torch.tensor(kept)
        self._channels = [channels[..., index.to(channels.device)] for channels in self._channels]

    def leave(self) -> None:
        """Moves the stream behind the layer as it is now."""
        for position, (batch, hidden) in enumerate(self.stream):  # in place: one layer's hidden states are ever held
            with ExitStack() as stack:
                if self._channels:
                    self._answer_for_blocks(stack, self._attended[position], self._channels[position])
                self.stream[position] = (batch, batch.run(self.layer, self.index, hidden))
        self._attended, self._channels = [], []

    def _answer_for_blocks(self, stack: ExitStack, attended: Any, channels: Tensor) -> None:
        """Attention answers with what it put out, the FFN with the output projection of the channels."""
        feed_forward = self._family.feed_forward
        output = self._family.module(self.layer, feed_forward.output)
        stack.enter_context(
            _answering(self._family.module(self.layer, self._family.attention), lambda *_, **__: attended)
        )
        if feed_forward.module is not None:
            module = self._family.module(self.layer, feed_forward.module)
            stack.enter_context(_answering(module, lambda *_, **__: output(channels)))
            return
        project = output.forward
        nothing = channels[..., :0]
        for path in feed_forward.inputs:
            stack.enter_context(_answering(self._family.module(self.layer, path), lambda *_, **__: nothing))
        stack.enter_context(_answering(output, lambda *_, **__: project(channels)))


@contextmanager
def _answering(module: nn.Module, answer: Callable[..., Any]) -> Iterator[None]:
    """Lets a module answer so whatever it is asked, for the time of a `with`."""
    before = module.__dict__.get("forward")
    module.forward = answer
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.forward = before


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
        visit = Visit(index, layer, family, stream)
        yield visit
        visit.leave()
        _check_finite(stream, f"Decoder layer {index}")


def _check_finite(stream: list[tuple[Batch, Tensor]], what: str) -> None:
    if not all(hidden.isfinite().all() for _, hidden in stream):
        raise NumericalError(
            f"{what} of the model puts out values that are not finite. Look for NaN or infinity in its weights, or compute "
            f"in bfloat16 or float32 instead of float16."
        )

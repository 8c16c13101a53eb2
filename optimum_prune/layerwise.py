"""The one traversal: a model run layer by layer over calibration windows.

The model's own code prepares embeddings, masks and rotary tables before the layers and computes the head behind them, with
stand-ins in place of the decoder layers. Nothing here knows an architecture, and each layer gets the very arguments that
its model gives it: sliding layers their own mask, local layers their own rotary table.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from optimum_prune import distributed
from optimum_prune.anatomy import features_of
from optimum_prune.errors import FamilyError, NumericalError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from transformers import PreTrainedModel

    from optimum_prune.anatomy import Family
    from optimum_prune.calibration import Calibration
    from optimum_prune.offload import Shelf
    from optimum_prune.progress import Progress

TOKENS_PER_BATCH = 2048

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
    model: PreTrainedModel, family: Family, calibration: Calibration, tokens_at_once: int | None = None
) -> list[tuple[Batch, Float[Tensor, "windows length hidden"]]]:
    """The calibration windows in batches of about so many tokens, `TOKENS_PER_BATCH` if not given, before the first layer.

    Of several processes, each gets its share of the windows: of a few, maybe none.
    """
    device = model.get_input_embeddings().weight.device
    shared: dict[int, Sequence[Arguments]] = {}
    stream = []
    for tokens, mask in distributed.share(calibration).batches(tokens_at_once or TOKENS_PER_BATCH):
        tokens, mask = tokens.to(device), mask.to(device)
        arguments, hidden = _prepare(model, family, tokens, mask)
        if mask.all():  # without padding, the arguments depend on nothing but the batch's shape
            arguments = shared.setdefault(len(tokens), arguments)
        stream.append((Batch(tokens, mask, arguments), calibration.keep(hidden)))
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


def logits(
    model: PreTrainedModel, family: Family, batch: Batch, hidden: Float[Tensor, "w t h"]
) -> Float[Tensor, "w t v"]:
    """The logits for hidden states behind the last layer: final norm, head, and what else the model does there."""
    stand_in = _StandIn(family.layers_of(model)[0], lambda *_: hidden)
    with _layers_replaced(model, family, [stand_in]):
        output: Tensor = model(input_ids=batch.tokens, use_cache=False).logits
    return output


@torch.no_grad()
def run_layers(
    model: PreTrainedModel, family: Family, batch: Batch, hidden: Float[Tensor, "w t h"], indices: Iterable[int]
) -> Float[Tensor, "w t h"]:
    """Hidden states behind some of the layers, one after the other, from those before the first."""
    layers = family.layers_of(model)
    for index in indices:
        hidden = batch.run(layers[index], index, hidden)
    return hidden


@torch.no_grad()
def run_without(
    family: Family, batch: Batch, layer: nn.Module, index: int, hidden: Float[Tensor, "w t h"], gone: Collection[str]
) -> Float[Tensor, "w t h"]:
    """Hidden states behind a layer without some of its blocks, "attention" and "feed_forward"; the layer stays."""
    with ExitStack() as stack:
        for block in gone:
            _silence(stack, family, layer, block)
        return batch.run(layer, index, hidden)


def _silence(stack: ExitStack, family: Family, layer: nn.Module, block: str) -> None:
    """Lets a block of a layer put out zeros, for the time of a `with`."""
    from optimum_prune.modeling_pruned import Nothing

    *before, last = (family.module(layer, path) for path in family.block_modules(block))
    for module in before:
        stack.enter_context(_answering(module, lambda given: given))
    stack.enter_context(_answering(last, Nothing(block).forward))


class _Reached(Exception):
    """A layer has got as far as it was to run."""


Add = Callable[["Float[Tensor, 'tokens features']"], None]
"""What is done with the rows of activations that a visit observes."""


def _ignore(_: Tensor) -> None:
    pass


class Visit:
    """A decoder layer, and the hidden states that reach it.

    A visit evaluates each dense part of the layer once. `observe_heads` runs the layer as far as the inputs of attention's output
    projection, `observe_channels` as far as those of the FFN's, and keeps what it has seen; whatever runs afterwards, such as the
    layer's end when the visit is left, is given that instead of computing it again. So only norms, residual sums and the
    output projections, as they are by then, are computed twice. Of a mixture, the experts are run again.
    """

    def __init__(
        self,
        index: int,
        layer: nn.Module,
        family: Family,
        stream: list[tuple[Batch, Tensor]],
        shelf: Shelf | None = None,
    ) -> None:
        self.index = index
        self.layer = layer
        self.stream = stream
        self._family = family
        self.shelf = shelf
        self._left = False
        self._gone: tuple[str, ...] = ()
        self._heads: list[Tensor] = []
        self._attended: list[Any] = []
        self._channels: list[Tensor] = []

    @torch.no_grad()
    def observe_heads(self, add: Add) -> None:
        """Hands `add` the outputs of the attention heads, batch by batch, padding left out. To be called once, and first."""
        self._attended = []
        self._heads = list(self._inputs_of(self._family.attention_output, add))

    @torch.no_grad()
    def observe_channels(self, add: Add) -> None:
        """Hands `add` the FFN channels' activations likewise. To be called once."""
        self._channels = list(self._inputs_of(self._family.feed_forward.output, add))

    @torch.no_grad()
    def observe_experts(self, add: Callable[[int, Tensor], None], add_shared: Add | None) -> None:
        """Hands `add` an expert's number and its channels' activations for the tokens that are routed to it, each weighted as
        the router weights it; and `add_shared` those of the shared experts. Both batch by batch, padding left out.
        """
        experts, family = self._family.experts_of(self.layer), self._family.experts
        assert experts is not None
        assert family is not None
        apply_gate: Callable[[Tensor], Tensor] = experts._apply_gate  # type: ignore[assignment]  # a method, not a module

        def hear_experts(_: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> None:
            hidden, chosen, weights = (*args, *kwargs.values())
            mask = self._batch.mask.flatten().to(hidden.device)
            for expert, matrix in enumerate(getattr(experts, family.inputs)):
                token, place = torch.where((chosen == expert) & mask[:, None])
                channels = apply_gate(nn.functional.linear(hidden[token], matrix))
                add(expert, channels.float() * weights[token, place, None].float())

        def hear_shared(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            assert add_shared is not None
            add_shared(self._unpadded(args[0]))

        with ExitStack() as stack:
            stack.callback(experts.register_forward_pre_hook(hear_experts, with_kwargs=True).remove)
            if family.shared is not None and add_shared is not None:
                shared = self._family.module(self.layer, family.shared.output)
                stack.callback(shared.register_forward_pre_hook(hear_shared).remove)
            for position in range(len(self.stream)):
                self._run(position)

    def narrow_heads(self, kept: Sequence[int]) -> None:
        """Keeps only these of the heads, as the cut of this layer will: before it is made."""
        if not self._heads:  # the decision was made in an earlier run, for which they were observed
            self.observe_heads(_ignore)
        counts = self._family.head_counts(self.layer)
        index = features_of(kept, counts.queries * counts.size)
        self._heads = [self._part(heads, index) for heads in self._heads]

    def narrow(self, kept: Sequence[int]) -> None:
        """Keeps only these of the channels, likewise."""
        if not self._channels:
            self.observe_channels(_ignore)
        index = torch.tensor(kept)
        self._channels = [self._part(channels, index) for channels in self._channels]

    def _part(self, activations: Tensor, index: Tensor) -> Tensor:
        """These of the features, kept in place of all."""
        part = self.keep(activations[..., index.to(activations.device)])
        self.put_back(activations)
        return part

    def outputs(self) -> Iterator[tuple[Float[Tensor, "tokens features"], Float[Tensor, "w t h"]]]:
        """What was observed last as rows, and the hidden states behind it, batch by batch, with padding.

        Behind the FFN's channels that is behind the layer as it is; behind the heads, behind attention.
        """
        for position, observed in enumerate(self._channels or self._heads):
            hidden = self._run(position) if self._channels else self._behind_attention(position)
            yield observed.flatten(0, -2), hidden

    def attended(self) -> list[Float[Tensor, "w t h"]]:
        """Hidden states behind attention, as if there were no FFN, batch by batch."""
        return [self.keep(self._behind_attention(position)) for position in range(len(self.stream))]

    def _behind_attention(self, position: int) -> Tensor:
        gone, self._gone = self._gone, (*self._gone, "feed_forward")
        try:
            return self._run(position)
        finally:
            self._gone = gone

    @torch.no_grad()
    def adds_output(self, path: str) -> bool:
        """Whether what an output projection puts out is added to the hidden states as it is, with no norm behind.

        If it is, the hidden states behind it, added to that, double these hidden states.

        Raises:
            NumericalError: these are not finite.
        """
        run = self._behind_attention if path == self._family.attention_output else self._run
        output = self._family.module(self.layer, path)
        project, plain = output.forward, run(0) if self.stream else torch.zeros(0)
        check_finite([plain], f"Decoder layer {self.index}")

        def add_plain(inputs: Tensor) -> Tensor:
            projected: Tensor = project(inputs)
            return projected + plain.view_as(projected)

        def doubles() -> bool:
            with _answering(output, add_plain):
                doubled = run(0)
            return bool((doubled.float() - 2 * plain.float()).abs().max() <= 0.1 * plain.float().abs().max())

        return distributed.by_first(doubles)

    def leave_out(self, blocks: Sequence[str]) -> None:
        """Runs the layer without these of its blocks, "attention" and "feed_forward", from now on."""
        self._gone = tuple(blocks)

    def skip(self) -> None:
        """Lets the stream pass by the layer, as if it were not there."""
        self._left = True

    def leave(self) -> None:
        """Moves the stream behind the layer as it is now, once."""
        if self._left:
            return
        self._left = True
        for position, (batch, _) in enumerate(self.stream):  # in place: one layer's hidden states are ever held
            self.stream[position] = (batch, self.keep(self._run(position, remember=False)))
        self._heads, self._attended, self._channels = [], [], []

    def _inputs_of(self, path: str, add: Add) -> Iterator[Tensor]:
        """Runs each batch as far as a linear module of the layer, and yields what reaches it."""
        reached: list[Tensor] = []

        def stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            reached.append(args[0])
            raise _Reached

        handle = self._family.module(self.layer, path).register_forward_pre_hook(stop)
        try:
            for position in range(len(self.stream)):
                with suppress(_Reached):
                    self._run(position)
                add(self._unpadded(reached[-1]))
                yield self.keep(reached.pop())
        finally:
            handle.remove()

    def _unpadded(self, activations: Float[Tensor, "... features"]) -> Float[Tensor, "tokens features"]:
        """As rows; some layers flatten windows and positions into one axis before their FFN."""
        rows, mask = activations.flatten(0, -2), self._batch.mask
        return rows if mask.all() else rows[mask.flatten().to(rows.device)]

    @torch.no_grad()
    def _run(self, position: int, *, remember: bool = True) -> Tensor:
        """Hidden states of a batch behind the layer; what was computed before is not computed again."""
        batch, hidden = self.stream[position]
        self._batch = batch
        attention = self._family.module(self.layer, self._family.attention)
        with ExitStack() as stack:
            stack.callback(self._put_back, position)  # however far the layer runs
            if "attention" in self._gone:
                _silence(stack, self._family, self.layer, "attention")
            elif position < len(self._heads):
                stack.enter_context(_answering(attention, lambda *_, **__: self._attend(position)))
            elif position < len(self._attended):
                attended = self._attended[position]
                stack.enter_context(_answering(attention, lambda *_, **__: attended))
            elif remember:
                stack.callback(attention.register_forward_hook(self._keep_attended).remove)
            if "feed_forward" in self._gone:
                _silence(stack, self._family, self.layer, "feed_forward")
            elif position < len(self._channels):
                self._answer_for_channels(stack, self._channels[position])
            return batch.run(self.layer, self.index, hidden)

    def _keep_attended(self, _: nn.Module, __: object, result: Any) -> None:
        if isinstance(result, tuple):  # with the weights of attention, if they are asked for
            self._attended.append((self.keep(result[0]), *result[1:]))
        else:
            self._attended.append(self.keep(result))

    def keep(self, activations: Tensor) -> Tensor:
        """Activations for later, in memory or on the shelf."""
        return activations if self.shelf is None else self.shelf.keep(activations)

    def _put_back(self, position: int) -> None:
        """Gives back the memory of whatever is kept of a batch on the shelf."""
        one = slice(position, position + 1)
        attended = (each[0] if isinstance(each, tuple) else each for each in self._attended[one])
        self.put_back(self.stream[position][1], *attended, *self._heads[one], *self._channels[one])

    def put_back(self, *activations: Tensor) -> None:
        """Gives back the memory of activations on the shelf, until they are used again."""
        if self.shelf is not None:
            self.shelf.put_back(*activations)

    def _attend(self, position: int) -> tuple[Tensor, None]:
        """What attention puts out, from the outputs of its heads; attentions of transformers put out their weights as well."""
        output = self._family.module(self.layer, self._family.attention_output)
        return output(self._heads[position]), None

    def _answer_for_channels(self, stack: ExitStack, channels: Tensor) -> None:
        """The FFN answers with the output projection of the channels."""
        feed_forward = self._family.feed_forward
        output = self._family.module(self.layer, feed_forward.output)
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
    check_finite((hidden for _, hidden in stream), "The embeddings", calibration.shelf)
    for index, layer in enumerate(progress.track(family.layers_of(model), description)):
        visit = Visit(index, layer, family, stream, calibration.shelf)
        yield visit
        visit.leave()
        check_finite((hidden for _, hidden in stream), f"Decoder layer {index}", calibration.shelf)


def check_finite(hidden_states: Iterable[Tensor], what: str, shelf: Shelf | None = None) -> None:
    """Checks what comes out of a part of the model, in all processes.

    Args:
        shelf: where the hidden states are, if not all in memory.

    Raises:
        NumericalError: a value is not finite.
    """
    finite = True
    for hidden in hidden_states:
        finite = finite and (len(hidden) == 0 or bool(torch.stack(torch.aminmax(hidden)).isfinite().all()))
        if shelf is not None:
            shelf.put_back(hidden)
    if not distributed.by_all(finite):
        raise NumericalError(
            f"{what} of the model puts out values that are not finite. Look for NaN or infinity in its weights, or compute "
            f"in bfloat16 or float32 instead of float16."
        )

"""A visit of a decoder layer: its activations are observed, and the stream of hidden states moves behind it, each part computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from optimum_prune.anatomy.axis import Axis
from optimum_prune.anatomy.shape import BLOCKS
from optimum_prune.calibration.stand_ins import answered_by_output, answering, silenced
from optimum_prune.calibration.statistics import Gram
from optimum_prune.calibration.stream import Batch, check_finite
from optimum_prune.machine import processes
from optimum_prune.machine.activation_store import ActivationStore, InMemory

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch.utils.hooks import RemovableHandle

    from optimum_prune.anatomy.decoder import DecoderLayer


Hearer = Callable[[Batch, nn.Module, tuple[Any, ...], Mapping[str, Any]], None]
"""Is told of a call of a module: the windows, the module, and the arguments."""


class _Reached(Exception):
    """A layer has got as far as it was to run."""


class LayerVisit:
    """A decoder layer, and the hidden states that reach it.

    A visit evaluates each dense part of the layer once. `gram` runs the layer as far as the inputs of a block's output projection,
    and keeps what it has seen; whatever runs afterwards, such as the layer's end when the visit is left, is given that instead of
    computing it again. So only norms, residual sums and the output projections, as they are by then, are computed twice. Of a mixture,
    the experts are run again.
    """

    def __init__(
        self, layer: DecoderLayer, stream: list[tuple[Batch, Tensor]], activations: ActivationStore | None = None
    ) -> None:
        self.layer = layer
        self.stream = stream
        self.activations = activations or InMemory()
        self._left = False
        self._gone: tuple[str, ...] = ()
        self._inputs: dict[str, list[Tensor]] = {}  # block -> of each batch, the inputs of its output projection
        self._answers: dict[str, list[Any]] = {}  # block -> of each batch, what it has put out

    @property
    def index(self) -> int:
        """Of the layer."""
        return self.layer.index

    # Observing

    @torch.no_grad()
    def grams(self, *axes: Axis) -> list[list[Gram]]:
        """Of each axis, the gram of its units' activations in front of its output, one for each group; padding is left out.

        In front of the outputs of blocks, axes are to be observed once, in the order of the blocks.
        """
        of_axes = [self._empty_grams(axis) for axis in axes]
        if len(axes) == 1 and axes[0].observed is None:
            self._observe(axes[0], of_axes[0][0].add)
            return of_axes
        with ExitStack() as stack:
            for axis, grams in zip(axes, of_axes, strict=True):
                self._listen(stack, axis, grams)
            for position in range(len(self.stream)):
                self._run(position)
        return of_axes

    @torch.no_grad()
    def listen(self, heard: Sequence[tuple[str, Hearer]], batches: int | None = None) -> None:
        """Runs the layer as it is, and lets the calls of some of its modules be heard: each by its path.

        Args:
            batches: only so many, of this process.
        """
        with ExitStack() as stack:
            for path, hear in heard:
                stack.callback(self._call(path, hear).remove)
            for position in range(len(self.stream[:batches])):
                self._run(position, remember=False)

    def _call(self, path: str, hear: Hearer) -> RemovableHandle:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            hear(self._batch, module, args, kwargs)

        return self.layer.part(path).register_forward_pre_hook(hook, with_kwargs=True)

    def gram(self, axis: Axis) -> Gram:
        """The gram of an axis that has no groups."""
        ((gram,),) = self.grams(axis)
        return gram

    def _empty_grams(self, axis: Axis) -> list[Gram]:
        projection = self.layer.projection(axis.output)
        return [Gram(weight.shape[1], weight.device, self.activations) for weight in projection.maps]

    def _listen(self, stack: ExitStack, axis: Axis, grams: Sequence[Gram]) -> None:
        """Adds whatever reaches an axis's output to grams, until the stack is left."""
        path, read = axis.observed or (axis.output.rpartition(".")[0], None)

        def hear(batch: Batch, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            if read is None:
                grams[0].add(batch.unpadded(args[0]))
                return
            for group, rows in read(module, args, kwargs, batch.mask):
                grams[group].add(rows)

        stack.callback(self._call(path, hear).remove)

    def _observe(self, axis: Axis, add: Callable[[Tensor], None]) -> None:
        """Observes the inputs of an axis's output, and keeps them if its block ends there."""
        self._answers.pop(axis.block, None)  # or the block would answer instead of computing them
        self._inputs.pop(axis.block, None)
        inputs = list(self.inputs_of(axis.output, add))
        if axis.output == self.layer.output_of(axis.block):
            self._inputs[axis.block] = inputs

    def narrow(self, axis: Axis, kept: Sequence[int]) -> None:
        """Keeps only these units of what was observed, as the cut of this layer will: before it is made."""
        if axis.block not in self._inputs:  # the decision was made in an earlier run, for which they were observed
            self._observe(axis, lambda _: None)
        index = axis.inputs(kept)
        self._inputs[axis.block] = [self._part(inputs, index) for inputs in self._inputs[axis.block]]

    def _part(self, activations: Tensor, index: Tensor) -> Tensor:
        """These of the features, kept in place of all."""
        part = self.activations.store(activations[..., index.to(activations.device)])
        self.activations.release(activations)
        return part

    @torch.no_grad()
    def inputs_of(self, parameter: str, add: Callable[[Tensor], None] = lambda _: None) -> Iterator[Tensor]:
        """Runs each batch as far as the module of a weight, and yields what reaches it; of that, `add` is given rows without padding."""
        reached: list[Tensor] = []

        def stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            reached.append(args[0])
            raise _Reached

        handle = self.layer.part(parameter.rpartition(".")[0]).register_forward_pre_hook(stop)
        try:
            for position in range(len(self.stream)):
                with suppress(_Reached):
                    self._run(position)
                add(self._batch.unpadded(reached[-1]))
                yield self.activations.store(reached.pop())
        finally:
            handle.remove()

    # Hidden states behind

    def outputs(self, block: str) -> Iterator[tuple[Float[Tensor, "tokens features"], Float[Tensor, "w t h"]]]:
        """What was observed in a block as rows, and the hidden states behind the block, batch by batch, with padding."""
        for position, inputs in enumerate(self._inputs[block]):
            yield inputs.flatten(0, -2), self._behind(block, position)

    def behind(self, block: str) -> list[Float[Tensor, "w t h"]]:
        """Hidden states behind a block, as if the layer ended there, batch by batch."""
        return [self.activations.store(self._behind(block, position)) for position in range(len(self.stream))]

    def _behind(self, block: str, position: int) -> Tensor:
        gone, self._gone = self._gone, (*self._gone, *BLOCKS[BLOCKS.index(block) + 1 :])
        try:
            return self._run(position)
        finally:
            self._gone = gone

    def behind_with(self, weights: Mapping[str, Tensor], block: str, position: int) -> Float[Tensor, "w t h"]:
        """Hidden states of a batch behind a block, as if the layer ended there and had other weights; with gradients.

        Where a block in front has put out something before, that is taken for what it puts out.

        Args:
            weights: by their paths from the layer. Products are computed in bfloat16 where the hidden states are.
            position: of the batch.
        """
        self._batch, hidden = self.stream[position]
        positional, keywords = self._batch.arguments[self.index]
        behind = BLOCKS[BLOCKS.index(block) + 1 :]
        with ExitStack() as stack:
            stack.callback(self._release, position)
            for other in self.layer.blocks:
                if other in behind:
                    stack.enter_context(silenced(self.layer, other))
                elif other != block:
                    self._replace(stack, other, position, remember=False)
            half = hidden.dtype is torch.bfloat16
            stack.enter_context(torch.autocast(hidden.device.type, torch.bfloat16, enabled=half))
            output = torch.func.functional_call(self.layer.module, dict(weights), (hidden, *positional), keywords)
            found: Tensor = output[0] if isinstance(output, tuple) else output
            return found

    def forget(self, block: str) -> None:
        """Forgets what was observed in a block, whose weights are others now."""
        self._inputs.pop(block, None)
        self._answers.pop(block, None)

    @torch.no_grad()
    def adds_output(self, block: str) -> bool:
        """Whether what a block's output projection puts out is added to the hidden states as it is, with no norm behind.

        To be asked of a block whose axis was observed.

        If it is, the hidden states behind it, added to that, double these hidden states.

        Raises:
            NumericalError: these are not finite.
        """
        output = self.layer.part(self.layer.output_of(block).rpartition(".")[0])
        project, plain = output.forward, self._behind(block, 0) if self.stream else torch.zeros(0)
        check_finite([plain], f"Decoder layer {self.index}", InMemory())

        def add_plain(inputs: Tensor) -> Tensor:
            projected: Tensor = project(inputs)
            return projected + plain.view_as(projected)

        def doubles() -> bool:
            with answering(output, add_plain):
                doubled = self._behind(block, 0)
            return bool((doubled.float() - 2 * plain.float()).abs().max() <= 0.1 * plain.float().abs().max())

        return processes.broadcast_from_first(doubles)

    def leave_out(self, blocks: Sequence[str]) -> None:
        """Runs the layer without these of its blocks from now on."""
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
            self.stream[position] = (batch, self.activations.store(self._run(position, remember=False)))
        self._inputs, self._answers = {}, {}

    @torch.no_grad()
    def _run(self, position: int, *, remember: bool = True) -> Tensor:
        """Hidden states of a batch behind the layer; what was computed before is not computed again."""
        batch, hidden = self.stream[position]
        self._batch = batch
        with ExitStack() as stack:
            stack.callback(self._release, position)  # however far the layer runs
            for block in self.layer.blocks:
                self._replace(stack, block, position, remember)
            return batch.run(self.layer.module, self.index, hidden)

    def _replace(self, stack: ExitStack, block: str, position: int, remember: bool) -> None:
        """Lets a block answer with what is known of it; or else listens, if others come behind it, to what it puts out."""
        inputs, answers = self._inputs.get(block, []), self._answers.get(block, [])
        if block in self._gone:
            stack.enter_context(silenced(self.layer, block))
        elif position < len(inputs):
            stack.enter_context(answered_by_output(self.layer, block, lambda: inputs[position]))
        elif position < len(answers):
            stack.enter_context(
                answering(self.layer.part(self.layer.modules_of(block)[-1]), lambda *_, **__: answers[position])
            )
        elif remember and block != BLOCKS[-1]:
            kept = self._answers.setdefault(block, [])
            module = self.layer.part(self.layer.modules_of(block)[-1])
            stack.callback(module.register_forward_hook(lambda _, __, result: self._keep(kept, result)).remove)

    def _keep(self, kept: list[Any], result: Any) -> None:
        if isinstance(result, tuple):  # with the weights of attention, if they are asked for
            kept.append((self.activations.store(result[0]), *result[1:]))
        else:
            kept.append(self.activations.store(result))

    def _release(self, position: int) -> None:
        """Gives back the memory of whatever is kept of a batch in files."""
        one = slice(position, position + 1)
        answers = [
            each[0] if isinstance(each, tuple) else each for kept in self._answers.values() for each in kept[one]
        ]
        inputs = [each for kept in self._inputs.values() for each in kept[one]]
        self.activations.release(self.stream[position][1], *answers, *inputs)

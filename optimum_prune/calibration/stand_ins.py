"""Modules that answer in the place of others, for the time of a `with`: so a model's own code runs around what is replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from optimum_prune.anatomy.shape import ATTENTION

if TYPE_CHECKING:
    from optimum_prune.anatomy.decoder import Decoder, DecoderLayer


class StandIn(nn.Module):
    """Takes a decoder layer's place: hears how it is called, and puts out what it is given to put out.

    Attributes that the model reads from its layers (an attention type, say) are the layer's own.
    """

    def __init__(self, layer: nn.Module, forward: Callable[..., Tensor]) -> None:
        super().__init__()
        self.__dict__["_layer"] = layer  # not a submodule: its weights are nobody's business here
        self.__dict__["_forward"] = forward

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the function that it was made with returns."""
        output: Tensor = self.__dict__["_forward"](hidden, args, kwargs)
        return output


@contextmanager
def layers_replaced(decoder: Decoder, layers: Sequence[nn.Module]) -> Iterator[None]:
    """Other decoder layers in the place of a model's, for the time of a `with`."""
    parent, _, name = decoder.family.layers.rpartition(".")
    originals = decoder.modules
    decoder.put_layers(layers)
    try:
        yield
    finally:
        setattr(decoder.model.get_submodule(parent), name, originals)


@contextmanager
def answering(module: nn.Module, answer: Callable[..., Any]) -> Iterator[None]:
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


def put_out_by(block: str, output: Any) -> Any:
    """What a block puts out in the form that its layer expects: attentions of transformers put out their weights as well."""
    return (output, None) if block == ATTENTION else output


@contextmanager
def silenced(layer: DecoderLayer, block: str) -> Iterator[None]:
    """Lets a block of a layer put out zeros, for the time of a `with`."""

    def nothing(*args: Any, **kwargs: Any) -> Any:
        return put_out_by(block, torch.zeros_like(args[0] if args else kwargs["hidden_states"]))

    *before, last = (layer.part(path) for path in layer.modules_of(block))
    with ExitStack() as stack:
        for module in before:
            stack.enter_context(answering(module, lambda given: given))
        stack.enter_context(answering(last, nothing))
        yield


@contextmanager
def answered_by_output(layer: DecoderLayer, block: str, inputs: Callable[[], Tensor]) -> Iterator[None]:
    """Lets a block put out what its output projection makes of given inputs, for the time of a `with`."""
    path = layer.output_of(block).rpartition(".")[0]
    output = layer.part(path)
    modules = layer.modules_of(block)
    with ExitStack() as stack:
        if len(modules) == 1:
            stack.enter_context(
                answering(layer.part(modules[0]), lambda *_, **__: put_out_by(block, output(inputs())))
            )
        else:
            project = output.forward
            for module in modules[:-1]:
                stack.enter_context(answering(layer.part(module), lambda *_, **__: inputs()[..., :0]))
            stack.enter_context(answering(output, lambda *_, **__: project(inputs())))
        yield

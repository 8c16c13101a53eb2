"""The models of a run: the one that its passes change, and the dense one beside it, which teaches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from optimum_prune.anatomy.decoder import Decoder
from optimum_prune.anatomy.family import Family
from optimum_prune.checkpoint.loading import check_resident, check_rotary
from optimum_prune.machine import processes
from optimum_prune.machine.activation_store import MappedActivations
from optimum_prune.machine.given_files import path_of
from optimum_prune.machine.mapped_weights import MappedWeights
from optimum_prune.machine.memory import free_memory, give_back
from optimum_prune.machine.watched_files import watched
from optimum_prune.surgery.cuts import Cuts
from optimum_prune.surgery.operation import sharing_copy

if TYPE_CHECKING:
    from optimum_prune.plan.source import ModelSource


class Models:
    """How the model and its teacher are loaded, where their weights lie, and which of them both share.

    Args:
        source: where the model is from.
        folder: for weights on disk that change.
        teaches: whether the dense model will be asked for.
    """

    def __init__(self, source: ModelSource, family: Family, folder: Path, *, teaches: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._source = source
        self._family = family
        self._folder = folder
        self._teaches = teaches
        self._teacher: Decoder | None = None
        self._watched = () if source.in_memory else watched(path_of(source.source or source.name))
        self.weights = MappedWeights(folder / "changed") if source.offloads else None
        """Where the model's weights are, if on disk."""
        self._written = MappedActivations(folder / "written", budget=0)
        self._writable: Mapping[_Place, Tensor] = {}  # what it wrote: it knows what is held here
        self.layers: tuple[int, ...] = ()
        """Of each layer of the model, the layer of the dense model that it was."""

    def follow(self, cuts: Cuts) -> None:
        """Notes which layers a pass left."""
        if cuts.layers is not None:
            self.layers = tuple(self.layers[index] for index in cuts.layers)

    def load(self) -> Decoder:
        """The model, loaded or mapped.

        Raises:
            SurgeryError: what could not be saved as it is.
        """
        model = self._source.load(self.weights)
        check_resident(model, self._source.name)
        check_rotary(model, self._source.name)
        if self._teaches and not self._source.mappable:  # it is as it was only now, or takes long to be read again
            self._teacher = Decoder(sharing_copy(model).requires_grad_(False), self._family)
        decoder = Decoder(model, self._family)
        self.layers = tuple(range(len(decoder)))
        if self._watched:
            for layer in decoder.modules:
                layer.register_forward_pre_hook(lambda *_: self.check())
        return decoder

    def check(self) -> None:
        """Refuses to read on in the model's files if somebody has changed them: what is in memory may be mapped from them.

        Raises:
            CheckpointError: naming the file.
        """
        for file in self._watched:
            file.check()

    def teacher(self) -> Decoder:
        """The dense model, opened again, if it is not kept, when it is first asked for: mapped from its files if it can be."""
        if self._teacher is None:
            weights = MappedWeights(self._folder / "dense") if self._source.mappable else None
            self._teacher = Decoder(self._source.load(weights).requires_grad_(False), self._family)
        return self._teacher

    def as_it_is(self, decoder: Decoder) -> Decoder | None:
        """The model as it is now, which stays so when it is cut; None where its old weights would not fit in memory beside the new ones."""
        if self.weights is None and self._source.resident:
            size = sum(value.numel() * value.element_size() for value in decoder.model.parameters())
            if not processes.all_true(size <= free_memory()):
                return None
        return Decoder(sharing_copy(decoder.model).requires_grad_(False), self._family)

    def let_teacher_go(self) -> None:
        """Gives back what the dense model takes of memory."""
        self._teacher = None

    def close_teacher(self) -> None:
        """The same, if it can be opened again."""
        if not self._source.in_memory:
            self.let_teacher_go()
            give_back()

    def release(self, module: nn.Module) -> None:
        """Gives back the memory of those weights of a module of the model that lie on disk; they are read again when they are used again."""
        for value in module.parameters():
            self.let_go(value.data)

    def let_go(self, tensor: Tensor) -> None:
        """Gives back the memory of a weight, if it lies on disk."""
        if self.weights is not None:
            self.weights.let_go(tensor)
            self._written.release(tensor)

    def write_changes(self, model: nn.Module) -> None:
        """Lets weights that a pass changed lie where the model's do."""
        if self.weights is not None:
            self.weights.write_changes(model, self.let_go)
            self._writable = {}

    @contextmanager
    def writable(self, decoder: Decoder) -> Iterator[dict[str, Tensor]]:
        """Lets the weights of the model be written in place within a `with`: what also lies elsewhere gets storage of its own.

        That is what the teacher shares, and what is mapped from files, where a write would be lost when a layer gives its memory back:
        such weights are moved to files that can be written, and their layers go on giving back their memory.

        Yields:
            What was there before, by the names of the parameters.
        """
        named = dict(decoder.model.named_parameters())
        if self.weights is not None:
            before = {name: value.data for name, value in named.items()}
            with self._in_files(decoder, named):
                yield before
            return
        shared = set() if self._teacher is None else {_storage(value) for value in self._teacher.model.parameters()}
        before = {name: value.data for name, value in named.items() if _storage(value) in shared}
        _move(named, {_place(value): value.clone() for value in before.values()})
        yield before

    @contextmanager
    def _in_files(self, decoder: Decoder, named: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """Moves all weights to files that can be written; after the `with` they lie there still, until changes are written."""
        self._writable = written = dict[_Place, Tensor]()
        for module in decoder.model.modules():
            for value in module.parameters(recurse=False):
                if _place(value) not in written:
                    written[_place(value)] = self._written.store(value.data)
            self.release(module)
        _move(named, written)
        hooks = [
            layer.register_forward_hook(lambda module, *_: self.release(module), always_call=True)
            for layer in decoder.modules
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


_Place = tuple[int, tuple[int, ...], tuple[int, ...]]
"""Address, shape and strides of a tensor: those that are equal in them are one."""


def _place(value: Tensor) -> _Place:
    return value.data_ptr(), tuple(value.shape), value.stride()


def _move(parameters: Mapping[str, nn.Parameter], moved: Mapping[_Place, Tensor]) -> None:
    """Lets parameters be where their values were moved; what is tied stays so."""
    for parameter in parameters.values():
        parameter.data = moved.get(_place(parameter), parameter.data)


def _storage(value: Tensor) -> int:
    """The address of the storage of a tensor."""
    return value.untyped_storage().data_ptr()

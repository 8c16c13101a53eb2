"""A model that is trained with gates in its weights, as it will be when the gates are cut: nothing else is to be made up for then."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from optimum_prune.anatomy.norms import is_rms, norms_of, offset
from optimum_prune.refit.hidden_ends import embedding_scale
from optimum_prune.refit.projecting import reads
from optimum_prune.surgery.cuts import Cuts, Decision
from optimum_prune.surgery.operation import carry_out
from optimum_prune.training.gates import Gates, Row
from optimum_prune.training.student import Student

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from optimum_prune.anatomy.axis import Axis
    from optimum_prune.anatomy.decoder import Decoder

GATES = "gates"
"""What they are called in the model."""

Values = Mapping[str, Tensor]
"""Gates, by the keys of their rows."""


class _Factor(NamedTuple):
    """What a parameter is multiplied by along a dimension, or as a whole."""

    row: Row
    units: Tensor
    """Of each feature along the dimension, its unit; of a whole parameter, a single one."""
    dim: int

    def of(self, values: Values, parameter: Tensor) -> Tensor:
        """The factor, of a shape that fits the parameter's."""
        chosen = values[self.row.key].to(parameter.dtype)[:, self.units.to(parameter.device)]
        shape = [1] * parameter.ndim
        if len(self.units) > 1 or len(chosen) > 1:
            shape[self.dim] = len(self.units)
        if len(chosen) > 1:
            shape[0] = len(chosen)
        return chosen.view(shape)


@dataclass
class _Gated:
    """A parameter with gates."""

    parameter: nn.Parameter
    places: list[tuple[nn.Module, str]]
    """The modules that have it, several where it is tied, and what they call it."""
    offset: float = 0.0
    """What is added to it before it multiplies."""
    factors: list[_Factor] = field(default_factory=list)

    def value(self, values: Values) -> Tensor:
        """The parameter as the gates are."""
        found = self.parameter + self.offset if self.offset else self.parameter
        for factor in self.factors:
            found = found * factor.of(values, found)
        return found - self.offset if self.offset else found


class Shearing(Student):
    """A model whose weights are multiplied by gates while it is trained.

    Args:
        decoder: a copy whose weights are its own.
        behind: the norms through which blocks go before they are added to hidden states, by block.
        rate: the learning rate of gates.
    """

    left_alone = "it is cut as it began"

    def __init__(
        self, decoder: Decoder, folder: Path, gates: Gates, behind: Mapping[str, str], *, rate: float, **how: Any
    ) -> None:
        self.gates = gates
        self._decoder, self._rate = decoder, rate
        hidden = decoder.hidden()
        decoder.model.add_module(GATES, gates.to(decoder.model.device))
        self._gated: dict[int, _Gated] = {}
        self._places: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in decoder.model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                self._places.setdefault(id(parameter), []).append((module, name))
        axes = {row.key: decoder.layer(row.layer).axes[row.axis] for row in gates.rows if row.layer is not None}
        for row in gates.rows:
            if row.layer is not None:
                self._gate_units(row, axes[row.key])
            elif not row.axis:
                self._gate_layers(row, behind)
        self._features = next((row for row in gates.rows if row.layer is None and row.axis), None)
        if self._features is not None and hidden is not None:
            self._gate_features(self._features, hidden)
        super().__init__(decoder.model, folder, **how)
        self._masked = {name: there for name, there in self._masked.items() if not name.startswith(f"{GATES}.")}

    # What is multiplied by which gates

    def _add(self, root: nn.Module, path: str, factor: _Factor, more: float = 0.0) -> None:
        found = root.get_parameter(path)
        self._gated.setdefault(id(found), _Gated(found, self._places[id(found)], more)).factors.append(factor)

    def _gate_units(self, row: Row, axis: Axis) -> None:
        """What a layer computes of units, where it is put out."""
        assert row.layer is not None
        member = axis.outgoing
        features = member.features(torch.arange(axis.units)[:, None], axis.units)
        owners = torch.empty(features.numel(), dtype=torch.long)
        owners[features] = torch.arange(axis.units)[:, None].expand_as(features)
        self._add(self._decoder.modules[row.layer], axis.output, _Factor(row, owners, member.dim))

    def _gate_layers(self, row: Row, behind: Mapping[str, str]) -> None:
        """What the blocks of each layer add to hidden states."""
        for layer in self._decoder.layers:
            factor = _Factor(row, torch.tensor([layer.index]), 0)
            for block in layer.blocks:
                if block in behind:
                    norm = layer.part(behind[block])
                    for name, _ in norm.named_parameters(recurse=False):
                        more = offset(norm) if name == "weight" else 0.0
                        self._add(layer.module, f"{behind[block]}.{name}", factor, more)
                    continue
                for path in layer.output_parameters(block):
                    self._add(layer.module, path, factor)

    def _gate_features(self, row: Row, axis: Axis) -> None:
        """What writes hidden states; what reads them sees that some are 0, and norms how many are not."""
        model, norms = self._decoder.model, set(norms_of(self._decoder.model, axis.members))
        for member in axis.members:
            path = member.path.rpartition(".")[0]
            module, value = model.get_submodule(path), model.get_parameter(member.path)
            table = isinstance(module, nn.Embedding)
            if path not in norms and (table or not reads(module, value, member.dim)):
                self._add(model, member.path, _Factor(row, torch.arange(axis.units), member.dim))
        for path in norms:
            norm = model.get_submodule(path)
            rms = is_rms(norm)
            norm.register_forward_pre_hook(partial(self._in_front_of_norm, rms))
            norm.register_forward_hook(self._behind_norm)
        if embedding_scale(self._decoder, axis.units, row.keep) != 1:
            model.get_input_embeddings().register_forward_hook(
                lambda _, __, output: output * self._share.sqrt().to(output.dtype)
            )

    # Norms over those features that are there

    def _in_front_of_norm(self, rms: bool, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Any, ...]:
        """Hidden states whose mean square over all features is that over those that are there, and whose mean too."""
        hidden, there = args[0], self._there
        more = self._share.rsqrt().to(hidden.dtype)
        if rms:
            return (hidden * more, *args[1:])
        mean = (hidden * there).sum(-1, keepdim=True) / there.sum()
        return (mean + (hidden - mean) * there * more, *args[1:])

    def _behind_norm(self, norm: Any, _: tuple[Any, ...], output: Tensor) -> Tensor:
        there, bias = self._there, getattr(norm, "bias", None)
        less = self._share.sqrt().to(output.dtype)
        if bias is None:
            return output * (there * less)
        shifted: Tensor = ((output - bias) * less + bias) * there
        return shifted

    # While it is trained

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Its modules see weights with gates within a `with`, and until the next: what is computed again for gradients sees them too."""
        with torch.set_grad_enabled(self.model.training and torch.is_grad_enabled()):
            values = self.gates.values()
            if self._features is not None:
                drawn = values[self._features.key][0].detach() != 0
                self._there = drawn if self.model.training else self.gates.open(self._features)[0]
                self._share = self._there.float().mean()
            for gated in self._gated.values():
                value = gated.value(values)
                for module, name in gated.places:
                    module.__dict__[name] = value  # stands in front of the parameter
        with super().computing():
            yield

    def begin(self, step: int, part: float) -> None:
        """Gates are drawn anew."""
        self.gates.begin(step, part)

    def regroup(self, optimizer: Optimizer) -> None:
        """Gates have a learning rate of their own, and no weight decay."""
        own = {id(value) for value in self.gates.parameters()}
        like = dict(optimizer.param_groups[0])
        for group in optimizer.param_groups:
            group["params"] = [value for value in group["params"] if id(value) not in own]
        optimizer.add_param_group(
            {**like, "params": list(self.gates.parameters()), "lr": self._rate, "weight_decay": 0.0}
        )

    # What becomes of it

    def cuts(self) -> Cuts:
        """What is kept, as the gates are now; also of layers that go, since the hidden states of all layers are cut alike."""
        layers, units = None, dict[tuple[int | None, str], Any]()
        for row in self.gates.rows:
            kept = [tuple(each.nonzero().flatten().tolist()) for each in self.gates.open(row)]
            if not row.axis:
                layers = kept[0]
            else:
                units[row.layer, row.axis] = tuple(kept) if row.groups > 1 else kept[0]
        return Cuts(layers, {}, units)

    @torch.no_grad()
    def folded(self, cuts: Cuts) -> dict[str, Tensor]:
        """The weights of the layers that stay, by their names, with the gates multiplied into them and cut; the model is done with then."""
        values = self.gates.eval().values()
        for gated, value in [(gated, gated.value(values)) for gated in self._gated.values()]:
            for module, name in gated.places:
                module.__dict__.pop(name, None)
            gated.parameter.data = value
        del self.model._modules[GATES]
        carry_out(self._decoder, Decision(replace(cuts, layers=None)))
        inside = f"{self._decoder.family.layers}."
        left = range(len(self._decoder)) if cuts.layers is None else cuts.layers
        stay = tuple(f"{inside}{index}." for index in left)
        named = self.model.named_parameters()
        return {name: value.detach() for name, value in named if not name.startswith(inside) or name.startswith(stay)}

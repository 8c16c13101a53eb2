"""Controls: what a cut comes to beside the same cut chosen at random and by magnitude, measured on a few windows.

All are treated alike: units and layers go, or weights become zero, and where the pass refitted what is left, that is refitted for each
choice on the same few windows. So a perplexity here tells how good the choice is, not how good the model is that the pass leaves. The
model as it was is gone through once, layer by layer, with the hidden states of each choice.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optimum_prune.anatomy.workload import Cost, Workload
from optimum_prune.calibration.calibration import NoJournal
from optimum_prune.calibration.stream import Stream, logits, run_without
from optimum_prune.calibration.visit import LayerVisit
from optimum_prune.evaluation.losses import losses_cost, perplexity_of, token_losses
from optimum_prune.evaluation.perplexity import perplexity
from optimum_prune.machine import processes
from optimum_prune.machine.mapped_weights import held
from optimum_prune.machine.progress import Progress
from optimum_prune.refit.hidden import Projecting
from optimum_prune.refit.projecting import Basis
from optimum_prune.refit.solving import damp, refit_cheaply
from optimum_prune.selection.divergence import LENGTH, split
from optimum_prune.selection.otherwise import at_random, by_magnitude, chosen_otherwise, zeros_made, zeros_otherwise
from optimum_prune.surgery.cuts import NOTE, Cuts, Decision
from optimum_prune.surgery.operation import carry_out, changed_layer, sharing_copy

if TYPE_CHECKING:
    from optimum_prune.anatomy.decoder import Decoder, DecoderLayer
    from optimum_prune.anatomy.shape import Shape
    from optimum_prune.calibration.calibration import Calibration
    from optimum_prune.text.windows import Windows

FITTED = 4
"""Windows that is refitted on, at most."""
DAMPING = 0.01
"""At least. A refit on few tokens fits these and nothing else, so damping is no less than features there are for each token."""
OTHERS = ("random", "magnitude")
ALIKE = 0.9
"""The cosine of features that were trained and those that they were; of directions and features, it is small."""
ROTATED = "hidden states were rotated, and no choice of features comes to as much, so nothing is measured beside the directions that stay"


@dataclass(frozen=True)
class Control:
    """What a pass made of a model.

    Args:
        before: the model as it was.
        after: as it is.
        cuts: of the pass.
        decided: the names of the parameters that it gave new values.
        trained: whether it trained these, which the choices here are not.
    """

    before: Decoder
    after: Decoder
    cuts: Cuts
    decided: Collection[str]
    trained: bool = False

    def evidence(self, calibration: Calibration, seed: int = 0) -> dict[str, Any]:
        """Perplexities of the choices, and a sentence on them; nothing where there was no choice of layers, blocks, units or zeros."""
        if self._rotated():
            return {NOTE: ROTATED}
        found, windows = self._measured(calibration, seed), len(_few(calibration.windows)[1])
        return found and {"windows": windows, "perplexity": found, NOTE: told(found, windows, trained=self.trained)}

    def _rotated(self) -> bool:
        """Whether features of hidden states went after a rotation."""
        kept = [units for (index, _), units in self.cuts.units.items() if index is None]
        tables = [decoder.model.get_input_embeddings().weight.detach() for decoder in (self.before, self.after)]
        return bool(kept) and not _is_part(tables[0][:, list(kept[0])], tables[1])

    def _measured(self, calibration: Calibration, seed: int) -> dict[str, float]:
        """The perplexities of the choices."""
        if any(index is None for index, _ in self.cuts.units):
            return features_controls(self.before, self.cuts, calibration, seed)
        zeros = self._zeros()
        if self.cuts == Cuts() and not zeros:
            return {}
        scorers = {"random": at_random(seed), "magnitude": by_magnitude()}
        cuts = {"dense": Cuts(), "chosen": self.cuts}
        cuts |= {name: chosen_otherwise(self.before, self.cuts, scorer) for name, scorer in scorers.items()}
        masks = {"chosen": zeros}
        for name, scorer in scorers.items():
            masks[name] = {
                path: _others(there, scorer.of(self.before.model.get_parameter(path).detach()))
                for path, there in zeros.items()
            }
        return Comparison(self.before, self.decided).perplexities(cuts, calibration, masks)

    def _zeros(self) -> dict[str, Tensor]:
        """Where matrices were made sparse, by their names."""
        if self.cuts != Cuts():
            return {}
        found: dict[str, Tensor] = {}
        for layer, before in zip(self.after.layers, self.before.layers, strict=True):
            named = {f"{layer.prefix}{path}": zeros for path, zeros in zeros_made(layer, before).items()}
            found |= {name: zeros for name, zeros in named.items() if name in self.decided}
        return found


@dataclass(frozen=True)
class Comparison:
    """A model that is cut in several ways, all treated alike.

    Args:
        model: stays as it is.
        refits: the names of the projections that are refitted behind units that go.
    """

    model: Decoder
    refits: Collection[str]

    def perplexities(
        self,
        cuts: Mapping[str, Cuts],
        calibration: Calibration,
        masks: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> dict[str, float]:
        """Of each cut, on a few windows; refitted on a few others.

        Args:
            masks: of each cut, where matrices become zero, by their names.
        """
        fitted, measured = _few(calibration.windows)
        streams = _Streams(calibration.on(fitted), calibration.on(measured), self.model, list(cuts))
        for layer in calibration.track(self.model.layers, "Comparing, layer by layer"):
            with held(layer.module):
                for name, cut in cuts.items():
                    if cut.layers is None or layer.index in cut.layers:
                        self._run(layer, cut, (masks or {}).get(name, {}), streams, name)
        return {name: streams.perplexity(name) for name in cuts}

    def _run(self, layer: DecoderLayer, cuts: Cuts, zeros: Mapping[str, Tensor], streams: _Streams, name: str) -> None:
        """Moves the streams of a choice behind a layer."""
        index, own = layer.index, dict(cuts.of(layer.index))
        weights = {
            path: self.model.model.get_parameter(path).detach().masked_fill(there, 0)
            for path, there in zeros.items()
            if path.startswith(layer.prefix)
        }
        gone = [block for block in layer.blocks if block not in cuts.blocks.get(index, layer.blocks)]
        if own:
            weights |= self._refitted(layer, cuts, streams.fitted[name], gone)
        changed = layer
        if own or weights:
            alone = Decision(Cuts(units={(index, axis): kept for axis, kept in own.items()}), weights)
            changed = replace(layer, module=changed_layer(self.model, alone, index))
        for stream in (streams.fitted[name], streams.measured[name]):
            for position, (batch, hidden) in enumerate(stream):
                stream[position] = (batch, run_without(changed, batch, hidden, gone))

    def _refitted(self, layer: DecoderLayer, cuts: Cuts, stream: Stream, gone: Sequence[str]) -> dict[str, Any]:
        """New weights of the projections behind units that go, where the pass gave them some."""
        axes = [
            axis
            for axis in layer.axes.values()
            if (layer.index, axis.name) in cuts.units
            and axis.block not in gone
            and f"{layer.prefix}{axis.output}" in self.refits
        ]
        if not axes:
            return {}
        visit, weights = LayerVisit(layer, list(stream)), dict[str, Any]()
        visit.leave_out(gone)
        for axis, grams in zip(axes, visit.grams(*axes), strict=True):
            projection, kept = layer.projection(axis.output), cuts.kept(layer.index, axis.name)
            maps = []
            for weight, gram, units in zip(projection.maps, grams, kept if axis.groups else [kept], strict=True):
                damping = max(DAMPING, gram.features / max(gram.tokens, 1))
                solved, _ = refit_cheaply(partial(damp, gram.exact, damping), weight, axis.inputs(units))  # type: ignore[arg-type]
                maps.append(solved.T.to(weight.device, weight.dtype))
            stored = projection.stored(maps, None)
            weights |= layer.named(stored)
        return weights


def _few(windows: Windows) -> tuple[Windows, Windows]:
    """Windows to refit on, and others to measure on."""
    fitted, measured = split(windows)
    return fitted.part(slice(FITTED), slice(LENGTH)), measured


def _others(zeros: Tensor, scores: Tensor) -> Tensor:
    """As many zeros chosen otherwise; of experts that lie in one tensor, in each."""
    flat = zeros.flatten(0, -2)
    return zeros_otherwise(flat, scores.to(zeros.device).flatten(0, -2)).view_as(zeros)


class _Streams:
    """Hidden states of a few windows to refit on and of a few to measure on, for each of some choices."""

    def __init__(self, fitted: Calibration, measured: Calibration, decoder: Decoder, names: Sequence[str]) -> None:
        first, second = fitted.embed(decoder), measured.embed(decoder)
        self._decoder = decoder
        self._windows = measured.windows
        self.fitted = {name: list(first) for name in names}
        self.measured = {name: list(second) for name in names}

    def perplexity(self, name: str) -> float:
        """Of a choice, once its hidden states are behind the last layer."""
        total = math.fsum(self._losses(self.measured[name]))
        (total,) = processes.all_sums([total])
        mean = total / max(int(self._windows.mask[:, 1:].sum()), 1)
        return perplexity_of(mean) if math.isfinite(mean) else math.inf

    def _losses(self, stream: Stream) -> Iterator[float]:
        with torch.no_grad():
            for batch, hidden in stream:
                for one, part in batch.split(hidden):
                    found = logits(self._decoder, one, part)
                    yield token_losses(found[0], one.tokens[0], one.mask[0]).sum(dtype=torch.float32).item()


def features_controls(before: Decoder, cuts: Cuts, calibration: Calibration, seed: int) -> dict[str, float]:
    """The same for features of hidden states, and whatever else goes with them: norms are rescaled for each choice, and nothing is refitted."""
    ((_, name),) = (place for place in cuts.units if place[0] is None)
    axis = before.hidden()
    assert axis is not None, "features went"
    fitted, measured = _few(calibration.windows)
    few = calibration.quiet().on(fitted)
    chosen = {"chosen": cuts, "random": chosen_otherwise(before, cuts, at_random(seed))}
    chosen["magnitude"] = chosen_otherwise(before, cuts, by_magnitude())
    found = {"dense": perplexity(before.model, measured, Progress()).value}
    for choice, cut in chosen.items():
        basis = Basis.of_features(cut.kept(None, name), axis.units)  # type: ignore[arg-type]
        weights = Projecting(basis, DAMPING, 0.0, False).weights(before, axis, replace(few, journal=NoJournal()))
        copied = replace(before, model=sharing_copy(before.model))
        carry_out(copied, Decision(Cuts.along(name, {None: cut.kept(None, name)}), weights))
        others = {place: units for place, units in cut.units.items() if place[0] is not None}
        carry_out(copied, Decision(replace(cut, units=others)))
        found[choice] = perplexity(copied.model, measured, Progress()).value
    return found


def _is_part(part: Tensor, table: Tensor) -> bool:
    """Whether a table is part of another, but for a factor and for what training moves."""
    if part.shape != table.shape:
        return False
    likeness = torch.nn.functional.cosine_similarity(part.float().flatten(), table.float().flatten(), dim=0)
    return likeness.item() > ALIKE


def told(found: Mapping[str, float], windows: int, *, trained: bool = False) -> str:
    """What a person is to know of the perplexities of choices; of those of a pass that trains, that they are not trained."""
    figures = (
        f"{found['chosen']:,.2f} as chosen, {found['random']:,.2f} at random, {found['magnitude']:,.2f} by magnitude"
    )
    better = [name for name in OTHERS if not found["chosen"] < found[name]]
    untrained = ", without any training," if trained else ","
    line = f"the choice alone{untrained} refitted on little, on {windows} window{'' if windows == 1 else 's'}: perplexity {figures}"
    if not better:
        return line
    return f"{line}; so the choice is no better than {' or '.join('chance' if name == 'random' else name for name in better)} there"


def controls_cost(shape: Shape, work: Workload) -> Cost:
    """What measuring controls takes."""
    few = work.on(min(2 * FITTED, work.windows), min(LENGTH, work.length))
    largest = max(work.layer(layer) for layer in shape.layers)
    runs = few.run_all(shape.layers, few.tokens, 2 * (2 + len(OTHERS)))
    predicted = losses_cost(few, few.tokens / 2, few.length, 2 + len(OTHERS))
    return runs.followed_by(predicted).with_memory(few.states(3 + len(OTHERS)) + 2 * largest)

"""Matrices of decoder layers made sparse: zeros in them, layer by layer, each layer on the stream of the sparse ones before it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from optimum_prune.anatomy.matrices import matrices
from optimum_prune.anatomy.workload import Cost, Workload
from optimum_prune.calibration.inputs import Statistic, summed_inputs
from optimum_prune.calibration.statistics import gram_cost, gram_memory
from optimum_prune.calibration.stream import walk_cost
from optimum_prune.refit.solving import cholesky
from optimum_prune.selection.sparsity import Sparsity
from optimum_prune.surgery.cuts import NOTE, Decision

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    from optimum_prune.anatomy.decoder import Decoder, DecoderLayer
    from optimum_prune.anatomy.shape import LayerShape, Shape
    from optimum_prune.calibration.calibration import Calibration
    from optimum_prune.calibration.visit import LayerVisit

S = TypeVar("S", bound=Statistic)

SPARSE = "zeros are stored and multiplied like all other weights, so neither size nor speed changes until an engine makes use of them"
REMARK = f"{SPARSE[0].upper()}{SPARSE[1:]}."
BLOCK = 128
"""Columns behind which the rest of a matrix is updated at once."""


@dataclass(frozen=True)
class Sparsifying(Generic[S]):
    """How the matrices of a decoder layer become sparse.

    Args:
        step: the pass, for errors.
        statistic: what is summed of the inputs of a matrix: of so many features, on a device.
        sparse: from matrices of shape (out, in) that have the same inputs, and what was summed of these, the sparse ones.
    """

    step: str
    sparsity: Sparsity
    protect: Collection[int]
    statistic: Callable[[int, torch.device], S]
    sparse: Callable[[Sequence[Tensor], S], Sequence[Tensor]]

    def decisions(self, decoder: Decoder, calibration: Calibration, description: str) -> Iterator[Decision]:
        """New weights for each layer in turn, and a note on all of them.

        Raises:
            RecipeError: the pattern does not go into the inputs of a matrix.
        """
        for layer in decoder.layers:
            self._check(layer)
        zeros, weights, unreached = 0, 0, 0
        for visit in calibration.walk(decoder, description):
            if visit.index not in self.protect:
                decision = calibration.once(f"layer {visit.index}", partial(self._decision, visit))
                zeros += sum(int((value == 0).sum()) for value in decision.weights.values())
                weights += sum(value.numel() for value in decision.weights.values())
                unreached += decision.evidence["unreached"]
                yield decision
        yield Decision(evidence={"zeros": zeros, "unreached": unreached, NOTE: _told(zeros, weights, unreached)})

    def _check(self, layer: DecoderLayer) -> None:
        for matrix in matrices(layer):
            size = layer.projection(matrix.parameter).maps[0].shape[1]
            self.sparsity.check_size(self.step, f"number of inputs of '{matrix.parameter}'", size)

    def _decision(self, visit: LayerVisit) -> Decision:
        layer, found = visit.layer, matrices(visit.layer)
        summed = summed_inputs(visit, found, self.statistic)
        projections = {matrix.parameter: layer.projection(matrix.parameter) for matrix in found}
        maps = {parameter: list(projection.maps) for parameter, projection in projections.items()}
        places: dict[int, list[tuple[str, int]]] = {}  # those whose inputs are the same, since much of the work is
        for parameter, statistics in summed.items():
            for number, statistic in enumerate(statistics):
                places.setdefault(id(statistic), []).append((parameter, number))
        unreached = 0
        for same in places.values():
            parameter, number = same[0]
            statistic = summed[parameter][number]
            unreached += 0 if statistic.tokens else len(same)
            given = [maps[parameter][number] for parameter, number in same]
            made = self.sparse(given, statistic)
            for (parameter, number), weight in zip(same, made, strict=True):
                maps[parameter][number] = weight.to(given[0].device, given[0].dtype)
        weights: dict[str, Tensor] = {}
        for parameter, projection in projections.items():
            weights |= projection.stored(maps[parameter], None)
        shares = {path: _share_of_zeros(value) for path, value in weights.items()}
        evidence = {"layer": layer.index, "zeros": shares, "unreached": unreached}
        named: Mapping[str, Any] = layer.named(weights)
        return Decision(weights=named, evidence=evidence)


def _share_of_zeros(weight: Tensor) -> float:
    return 1 - weight.count_nonzero().item() / max(weight.numel(), 1)


def _told(zeros: int, weights: int, unreached: int) -> str:
    """What a person is to know of zeros, and of matrices that no token reached."""
    told = f"{100 * zeros / max(weights, 1):.1f} % of {weights / 1e6:,.1f} M weights are zero; {SPARSE}"
    if not unreached:
        return told
    return f"{told}; no token of the text reached {unreached:,} matrices of experts, whose zeros went by magnitude alone: more text tells more"


def inverse_factor(gram: Float[Tensor, "in in"]) -> Float[Tensor, "in in"]:
    """U with `U'U = H^-1`, U upper triangular; H, in float64, is overwritten."""
    inverse = torch.cholesky_inverse(cholesky(gram))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def without_lowest(
    weight: Float[Tensor, "out in"],
    factor: Float[Tensor, "in in"],
    lowest: Callable[[Float[Tensor, "out together"]], Bool[Tensor, "out together"]],
    together: int,
) -> Float[Tensor, "out in"]:
    """A matrix without the weights that matter least, the rest changed so that its outputs change least (SparseGPT).

    Columns are gone through from the first to the last; what the zeros in one change of the output, those behind it make up for. Which
    weights go is decided for some columns at a time, by `w^2 / [H^-1]_jj`, where both are of the columns that are left by then.

    Args:
        factor: of the inverse of the damped gram of the inputs, as `inverse_factor` has it.
        lowest: of scores of some columns, True where a weight goes.
        together: how many columns these are.
    """
    left = weight.to(factor.device, torch.float64, copy=True)
    block = max(BLOCK // together, 1) * together
    for start in range(0, left.shape[1], block):
        end = min(start + block, left.shape[1])
        own, errors, columns = factor[start:end, start:end], torch.zeros_like(left[:, start:end]), left[:, start:end]
        for column in range(end - start):
            if column % together == 0:
                ahead = slice(column, column + together)
                gone = lowest(columns[:, ahead].square() / own.diagonal()[ahead].square())
            going = gone[:, column % together]
            errors[:, column] = torch.where(going, columns[:, column], 0.0) / own[column, column]
            columns[:, column:] -= torch.outer(errors[:, column], own[column, column:])
            columns[:, column].masked_fill_(going, 0.0)  # it is so but for rounding
        left[:, end:] -= errors @ factor[start:end, end:]
    return left


def sparsifying_cost(shape: Shape, work: Workload, protect: Collection[int], *, solves: bool = False) -> Cost:
    """What it takes to make the layers of a model sparse.

    Args:
        solves: whether the rest of a row makes up for what goes.
    """
    layers = [layer for index, layer in enumerate(shape.layers) if index not in protect]
    seen = work.run_all(layers, work.tokens).with_memory(work.stored_states())
    changed = [_changing_cost(layer, work, solves=solves) for layer in layers]
    return walk_cost(work, shape).followed_by(seen, *changed)


def _changing_cost(layer: LayerShape, work: Workload, *, solves: bool) -> Cost:
    """Of one layer, whose inputs are known."""
    new = work.layer(layer)
    widths = [work.hidden, work.hidden, *(layer.width(block) for block in layer.blocks)]
    widest = max(widths)
    scores = 2 * 8 * widest**2  # of the largest matrix, and what is made of them
    cost = Cost(new + scores + work.stored_states(), left=0 if work.offloaded else new, elements=3 * layer.parameters)
    if not solves:
        return cost
    grams = work.in_memory(sum(4 * width**2 for width in widths))
    summing = (gram_cost(work, width).with_memory(new + grams + gram_memory(work, width)) for width in widths)
    solved = Cost(
        new + grams + 3 * 8 * widest**2 + work.stored_states(),
        solving=sum(2 * width**3 for width in widths) + 2 * widest * layer.parameters,
    )
    return cost.followed_by(*summing, solved)

"""What a block reads of hidden states, refitted once what is in front of it was cut.

Cuts in front leave an error in the hidden states that reach a block, and part of it can be told from these themselves. With x what
reaches the block in the dense model, x~ what reaches it now, and B one of its weights that read it, a ridge regression towards B finds
the weights that compute from x~ nearly what B does from x:

    B + strength * B (X'X~ - X~'X~) (X~'X~ + damping * median(diag X~'X~) * I)^-1

There are as many unknowns for an output as features of hidden states, far fewer than in front of an output projection; so this
hardly fits the calibration text too closely.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from optimum_prune.anatomy.matrices import Matrix, matrices
from optimum_prune.anatomy.workload import Cost, Workload
from optimum_prune.calibration.inputs import first_with_same_inputs
from optimum_prune.machine import processes
from optimum_prune.refit.projecting import Reading
from optimum_prune.refit.reconstruction import named

if TYPE_CHECKING:
    from torch import Tensor

    from optimum_prune.anatomy.decoder import DecoderLayer
    from optimum_prune.calibration.visit import LayerVisit


def reread(visit: LayerVisit, reference: LayerVisit, block: str, damping: float, strength: float) -> dict[str, Tensor]:
    """New weights, by their names in the model, of what reads hidden states in a block; none where that is experts alone.

    Args:
        reference: the dense model's visit of the layer, not left yet.
        strength: 0 not at all, 1 as near as the least squares can.
    """
    readers = processes.broadcast_from_first(lambda: _readers(visit, block))
    if not readers:
        return {}
    layer, first = visit.layer, readers[0].parameter
    weight = layer.projection(first).maps[0]
    sums = Reading(weight.shape[1], weight.shape[1], weight.device)
    pairs = zip(visit.inputs_of(first), reference.inputs_of(first), strict=True)
    for (batch, _), (now, dense) in zip(visit.stream, pairs, strict=True):
        sums.add(batch.unpadded(now), batch.unpadded(dense).to(now.device))
        visit.activations.release(now, dense)
    found = {}
    for reader in readers:
        old = layer.module.get_parameter(reader.parameter).detach()
        dim = 0 if layer.linear_of(reader.parameter).transposed else 1
        with named(f"The projection '{reader.module}' of layer {visit.index}", old, damping):
            new = sums.fitted(old, old, dim, damping)
        found[reader.parameter] = old.lerp(new, strength)
    return layer.named(found)  # type: ignore[return-value]  # tensors, as they were given


def _readers(visit: LayerVisit, block: str) -> list[Matrix]:
    """The matrices of a block that are given the same hidden states as the first of them."""
    if not visit.stream:
        return []
    layer = visit.layer
    outputs, size = layer.outputs_of(block), layer.config.hidden_size
    inside = [
        matrix
        for matrix in matrices(layer)
        if matrix.read is None
        and _lies_in(layer, matrix, block)
        and matrix.parameter not in outputs
        and layer.linear_of(matrix.parameter).weight.shape[1] == size
    ]
    first = first_with_same_inputs(visit, inside)
    return [matrix for matrix in inside if first[matrix.parameter] == first[inside[0].parameter]]


def _lies_in(layer: DecoderLayer, matrix: Matrix, block: str) -> bool:
    return any(f"{matrix.module}.".startswith(f"{module}.") for module in layer.modules_of(block))


def reading_cost(work: Workload) -> Cost:
    """Refits what a block reads; what reaches it is computed for what follows as well."""
    size = work.hidden
    return Cost(
        memory=2 * 4 * size**2 + 4 * 8 * size**2 + work.stored_states(2),
        statistics=4 * work.tokens * size**2,
        solving=size**3 / 3 + 12 * size**3,
    )

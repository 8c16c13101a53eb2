"""Which features of hidden states matter, and in which directions they vary, as norms hand them on over all layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optimum_prune.anatomy.norms import gain, is_rms, norms_of
from optimum_prune.calibration.statistics import Gram, SquaredNorms
from optimum_prune.machine import processes
from optimum_prune.refit.projecting import read_behind, readers_of, seen
from optimum_prune.surgery.operation import local_members

if TYPE_CHECKING:
    from jaxtyping import Float

    from optimum_prune.anatomy.axis import Axis
    from optimum_prune.anatomy.decoder import Decoder
    from optimum_prune.calibration.calibration import Calibration
    from optimum_prune.calibration.visit import LayerVisit


def energies(decoder: Decoder, calibration: Calibration, axis: Axis) -> Float[Tensor, " features"]:
    """Of each feature, the mean square of what norms put out of it, relative to that of all, over layers; float64."""
    total = torch.zeros(axis.units, dtype=torch.float64)
    for visit in calibration.walk(decoder, "Energies, layer by layer"):
        norms = norms_of(visit.layer.module, local_members(axis, visit.layer.prefix))
        sums = {path: SquaredNorms(axis.units, visit.layer.part(path).weight.device) for path in norms}  # type: ignore[arg-type]
        _listen(visit, norms, lambda path, rows, sums=sums: sums[path].add(rows))  # type: ignore[misc]
        for each in sums.values():
            value = each.value.cpu()
            total += value / value.sum().clamp(min=1e-30)
    return total


def principal_directions(decoder: Decoder, calibration: Calibration, axis: Axis) -> Float[Tensor, "features features"]:
    """The directions in which what norms put out, but for their weights, varies, the largest first; float64, columns."""
    gram: Gram | None = None
    for visit in calibration.walk(decoder, "Principal directions, layer by layer"):
        norms = norms_of(visit.layer.module, local_members(axis, visit.layer.prefix))
        gains = {path: gain(visit.layer.part(path)) for path in norms}
        gram = gram or Gram(axis.units, visit.layer.part(norms[0]).weight.device)  # type: ignore[arg-type]
        _listen(visit, norms, lambda path, rows, gains=gains, gram=gram: gram.add(rows.float() / gains[path]))  # type: ignore[misc]
    assert gram is not None
    found: Tensor = torch.linalg.eigh(gram.exact).eigenvectors.flip(1).cpu()
    return found


def _listen(visit: LayerVisit, norms: list[str], add: Callable[[str, Tensor], None]) -> None:
    for batch, hidden in visit.stream:
        for path, output in seen(visit.layer, batch, hidden, norms, outputs=True).items():
            add(path, batch.unpadded(output))


def obstacle_to_rotation(decoder: Decoder, calibration: Calibration, axis: Axis) -> str:
    """Why the hidden states of a model cannot be rotated without changing what it computes; empty if they can."""
    model, head = decoder.model, decoder.model.get_output_embeddings()
    if head is not None and head.weight is model.get_input_embeddings().weight:
        return (
            f"this model's embeddings are its output head too: the last norm's weights between them would part them, at "
            f"{head.weight.numel() / 1e6:,.1f} M parameters more"
        )
    for visit in calibration.quiet().on(calibration.windows.part(slice(processes.size()))).walk(decoder, ""):
        members = local_members(axis, visit.layer.prefix)
        norms, readers = norms_of(visit.layer.module, members), readers_of(visit.layer, members)
        behind = read_behind(visit, norms, readers)
        divides = all(is_rms(visit.layer.part(path)) for path in norms)
        if not divides or set(behind) != set(readers) or set(behind.values()) != set(norms):
            return (
                "the norms of this model take a mean off, add something, or have other things behind them than matrices, so its hidden states "
                "cannot be rotated"
            )
    return ""

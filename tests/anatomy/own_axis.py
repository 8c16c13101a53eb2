"""A plugin with an axis that optimum-prune does not know: the features of the latent that DeepSeek makes its queries from."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, replace
from typing import ClassVar

from optimum_prune import Axis, AxisKind, Cuts, Decision, Member, PrunePass, hookimpl, option

KILLED_AFTER = "OWN_AXIS_KILLED_AFTER"
"""The environment variable that says after how many layers a run is to be killed."""
BEFORE, NORM, BEHIND = "self_attn.q_a_proj", "self_attn.q_a_layernorm", "self_attn.q_b_proj"


def find_latents(family, layer, config):
    try:
        latent = layer.get_submodule(BEFORE)
    except AttributeError:
        return None
    return Axis(
        name="latents",
        units=latent.out_features,
        members=(Member(f"{BEFORE}.weight", 0), Member(f"{NORM}.weight", 0), Member(f"{BEHIND}.weight", 1)),
        output=f"{BEHIND}.weight",
        fields={"q_lora_rank": 1},
        units_are="features of the query latent",
        place="attention",
    )


@dataclass(frozen=True, kw_only=True)
class NarrowLatents(PrunePass):
    """Keeps the features of query latents that put out most."""

    name: ClassVar[str] = "narrow-latents"
    keep: int = option("How many to keep.", at_least=1)
    more: int = option("How many more every second layer keeps.", 0)

    def kept_by(self, layer):
        return self.keep + self.more * (layer % 2)

    def foresee(self, shape):
        layers = [layer.narrowed({"latents": self.kept_by(index)}) for index, layer in enumerate(shape.layers)]
        return replace(shape, layers=tuple(layers))

    def decide(self, decoder, calibration):
        for visit in calibration.walk(decoder, "latents"):
            if os.environ.get(KILLED_AFTER) == str(visit.index):
                os.kill(os.getpid(), signal.SIGKILL)
            layer, axis, keep = visit.layer, visit.layer.axes["latents"], self.kept_by(visit.index)
            size = visit.gram(axis).exact.diagonal() * layer.linear_of(axis.output).weight.double().square().sum(0)
            kept = tuple(size.topk(keep).indices.sort().values.tolist())
            scaled = layer.part(NORM).weight[list(kept)] * (axis.units / keep) ** 0.5  # as if the others were zero
            yield Decision(
                Cuts.along("latents", {visit.index: kept}),
                layer.named({f"{NORM}.weight": scaled.detach()}),
                {"layer": visit.index, "importance": [round(value, 6) for value in size.tolist()]},
            )


@hookimpl
def axes():
    yield AxisKind("latents", find_latents, "attention", size="latent_width", column="query latent")


@hookimpl
def passes():
    yield NarrowLatents

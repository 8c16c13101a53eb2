"""DeepSeek-V2 and V3: latent attention, a few plain FFNs first, then mixtures with shared experts."""

from __future__ import annotations

from collections.abc import Iterator

from optimum_prune.anatomy.family import Experts, Family, FeedForward
from optimum_prune.hooks.marker import hookimpl

SHARED = FeedForward(
    module="mlp.shared_experts",
    inputs=("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
    output="mlp.shared_experts.down_proj",
    width="moe_intermediate_size",
)


@hookimpl
def families() -> Iterator[Family]:
    for name in ("deepseek_v2", "deepseek_v3"):
        yield Family(
            name=name,
            model_types=(name,),
            thresholds=("first_k_dense_replace",),
            heads=None,  # keys and values of all heads come out of one latent
            experts=Experts(count="n_routed_experts", shared=SHARED),
        )

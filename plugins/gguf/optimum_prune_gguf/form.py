"""Which architecture of llama.cpp computes what a model computes, if any does.

Models of the Llama form whose layers differ are written in llama.cpp's `deci` architecture, whose files say for each layer how many
heads and FFN channels it has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optimum_prune.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Form:
    """How llama.cpp computes an architecture."""

    architecture: str
    """llama.cpp's word."""
    rotates_pairs: bool = False
    """Whether it rotates neighbours where transformers rotates halves, so that rows of queries and keys change places."""
    gemma: bool = False
    activation: str = "silu"
    ropes: tuple[str, ...] = ("default", "dynamic", "linear", "yarn")


LLAMA = Form("llama", rotates_pairs=True, ropes=("default", "dynamic", "linear", "yarn", "llama3"))
DECI = Form("deci", rotates_pairs=True, ropes=LLAMA.ropes)
FORMS = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "phi3": LLAMA,
    "qwen2": Form("qwen2"),
    "qwen3": Form("qwen3"),
    "gemma2": Form("gemma2", gemma=True, activation="gelu_pytorch_tanh", ropes=("default",)),
    "gemma3_text": Form("gemma3", gemma=True, activation="gelu_pytorch_tanh", ropes=("default", "linear")),
}
"""Of each model type that can be written."""
LIKE_LLAMA = ("llama", "mistral", "phi3", "qwen2")
"""Model types that can be written although their layers differ."""


def form_of(config: PreTrainedConfig, heterogeneous: bool) -> Form:
    """How llama.cpp computes a model.

    Args:
        heterogeneous: whether its layers differ in shape or lack a block.

    Raises:
        RecipeError: it cannot, or not exactly.
    """
    kind = getattr(config, "base_model_type", config.model_type)
    if kind not in FORMS:
        raise RecipeError(
            f"The model is of the type '{kind}', which the pass 'gguf' cannot write; it writes {', '.join(FORMS)}. Export to another "
            f"runtime, such as ONNX."
        )
    if heterogeneous and kind not in LIKE_LLAMA:
        raise RecipeError(
            f"The layers of the model will differ or lack blocks, and llama.cpp has no form of '{kind}' for that, only of "
            f"{', '.join(LIKE_LLAMA)}. Run the pass 'padded' instead, and then 'gguf' on the stock checkpoint that it writes; or prune all layers alike."
        )
    form = DECI if heterogeneous else FORMS[kind]
    wrong = _differences(config, form)
    if wrong:
        raise RecipeError(
            f"The model has {' and '.join(wrong)}, which llama.cpp's form of '{kind}' has not. Export to another runtime, such as ONNX."
        )
    return form


def _differences(config: PreTrainedConfig, form: Form) -> list[str]:
    """What such a model has and llama.cpp's form of it has not."""
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    bias = getattr(config, "attention_bias", False) and form not in (LLAMA, DECI)
    rope = rope_of(config)
    found = {
        f"the activation '{activation}'": activation != form.activation,
        f"rotary embeddings of the type '{rope['rope_type']}'": rope["rope_type"] not in form.ropes,
        "rotary embeddings of a part of each head": rope.get("partial_rotary_factor", 1.0) != 1.0,
        "a factor of attention beside its rotary embeddings": any(
            rope.get(key) for key in ("attention_factor", "mscale")
        ),
        "biases in attention": bias,
        "attention in both directions": bool(getattr(config, "use_bidirectional_attention", None)),
        "an output matrix of its own": form.architecture == "gemma2" and not config.tie_word_embeddings,
    }
    return [what for what, there in found.items() if there]


def rope_of(config: PreTrainedConfig, kind: str = "full_attention") -> dict[str, Any]:
    """What a config says of rotary embeddings, with the defaults filled in; of its layers of a kind, if these differ."""
    rope = dict(config.rope_parameters or {})
    rope = dict(rope.get(kind, rope))
    return {"rope_type": "default", "rope_theta": 10_000.0, **rope}


def context_length(config: PreTrainedConfig, form: Form) -> int:
    """How many tokens llama.cpp can read with the same result; it has no sliding window but Gemma's."""
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    most = int(config.max_position_embeddings)
    if not window or form.gemma or (kinds is not None and "sliding_attention" not in kinds):
        return most
    return min(most, int(window))


def head_size(config: PreTrainedConfig) -> int:
    """Width of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)

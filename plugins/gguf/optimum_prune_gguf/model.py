"""The weights and sizes of a model as GGUF files hold them, one tensor at a time.

Models of the Llama form whose layers differ are written in llama.cpp's `deci` architecture, whose files say for each layer how many
heads and FFN channels it has. In llama.cpp 0.3.36 of the Python binding, a `deci` layer without an FFN loses its attention too, and
one without attention must not be the first; there, a block of zeros is written that adds nothing to the hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optimum_prune.errors import RecipeError

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from jaxtyping import Float
    from transformers import PreTrainedConfig, PreTrainedModel

    from optimum_prune_gguf.vocabulary import Vocabulary

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Path of a module in a decoder layer -> what GGUF files call it."""
NAMES_OF_GEMMA = {
    **NAMES,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


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
NOTHING = 32
"""Channels of an FFN that stands for none, all zeros: as many as llama.cpp's smallest block of quantized weights."""


def form_of(config: PreTrainedConfig, odd: bool) -> Form:
    """How llama.cpp computes a model.

    Raises:
        RecipeError: it cannot, or not exactly.
    """
    kind = getattr(config, "base_model_type", config.model_type)
    if kind not in FORMS:
        raise RecipeError(
            f"The model is of the type '{kind}', which the pass 'gguf' cannot write; it writes {', '.join(FORMS)}. Export to another "
            f"runtime, such as ONNX."
        )
    if odd and kind not in LIKE_LLAMA:
        raise RecipeError(
            f"The layers of the model will differ or lack blocks, and llama.cpp has no form of '{kind}' for that, only of "
            f"{', '.join(LIKE_LLAMA)}. Prune all layers alike, or leave out whole layers, or export to another runtime."
        )
    form = DECI if odd else FORMS[kind]
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
    rope = _rope(config)
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


def _rope(config: PreTrainedConfig, kind: str = "full_attention") -> dict[str, Any]:
    rope = dict(config.rope_parameters or {})
    rope = dict(rope.get(kind, rope))
    return {"rope_type": "default", "rope_theta": 10_000.0, **rope}


def context_length(config: PreTrainedConfig, form: Form) -> int:
    """How many tokens llama.cpp can read with the same result; it has no sliding window but Gemma's."""
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    slides = bool(window) and (kinds is None or "sliding_attention" in kinds)
    most = int(config.max_position_embeddings)
    return min(most, window) if slides and not form.gemma else most


# Tensors


def tensors(model: PreTrainedModel, form: Form) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a file, by name."""
    base, config = model.model, model.config
    yield "token_embd.weight", base.embed_tokens.weight
    yield "output_norm.weight", base.norm.weight.float() + 1 if form.gemma else base.norm.weight
    if model.lm_head.weight.data_ptr() != base.embed_tokens.weight.data_ptr():
        yield "output.weight", model.lm_head.weight
    if _rope(config)["rope_type"] == "llama3":
        yield "rope_freqs.weight", _frequency_factors(model)
    for index, layer in enumerate(base.layers):
        for name, tensor in _with_all_blocks(_split(dict(layer.named_parameters())), index, config).items():
            module, _, kind = name.rpartition(".")
            known = NAMES_OF_GEMMA if form.gemma else NAMES
            yield f"blk.{index}.{known[module]}.{kind}", _as_form(module, tensor, config, form)


def _split(layer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Phi-3's joint matrices apart; everything else as it is."""
    found = {}
    for name, tensor in layer.items():
        if "qkv_proj" in name:
            keys = (len(tensor) - layer["self_attn.o_proj.weight"].shape[1]) // 2
            parts = tensor.split([len(tensor) - 2 * keys, keys, keys])
            found.update({name.replace("qkv", each): part for each, part in zip("qkv", parts, strict=True)})
        elif "gate_up_proj" in name:
            found.update(
                {
                    name.replace("gate_up", each): part
                    for each, part in zip(("gate", "up"), tensor.chunk(2), strict=True)
                }
            )
        else:
            found[name] = tensor
    return found


def _with_all_blocks(layer: Mapping[str, Tensor], index: int, config: PreTrainedConfig) -> dict[str, Tensor]:
    """With blocks of zeros where the layer has none and llama.cpp needs one, and without the norm of attention that is not there."""
    hidden, size = config.hidden_size, head_size(config)
    found, zeros = dict(layer), dict[str, tuple[int, ...]]()
    if "mlp.up_proj.weight" not in layer:
        zeros |= {"post_attention_layernorm": (hidden,), "mlp.down_proj": (hidden, NOTHING)}
        zeros |= dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (NOTHING, hidden))
    if "self_attn.q_proj.weight" not in layer:
        del found["input_layernorm.weight"]
        if index == 0:
            zeros |= {"input_layernorm": (hidden,), "self_attn.o_proj": (hidden, size)}
            zeros |= {f"self_attn.{each}_proj": (size, hidden) for each in "qkv"}
    return {**found, **{f"{module}.weight": torch.zeros(shape) for module, shape in zeros.items()}}


def _as_form(module: str, tensor: Tensor, config: PreTrainedConfig, form: Form) -> Tensor:
    """A tensor of a layer as llama.cpp computes with it."""
    if form.gemma and tensor.ndim == 1:  # its norms count from one
        tensor = tensor.float() + 1
    if form.gemma and module == ("self_attn.q_norm" if form.architecture == "gemma3" else "self_attn.q_proj"):
        factor = config.query_pre_attn_scalar**-0.5 / _scale_of_gemma(config, form)
        tensor = tensor if factor == 1 else tensor.float() * factor
    if form.rotates_pairs and module in ("self_attn.q_proj", "self_attn.k_proj"):
        size = head_size(config)
        tensor = tensor.reshape(-1, 2, size // 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
    return tensor


def _scale_of_gemma(config: PreTrainedConfig, form: Form) -> float:
    """How llama.cpp scales attention: it takes a Gemma for the 27B by the number of its layers, which pruning changes."""
    largest = config.num_hidden_layers == {"gemma2": 46, "gemma3": 62}[form.architecture]
    return (config.hidden_size // config.num_attention_heads if largest else head_size(config)) ** -0.5


def _frequency_factors(model: PreTrainedModel) -> Float[Tensor, " half"]:
    size = head_size(model.config)
    plain = _rope(model.config)["rope_theta"] ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
    return plain / model.model.rotary_emb.inv_freq.float().cpu()


def head_size(config: PreTrainedConfig) -> int:
    """Width of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


# The file


def write(model: PreTrainedModel, form: Form, vocabulary: Vocabulary, dtype: str, file: Path) -> None:
    """Writes a file whose matrices are of a dtype, which is f32, f16 or bf16; norms and biases are float32.

    Raises:
        RecipeError: a weight is too large for f16.
    """
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType

    kinds = {
        "f32": (torch.float32, "ALL_F32"),
        "f16": (torch.float16, "MOSTLY_F16"),
        "bf16": (torch.bfloat16, "MOSTLY_BF16"),
    }
    kind, label = kinds[dtype]
    writer = GGUFWriter(file, form.architecture)
    writer.add_type("model")
    writer.add_file_type(LlamaFileType[label])
    writer.add_quantization_version(2)
    _write_sizes(model, form, writer)
    vocabulary.write(writer)
    for called, tensor in tensors(model, form):
        stored = kind if tensor.ndim > 1 else torch.float32
        label = dtype.upper() if tensor.ndim > 1 else "F32"
        writer.add_tensor_info(
            called, tensor.shape, None, tensor.numel() * stored.itemsize, GGMLQuantizationType[label]
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for called, tensor in tensors(model, form):
        stored = tensor.detach().cpu().to(kind if tensor.ndim > 1 else torch.float32).contiguous()
        if dtype == "f16" and not stored.isfinite().all():
            writer.close()
            raise RecipeError(
                f"Weights of '{called}' are too large for outtype f16. Give gguf an outtype of bf16 or f32."
            )
        writer.write_tensor_data(stored.view(torch.uint8).numpy())
    writer.close()


def _write_sizes(model: PreTrainedModel, form: Form, writer: GGUFWriter) -> None:
    config, size = model.config, head_size(model.config)
    found = {name: tensor.shape for name, tensor in tensors(model, form)}
    heads, key_heads, widths = (
        [found.get(f"blk.{index}.{name}.weight", (0,))[0] // unit for index in range(config.num_hidden_layers)]
        for name, unit in (("attn_q", size), ("attn_k", size), ("ffn_up", 1))
    )
    by_layer = form is DECI
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(context_length(config, form))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(widths if by_layer else widths[0])
    writer.add_head_count(heads if by_layer else heads[0])
    writer.add_head_count_kv(key_heads if by_layer else key_heads[0])
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(found["token_embd.weight"][0])
    writer.add_rope_dimension_count(size)
    _write_rope(config, writer)
    if form.gemma:
        _write_gemma(config, writer)


def _write_rope(config: PreTrainedConfig, writer: GGUFWriter) -> None:
    from gguf import RopeScalingType

    rope = _rope(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] not in ("linear", "yarn"):
        return
    writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
    writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(
            rope.get("original_max_position_embeddings") or config.max_position_embeddings
        )
        writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32.0)
        writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1.0)


def _write_gemma(config: PreTrainedConfig, writer: GGUFWriter) -> None:
    writer.add_sliding_window(config.sliding_window)
    writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
    if "sliding_attention" in config.rope_parameters:
        writer.add_rope_freq_base_swa(_rope(config, "sliding_attention")["rope_theta"])
    for name in ("attn", "final"):
        if (cap := getattr(config, f"{name}_logit_softcapping", None)) is not None:
            getattr(writer, f"add_{name}_logit_softcapping")(cap)

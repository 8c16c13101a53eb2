"""The weights and sizes of a model as GGUF files hold them, one tensor at a time.

Models of the Llama form whose layers differ are written in llama.cpp's `deci` architecture, whose files say for each layer how many
heads and FFN channels it has. In llama.cpp 0.3.36 of the Python binding, a `deci` layer without an FFN loses its attention too, and
one without attention must not be the first; there, a block of zeros is written that adds nothing to the hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optimum_prune.errors import RecipeError
from optimum_prune_gguf.form import DECI, Form, context_length, head_size, rope_of

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
NOTHING = 32
"""Channels of an FFN that stands for none, all zeros: as many as llama.cpp's smallest block of quantized weights."""


# Tensors


def tensors(model: PreTrainedModel, form: Form) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a file, by name."""
    base, config = model.model, model.config
    yield "token_embd.weight", base.embed_tokens.weight
    yield "output_norm.weight", base.norm.weight.float() + 1 if form.gemma else base.norm.weight
    if model.lm_head.weight.data_ptr() != base.embed_tokens.weight.data_ptr():
        yield "output.weight", model.lm_head.weight
    if rope_of(config)["rope_type"] == "llama3":
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
            parts = torch.split(tensor, [len(tensor) - 2 * keys, keys, keys])
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
        found.pop("input_layernorm.weight", None)
        if index == 0:
            zeros |= {"input_layernorm": (hidden,), "self_attn.o_proj": (hidden, size)}
            zeros |= {f"self_attn.{each}_proj": (size, hidden) for each in "qkv"}
    return {**found, **{f"{module}.weight": torch.zeros(shape) for module, shape in zeros.items()}}


def _as_form(module: str, tensor: Tensor, config: PreTrainedConfig, form: Form) -> Tensor:
    """A tensor of a layer as llama.cpp computes with it."""
    if form.gemma and tensor.ndim == 1:  # its norms count from one
        tensor = tensor.float() + 1
    if form.gemma and module == ("self_attn.q_norm" if form.architecture == "gemma3" else "self_attn.q_proj"):
        factor = float(config.query_pre_attn_scalar) ** -0.5 / _scale_of_gemma(config, form)
        tensor = tensor if factor == 1 else tensor.float() * factor
    if form.rotates_pairs and module in ("self_attn.q_proj", "self_attn.k_proj"):
        size = head_size(config)
        tensor = tensor.reshape(-1, 2, size // 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
    return tensor


def _scale_of_gemma(config: PreTrainedConfig, form: Form) -> float:
    """How llama.cpp scales attention: it takes a Gemma for the 27B by the number of its layers, which pruning changes."""
    largest = config.num_hidden_layers == {"gemma2": 46, "gemma3": 62}[form.architecture]
    size = int(config.hidden_size) // int(config.num_attention_heads) if largest else head_size(config)
    return float(size**-0.5)


def _frequency_factors(model: PreTrainedModel) -> Float[Tensor, " half"]:
    size = head_size(model.config)
    theta: float = rope_of(model.config)["rope_theta"]
    plain: Tensor = theta ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
    used: Tensor = model.model.rotary_emb.inv_freq
    return plain / used.float().cpu()


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
        size = tensor.numel() * (kind if tensor.ndim > 1 else torch.float32).itemsize
        label = dtype.upper() if tensor.ndim > 1 else "F32"
        writer.add_tensor_info(called, tensor.shape, None, size, GGMLQuantizationType[label])
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

    rope = rope_of(config)
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
        writer.add_rope_freq_base_swa(rope_of(config, "sliding_attention")["rope_theta"])
    for name in ("attn", "final"):
        if (cap := getattr(config, f"{name}_logit_softcapping", None)) is not None:
            getattr(writer, f"add_{name}_logit_softcapping")(cap)

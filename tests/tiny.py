"""Tiny random models of every family, a tiny tokenizer, and text without an author."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Glm4Config,
    Glm4ForCausalLM,
    GlmConfig,
    GlmForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SiglipVisionConfig,
)

from optimum_prune.text.windows import Windows

VOCABULARY = 320
LAYERS = 6
WIDTH = 64
BOS, EOS, PAD = 0, 1, 2

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
MIXED = [
    "sliding_attention",
    "full_attention",
    "sliding_attention",
    "sliding_attention",
    "full_attention",
    "sliding_attention",
]


def _llama(**changes: Any) -> PreTrainedModel:
    theta = {"rope_type": "default", "rope_theta": 50_000.0}
    return LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=theta, **changes))


def _mistral() -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**SIZES, head_dim=8, sliding_window=6))


def _qwen2() -> PreTrainedModel:
    sliding = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True, **sliding))


def _qwen3() -> PreTrainedModel:
    sliding = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 3}
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=12, **sliding))


def _gemma3_text_config() -> Gemma3TextConfig:
    return Gemma3TextConfig(**SIZES, head_dim=8, query_pre_attn_scalar=8, sliding_window=6, layer_types=MIXED)


def _gemma3() -> PreTrainedModel:
    return Gemma3ForCausalLM(_gemma3_text_config())


def _gemma3_vision() -> PreTrainedModel:
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = Gemma3Config(
        text_config=_gemma3_text_config().to_dict(),
        vision_config=vision.to_dict(),
        mm_tokens_per_image=4,
        boi_token_index=VOCABULARY - 3,
        eoi_token_index=VOCABULARY - 2,
        image_token_index=VOCABULARY - 1,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return Gemma3ForConditionalGeneration(config)


def _opt(**changes: Any) -> PreTrainedModel:
    sizes = {k: v for k, v in SIZES.items() if k not in ("intermediate_size", "num_key_value_heads")}
    return OPTForCausalLM(OPTConfig(**sizes, **{"ffn_dim": WIDTH, "word_embed_proj_dim": 32, **changes}))


def _gemma2() -> PreTrainedModel:
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, query_pre_attn_scalar=8, sliding_window=6))


def _phi3() -> PreTrainedModel:
    return Phi3ForCausalLM(Phi3Config(**SIZES, tie_word_embeddings=False))


def _glm(config: type, model: type) -> PreTrainedModel:
    return model(config(**SIZES, head_dim=8))


def _cohere2() -> PreTrainedModel:
    return Cohere2ForCausalLM(Cohere2Config(**SIZES, sliding_window=6, layer_types=MIXED, logit_scale=0.5))


def _gpt2(**changes: Any) -> PreTrainedModel:
    sizes = {k: v for k, v in SIZES.items() if k not in ("intermediate_size", "num_key_value_heads")}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, "hidden_size": WIDTH // 4, **changes}))


def _gpt_neox(**changes: Any) -> PreTrainedModel:
    sizes = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, **changes))


EXPERTS, EXPERT_WIDTH = 4, 24


def _mixtral() -> PreTrainedModel:
    mixture = {"num_local_experts": EXPERTS, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(**SIZES, **mixture))


def _qwen3_moe() -> PreTrainedModel:
    mixture = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": EXPERT_WIDTH}
    where = {"decoder_sparse_step": 2, "mlp_only_layers": [3]}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, head_dim=12, **mixture, **where))


def _deepseek(config: type, model: type, **changes: Any) -> PreTrainedModel:
    sizes = {**SIZES, "num_key_value_heads": 4}
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
    mixture = {
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 2,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": EXPERT_WIDTH,
        "first_k_dense_replace": 2,
    }
    return model(config(**sizes, **latent, **mixture, **changes))


MIXTURES = ("mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3")
"""Families some of whose layers are mixtures of experts."""
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": partial(_llama, tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
    "llama-tied": partial(_llama, tie_word_embeddings=True),
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
    "gemma3-vision": _gemma3_vision,
    "gemma2": _gemma2,
    "phi3": _phi3,
    "glm": partial(_glm, GlmConfig, GlmForCausalLM),
    "glm4": partial(_glm, Glm4Config, Glm4ForCausalLM),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.5, use_qk_norm=True)),
    "cohere2": _cohere2,
    "gpt2": _gpt2,
    "gpt2-wide": partial(_gpt2, hidden_size=32, n_inner=WIDTH),
    "gpt_neox": _gpt_neox,
    "gpt_neox-sequential": partial(_gpt_neox, use_parallel_residual=False),
    "opt": _opt,
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "deepseek_v2": partial(_deepseek, DeepseekV2Config, DeepseekV2ForCausalLM),
    "deepseek_v3": partial(_deepseek, DeepseekV3Config, DeepseekV3ForCausalLM, n_group=2, topk_group=1),
    "opt-post-norm": partial(_opt, do_layer_norm_before=False, word_embed_proj_dim=16),
}
WITHOUT_HEADS = (
    "gpt2",
    "gpt2-wide",
    "gpt_neox",
    "gpt_neox-sequential",
    "opt",
    "opt-post-norm",
    "deepseek_v2",
    "deepseek_v3",
)
"""Families whose configs cannot say that there are fewer heads of the same size."""
TIED = (
    "llama-tied",
    "qwen2",
    "gemma2",
    "gemma3",
    "gemma3-vision",
    "cohere",
    "cohere2",
    "gpt2",
    "gpt2-wide",
    "opt",
    "opt-post-norm",
)

SOME = (
    "llama",
    "llama-tied",
    "qwen3",
    "gemma2",
    "gpt2",
    "gpt_neox",
    "opt",
    "phi3",
    "mixtral",
    "cohere",
    "deepseek_v2",
)
"""Families that differ in what refits depend on, where all take too long."""


def model(family: str, seed: int = 0) -> PreTrainedModel:
    """A model whose layers all matter."""
    return filled(FAMILIES[family](), seed)


def filled(built: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """A model that was just made, with large weights, and no bias or norm at its initial value."""
    built.eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in built.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(0.2 * noise)
            else:
                parameter.add_(0.2 * noise)
    return built


def in_double(model: PreTrainedModel) -> PreTrainedModel:
    """The model in float64, in place: what is the same in exact numbers is the same to 1e-9, on any machine."""
    if hasattr(model.config.get_text_config(), "num_experts_per_tok"):
        model.set_experts_implementation("eager")  # experts are multiplied in groups by kernels that take no float64
    return model.double()


def text(words: int = 4000, seed: int = 0) -> str:
    """Sentences of invented words, the frequent ones short, each seed with words of its own."""
    rng = random.Random(seed)
    syllables = [a + b for a in "bdfgklmnprstvw" for b in ("a", "e", "i", "o", "u", "an", "er", "is", "ou")]
    lexicon = ["".join(rng.choices(syllables, k=1 + rank // 60)) for rank in range(240)]
    weights = [1 / (rank + 2) for rank in range(len(lexicon))]
    sentences = []
    while words > 0:
        length = rng.randint(4, 14)
        sentence = " ".join(rng.choices(lexicon, weights, k=length))
        sentences.append(sentence.capitalize() + rng.choice(".....?!"))
        words -= length
    return " ".join(sentences)


def tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE that puts a beginning-of-sequence token in front of a text, or does not."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 4,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([text(500)], trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def windows(count: int = 5, length: int = 24, seed: int = 0, padded: bool = False) -> Windows:
    """Random tokens; `padded` gives every other window padding, in turn at its end and at its beginning."""
    tokens = torch.randint(3, VOCABULARY - 4, (count, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    if padded:
        for row in range(0, count, 2):
            size = 3 * (row + 1) % length
            mask[row, :size] = False
            mask[row] = mask[row] if row % 4 else mask[row].flip(0)
        tokens[~mask] = PAD
    return Windows(tokens, mask, "random tokens")


def spoken(model: PreTrainedModel, count: int, length: int = 48, sharpness: float = 3.0) -> Windows:
    """Text that a model itself speaks, so that it loses by losing parts; the sharper, the less is by chance."""
    tokens, generator = torch.full((count, 1), BOS), torch.Generator().manual_seed(0)
    with torch.no_grad():
        while tokens.shape[1] < length:
            last = model(tokens, use_cache=False).logits[:, -1].mul(sharpness).softmax(-1)
            tokens = torch.cat([tokens, last.multinomial(1, generator=generator)], 1)
    return Windows.from_tokens(tokens)


def save(family: str, folder: Path, *, bos: bool = True, seed: int = 0, **saving: Any) -> Path:
    """A whole checkpoint: weights, config and tokenizer."""
    model(family, seed).save_pretrained(folder, **saving)
    tokenizer(bos).save_pretrained(folder)
    return folder

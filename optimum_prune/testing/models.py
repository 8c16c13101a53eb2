"""What a model computes, and that it computes the same once it was saved."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.testing import assert_close

from optimum_prune.checkpoint.caches import cache_of
from optimum_prune.checkpoint.loading import load_model
from optimum_prune.checkpoint.saving import save
from optimum_prune.machine.progress import Progress
from optimum_prune.text.windows import Windows

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from transformers import PreTrainedModel


def random_windows(vocabulary: int, count: int = 5, length: int = 24, seed: int = 0) -> Windows:
    """Windows of random tokens; the first ten of the vocabulary, which are often special, are left out."""
    generator = torch.Generator().manual_seed(seed)
    return Windows.from_tokens(torch.randint(10, vocabulary, (count, length), generator=generator), "random tokens")


@torch.no_grad()
def logits(model: PreTrainedModel, windows: Windows) -> Float[Tensor, "windows length vocabulary"]:
    """As transformers computes them, without a cache."""
    padding = {} if windows.mask.all() else {"attention_mask": windows.mask.long()}
    found: Tensor = model(input_ids=windows.tokens, use_cache=False, **padding).logits
    return found


@torch.no_grad()
def decoded_logits(model: PreTrainedModel, tokens: Int[Tensor, "w t"], decoded: int) -> Float[Tensor, "w decoded v"]:
    """Of the last `decoded` positions, one token at a time with a cache."""
    cache, scores = dict[str, Any](), []
    start = tokens.shape[1] - decoded
    for piece in (tokens[:, :start], *torch.split(tokens[:, start:], 1, dim=1)):
        output = model(input_ids=piece, use_cache=True, **cache)
        cache = cache_of(output, model)
        scores.append(output.logits)
    return torch.cat(scores[1:], dim=1)


def reloads_exactly(model: PreTrainedModel, folder: Path, windows: Windows) -> PreTrainedModel:
    """The saved model, as transformers reads it, has no key problem, the same class and the very same logits."""
    save(model, None, folder, Progress())
    found = load_model(folder)
    assert type(found) is type(model), f"It is reloaded as {type(found).__name__}, not as {type(model).__name__}."
    assert_close(logits(found, windows), logits(model, windows), rtol=0, atol=0)
    return found


def generates_as_it_scores(model: PreTrainedModel, windows: Windows, decoded: int = 8) -> None:
    """With a cache, logits are those without; `generate` follows them."""
    tokens = windows.tokens
    assert_close(decoded_logits(model, tokens, decoded), logits(model, windows)[:, -decoded:], rtol=1e-4, atol=1e-4)
    mask = torch.ones_like(tokens)
    generated: Tensor = model.generate(
        input_ids=tokens, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False
    )
    assert generated.shape == (len(tokens), tokens.shape[1] + 4)
    greedy = logits(model, Windows.from_tokens(generated))[:, -5:-1]
    chosen = greedy.gather(-1, generated[:, -4:, None])[..., 0]
    allowed = greedy.clone()
    if model.generation_config.eos_token_id is not None:
        allowed[..., model.generation_config.eos_token_id] = -torch.inf
    assert_close(chosen, allowed.amax(-1), rtol=1e-4, atol=1e-4)


def stays_tied(model: PreTrainedModel, folder: Path) -> None:
    """Embeddings and head are one tensor, in memory and on disk."""
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    with safe_open(folder / "model.safetensors", "pt") as file:
        tables = [name for name in file.keys() if name.split(".")[-2] in ("embed_tokens", "wte", "lm_head")]  # noqa: SIM118
    assert len(tables) == 1, f"These are saved, and are one: {', '.join(tables)}."


def inputs_of(model: PreTrainedModel, module: nn.Module, windows: Windows) -> Float[Tensor, "tokens features"]:
    """What reaches a module in the model's own forward, float64, padding left out."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    logits(model, windows)
    handle.remove()
    return torch.cat(seen)[windows.mask.flatten()].double()

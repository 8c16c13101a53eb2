"""What every pass and every family must satisfy, as functions of a model; a plugin's tests may use them too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_prune import Calibration, Cuts, Decision, Family, Outcome, Progress, PrunePass, checkpoint, surgery
from optimum_prune.compress import prune
from optimum_prune.plugins import Plugins


@torch.no_grad()
def logits(model: PreTrainedModel, windows: Calibration) -> Tensor:
    """As transformers computes them, without a cache."""
    padding = {} if windows.mask.all() else {"attention_mask": windows.mask.long()}
    return model(input_ids=windows.tokens, use_cache=False, **padding).logits


@torch.no_grad()
def decoded_logits(model: PreTrainedModel, tokens: Tensor, decoded: int) -> Tensor:
    """Of the last `decoded` positions, one token at a time with a cache."""
    cache, scores = None, []
    start = tokens.shape[1] - decoded
    for piece in (tokens[:, :start], *tokens[:, start:].split(1, dim=1)):
        output = model(input_ids=piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        scores.append(output.logits)
    return torch.cat(scores[1:], dim=1)


def with_layers_skipped(model: PreTrainedModel, family: Family, gone: Iterable[int], windows: Calibration) -> Tensor:
    """Logits of the whole model, where some decoder layers hand on what they are given."""

    def hand_on(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> object:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    with ExitStack() as stack:
        for index in gone:
            handle = family.layers_of(model)[index].register_forward_hook(hand_on, with_kwargs=True)
            stack.callback(handle.remove)
        return logits(model, windows)


@torch.no_grad()
def with_channels_masked(
    model: PreTrainedModel, family: Family, kept: Mapping[int, Sequence[int]], windows: Calibration
) -> Tensor:
    """Logits of the whole model, where the other FFN channels' outgoing weights are zero."""
    with ExitStack() as stack:
        for index, channels in kept.items():
            weight = family.linear(family.layers_of(model)[index], family.feed_forward.output).weight
            stack.callback(lambda weight, dense: weight.copy_(dense), weight, weight.clone())
            gone = torch.ones(weight.shape[1], dtype=torch.bool)
            gone[list(channels)] = False
            weight[:, gone] = 0
        return logits(model, windows)


def cut(model: PreTrainedModel, family: Family, cuts: Cuts) -> None:
    surgery.carry_out(model, family, Decision(cuts))
    surgery.settle_width(model, family)


def pruned(step: PrunePass, model: PreTrainedModel, family: Family, windows: Calibration, plugins: Plugins) -> Outcome:
    return prune(step, model, family, windows, plugins, Progress())


def reloads_exactly(model: PreTrainedModel, folder: Path, windows: Calibration) -> PreTrainedModel:
    """The saved model, as stock transformers reads it, has no key problem and the very same logits."""
    checkpoint.save(model, None, folder, Progress())
    found, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    assert type(found) is type(model)
    assert_close(logits(found.eval(), windows), logits(model, windows), rtol=0, atol=0)
    return found


def generates_as_it_scores(model: PreTrainedModel, windows: Calibration, decoded: int = 8) -> None:
    """With a cache, logits are those without; `generate` follows them."""
    tokens = windows.tokens
    assert_close(decoded_logits(model, tokens, decoded), logits(model, windows)[:, -decoded:], rtol=1e-4, atol=1e-4)
    generated = model.generate(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=4, min_new_tokens=4, do_sample=False
    )
    assert generated.shape == (len(tokens), tokens.shape[1] + 4)
    longer = Calibration.from_tokens(generated)
    greedy = logits(model, longer)[:, -5:-1]
    chosen = greedy.gather(-1, generated[:, -4:, None])[..., 0]
    allowed = greedy.clone()
    allowed[..., model.generation_config.eos_token_id] = -torch.inf
    assert_close(chosen, allowed.amax(-1), rtol=1e-4, atol=1e-4)


def stays_tied(model: PreTrainedModel, folder: Path) -> None:
    """Embeddings and head are one tensor, in memory and on disk."""
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    with safe_open(folder / "model.safetensors", "pt") as file:
        tables = [name for name in file.keys() if name.split(".")[-2] in ("embed_tokens", "wte", "lm_head")]  # noqa: SIM118
    assert len(tables) == 1, tables


def layers_are_numbered(model: PreTrainedModel, family: Family) -> None:
    """Every `layer_idx` is the layer's position."""
    for position, layer in enumerate(family.layers_of(model)):
        numbers = {module.layer_idx for module in layer.modules() if hasattr(module, "layer_idx")}
        assert numbers == {position}

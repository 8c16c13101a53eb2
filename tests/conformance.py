"""What every pass and every family must satisfy, as functions of a model; a plugin's tests may use them too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_prune import Calibration, Cuts, Decision, Family, Outcome, Progress, PrunePass, checkpoint, surgery
from optimum_prune.plugins import Plugins
from optimum_prune.run import prune


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
def with_masked(model: PreTrainedModel, family: Family, cuts: Cuts, windows: Calibration) -> Tensor:
    """Logits of the whole model, where the outgoing weights of all heads and channels that are cut are zero."""
    with ExitStack() as stack:
        for weight, kept in _outgoing(model, family, cuts):
            stack.callback(lambda weight, dense: weight.copy_(dense), weight, weight.clone())
            gone = torch.ones(weight.shape[1], dtype=torch.bool)
            gone[list(kept)] = False
            weight[:, gone] = 0
        return logits(model, windows)


def _outgoing(model: PreTrainedModel, family: Family, cuts: Cuts) -> Iterator[tuple[Tensor, Sequence[int]]]:
    """Weights of shape (out, in), each with its inputs that stay."""
    layers = family.layers_of(model)
    for index, kept in cuts.heads.items():
        features = features_of_heads(layers[index], family, kept)
        yield family.linear(layers[index], family.attention_output).weight, features
    for index, kept in cuts.channels.items():
        yield family.linear(layers[index], family.feed_forward.output).weight, kept
    for index, experts in cuts.experts.items():
        weights = getattr(family.experts_of(layers[index]), family.experts.output)
        yield from zip(weights.detach(), experts, strict=True)
    for index, kept in cuts.shared.items():
        yield family.linear(layers[index], family.experts.shared.output).weight, kept


def features_of_heads(layer: nn.Module, family: Family, kept: Sequence[int]) -> list[int]:
    """Inputs of attention's output projection that belong to these key-value heads."""
    counts = family.head_counts(layer)
    size = counts.queries * counts.size
    return [head * size + feature for head in kept for feature in range(size)]


Choose = Callable[[int, int], tuple[int, ...]]
"""Which are kept, of how many, how many of them."""


def first(count: int, keep: int) -> tuple[int, ...]:
    return tuple(range(keep))


def at_random(seed: int) -> Choose:
    generator = torch.Generator().manual_seed(seed)
    return lambda count, keep: tuple(torch.randperm(count, generator=generator)[:keep].sort().values.tolist())


def cuts_to(
    model: PreTrainedModel,
    family: Family,
    choose: Choose,
    *,
    heads: int | None = None,
    width: int | None = None,
    expert_width: int | None = None,
) -> Cuts:
    """Cuts of every layer to these sizes, as far as it has such parts."""
    cuts = Cuts()
    for index, (layer, shape) in enumerate(zip(family.layers_of(model), family.shape(model).layers, strict=True)):
        if heads is not None and shape.heads:
            cuts = cuts.merge(Cuts(heads={index: choose(shape.heads, heads)}))
        if width is not None and shape.width:
            cuts = cuts.merge(Cuts(channels={index: choose(shape.width, width)}))
        if expert_width is not None and shape.expert_width:
            number = len(getattr(family.experts_of(layer), family.experts.output))
            kept = tuple(choose(shape.expert_width, expert_width) for _ in range(number))
            cuts = cuts.merge(Cuts(experts={index: kept}))
            if family.experts.shared is not None:
                whole = family.linear(layer, family.experts.shared.output).weight.shape[1]
                fewer = expert_width * whole // shape.expert_width
                cuts = cuts.merge(Cuts(shared={index: choose(whole, fewer)}))
    return cuts


def cut(model: PreTrainedModel, family: Family, cuts: Cuts) -> None:
    surgery.carry_out(model, family, Decision(cuts))
    surgery.settle(model, family)


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


def inputs_of(model: PreTrainedModel, module: nn.Module, windows: Calibration) -> Tensor:
    """What reaches a module in the model's own forward, float64, padding left out."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    logits(model, windows)
    handle.remove()
    return torch.cat(seen)[windows.mask.flatten()].double()

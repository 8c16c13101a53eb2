from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.testing import assert_close

from optimum_prune import Calibration, Cuts, Decoder, Depth, Osscar, Windows
from optimum_prune import testing as conformance
from optimum_prune.anatomy.shape import BLOCKS
from optimum_prune.builtin.prune.block_pruner import Block, BlockPruner, search_blocks
from optimum_prune.errors import RecipeError, SurgeryError
from optimum_prune.evaluation.losses import next_token_losses
from optimum_prune.hooks.plugins import Plugins

every_family = pytest.mark.parametrize("name", tiny.FAMILIES)


def with_blocks_silenced(decoder: Decoder, gone: Iterable[Block], windows: Windows) -> Tensor:
    """Logits of the whole model, where what these blocks put out is zero."""
    hooks = []
    for index, block in gone:
        layer = decoder.layer(index)
        module = layer.part(layer.modules_of(block)[-1])
        hooks.append(module.register_forward_hook(silence))
    try:
        return conformance.logits(decoder.model, windows)
    finally:
        for hook in hooks:
            hook.remove()


def silence(module, args, output):
    if isinstance(output, tuple):
        return (torch.zeros_like(output[0]), *output[1:])
    return torch.zeros_like(output)


@every_family
@pytest.mark.parametrize(
    "gone", [[(0, "attention")], [(0, "feed_forward"), (3, "attention"), (5, "feed_forward")]], ids=str
)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_blocks_that_are_cut_are_blocks_that_are_silenced(name, decoder, gone, padded, tmp_path):
    windows = tiny.windows(4, padded=padded)
    expected = with_blocks_silenced(decoder, gone, windows)
    kept = {index: tuple(block for block in BLOCKS if block != gone_here) for index, gone_here in gone}
    before = decoder.shape().parameters
    conformance.cut(decoder, Cuts(blocks=kept))
    assert_close(conformance.logits(decoder.model, windows), expected, rtol=1e-5, atol=1e-5)
    assert decoder.shape().parameters < before
    if not padded:
        found = Decoder(conformance.reloads_exactly(decoder.model, tmp_path, windows), decoder.family)
        conformance.generates_as_it_scores(found.model, windows)
        assert [layer.blocks for layer in found.layers] == [kept.get(index, BLOCKS) for index in range(tiny.LAYERS)]


def naive_rounds(decoder: Decoder, windows: Windows, count: int) -> list[Block]:
    """Every block in turn by its definition, each time on the whole model."""
    gone = []
    for _ in range(count):
        left = [(i, b) for i in range(tiny.LAYERS) for b in BLOCKS if (i, b) not in gone]
        losses = [
            next_token_losses(
                with_blocks_silenced(decoder, [*gone, each], windows), windows.tokens, windows.mask
            ).sum()
            for each in left
        ]
        gone.append(left[int(torch.stack(losses).argmin())])
    return gone


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neox", "qwen3_moe", "gpt2"])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_blocks_that_go_are_those_of_a_naive_search(name, plugins, seed):
    decoder = Decoder.of(tiny.model(name, seed), plugins.families)
    windows = tiny.windows(6, seed=seed)
    gone, rounds = search_blocks(decoder, Calibration(windows), 4, race=False)
    assert gone == naive_rounds(decoder, windows, 4)
    assert [len(each["perplexity_without_block"]) for each in rounds] == [12, 11, 10, 9]
    assert all(count == 6 * 23 for each in rounds for count in each["measured_on_tokens"].values())


@pytest.mark.parametrize("name", ["llama", "opt-post-norm", "gemma2", "deepseek_v3", "gpt2"])
def test_the_stock_form_computes_the_same_and_stays_stock(name, decoder, plugins, tmp_path):
    windows = tiny.windows(4)
    kind = type(decoder.model)
    size = decoder.shape().parameters
    outcome = conformance.pruned(BlockPruner(blocks=3, stock=True, heal=False), decoder, windows, plugins)
    found = Decoder(conformance.reloads_exactly(decoder.model, tmp_path, windows), decoder.family)
    assert type(found.model) is kind
    assert found.shape().parameters == size
    dense = Decoder(tiny.model(name), decoder.family)
    gone = [tuple(block) for block in outcome.evidence[-1]["removed"]]
    expected = with_blocks_silenced(dense, gone, windows)
    assert_close(conformance.logits(found.model, windows), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_layer_that_lost_both_blocks_goes_and_other_passes_follow(name, decoder, plugins, tmp_path):
    windows = tiny.windows(4)
    conformance.pruned(BlockPruner(blocks=9), decoder, windows, plugins)
    assert len(decoder) < tiny.LAYERS
    left = [block for layer in decoder.layers for block in layer.blocks]
    assert len(left) == 3
    assert set(left) == set(BLOCKS)
    for step in (Osscar(ratio=0.25), Depth(layers=1)):
        conformance.pruned(step, decoder, windows, plugins)
        conformance.generates_as_it_scores(decoder.model, windows)
    conformance.reloads_exactly(decoder.model, tmp_path, windows)


@pytest.mark.parametrize("name", ["llama"])
def test_no_cache_can_tell_its_length_without_any_attention(name, decoder):
    with pytest.raises(Exception, match=r"No attention .* would be left"):
        conformance.cut(decoder, Cuts(blocks=dict.fromkeys(range(tiny.LAYERS), ("feed_forward",))))


def test_cuts_of_blocks_can_be_written_and_read():
    cuts = Cuts(layers=(0, 2), blocks={0: ("attention",), 2: ("feed_forward",)}, units={(2, "heads"): (0,)})
    assert Cuts.from_json(cuts.to_json()) == cuts


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({}, "exactly one of 'blocks'"),
        ({"blocks": 2, "ratio": 0.1}, "exactly one of 'blocks'"),
        ({"blocks": 0}, "blocks 0"),
        ({"ratio": 1.0}, "ratio 1.0"),
        ({"ratio": math.nan}, "'ratio' of block-pruner is nan"),
    ],
    ids=str,
)
def test_impossible_options_are_refused(options, why):
    with pytest.raises(RecipeError, match=why):
        BlockPruner(**options)


@pytest.mark.parametrize("name", ["llama"])
def test_more_blocks_than_there_are_cannot_go(name, decoder):
    shape = decoder.shape()
    with pytest.raises(RecipeError, match="11 blocks of 12"):
        BlockPruner(blocks=11).foresee(shape)
    assert BlockPruner(blocks=3).foresee(shape).parameters < shape.parameters


STOCK = BlockPruner(blocks=3, stock=True, search="exact")


def removed(decoder: Decoder, plugins: Plugins, **options: Any) -> set[Block]:
    """The blocks that the stock form of a pass leaves out of a model, which it changes."""
    outcome = conformance.pruned(dataclasses.replace(STOCK, **options), decoder, tiny.windows(4), plugins)
    return {tuple(block) for block in outcome.evidence[-1]["removed"]}


def silent(decoder: Decoder) -> set[Block]:
    return {(layer.index, block) for layer in decoder.layers for block in BLOCKS if layer.adds_nothing(block)}


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neox", "qwen3_moe", "gpt2", "opt-post-norm", "deepseek_v3"])
@pytest.mark.parametrize("heal", [False, True], ids=["as it is", "healed"])
def test_what_was_left_out_by_zeros_is_not_left_out_again_and_not_healed(name, decoder, plugins, heal):
    first = removed(decoder, plugins, heal=heal)
    assert silent(decoder) == first
    second = removed(decoder, plugins, heal=heal)
    assert len(first | second) == 6
    assert silent(decoder) == first | second


@pytest.mark.parametrize("name", ["llama"])
def test_of_blocks_that_put_out_nothing_none_are_left_to_leave_out(name, decoder, plugins):
    removed(decoder, plugins, blocks=8, heal=False)
    with pytest.raises(
        SurgeryError, match=r"leave out 3 blocks, and 2 can be: 8 of 12 put out nothing.*Ask for fewer"
    ):
        removed(decoder, plugins)

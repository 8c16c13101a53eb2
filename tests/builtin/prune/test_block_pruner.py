from __future__ import annotations

import math

import conformance
import pytest
import tiny
import torch
from torch.testing import assert_close

from optimum_prune import Cuts, Depth, Osscar, Progress
from optimum_prune.anatomy import find_family
from optimum_prune.cuts import BLOCKS
from optimum_prune.errors import RecipeError
from optimum_prune.evaluation import next_token_losses
from optimum_prune.methods.block_pruner import BlockPruner, search_blocks

every_family = pytest.mark.parametrize("name", tiny.FAMILIES)


def with_blocks_silenced(model, family, gone, windows):
    """Logits of the whole model, where what these blocks put out is zero."""
    hooks = []
    for index, block in gone:
        layer = family.layers_of(model)[index]
        module = layer.get_submodule(family.block_modules(block)[-1])
        hooks.append(module.register_forward_hook(silence))
    try:
        return conformance.logits(model, windows)
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
def test_blocks_that_are_cut_are_blocks_that_are_silenced(name, subject, gone, padded, tmp_path):
    model, family = subject
    windows = tiny.windows(4, padded=padded)
    expected = with_blocks_silenced(model, family, gone, windows)
    kept = {index: tuple(block for block in BLOCKS if block != gone_here) for index, gone_here in gone}
    before = family.shape(model).parameters
    conformance.cut(model, family, Cuts(blocks=kept))
    assert_close(conformance.logits(model, windows), expected, rtol=1e-5, atol=1e-5)
    assert family.shape(model).parameters < before
    if not padded:
        found = conformance.reloads_exactly(model, tmp_path, windows)
        conformance.generates_as_it_scores(found, windows)
        assert [family.blocks_of(layer) for layer in family.layers_of(found)] == [
            kept.get(index, BLOCKS) for index in range(tiny.LAYERS)
        ]


def naive_rounds(model, family, windows, count):
    """Every block in turn by its definition, each time on the whole model."""
    gone = []
    for _ in range(count):
        left = [(i, b) for i in range(tiny.LAYERS) for b in BLOCKS if (i, b) not in gone]
        losses = [
            next_token_losses(
                with_blocks_silenced(model, family, [*gone, each], windows), windows.tokens, windows.mask
            ).sum()
            for each in left
        ]
        gone.append(left[int(torch.stack(losses).argmin())])
    return gone


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neox", "qwen3_moe", "gpt2"])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_blocks_that_go_are_those_of_a_naive_search(name, plugins, seed):
    model = tiny.model(name, seed)
    family = find_family(model.config, plugins.families)
    windows = tiny.windows(6, seed=seed)
    gone, rounds = search_blocks(model, family, windows, 4, Progress(), race=False)
    assert gone == naive_rounds(model, family, windows, 4)
    assert [len(each["perplexity_without_block"]) for each in rounds] == [12, 11, 10, 9]
    assert all(count == 6 * 23 for each in rounds for count in each["measured_on_tokens"].values())


@pytest.mark.parametrize("name", ["llama", "opt-post-norm", "gemma2", "deepseek_v3", "gpt2"])
def test_the_stock_form_computes_the_same_and_stays_stock(name, subject, plugins, tmp_path):
    model, family = subject
    windows = tiny.windows(4)
    kind = type(model)
    size = family.shape(model).parameters
    outcome = conformance.pruned(BlockPruner(blocks=3, stock=True, heal=False), model, family, windows, plugins)
    found = conformance.reloads_exactly(model, tmp_path, windows)
    assert type(found) is kind
    assert family.shape(found).parameters == size
    dense = tiny.model(name)
    gone = [tuple(block) for block in outcome.evidence[-1]["removed"]]
    expected = with_blocks_silenced(dense, family, gone, windows)
    assert_close(conformance.logits(found, windows), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_layer_that_lost_both_blocks_goes_and_other_passes_follow(name, subject, plugins, tmp_path):
    model, family = subject
    windows = tiny.windows(4)
    conformance.pruned(BlockPruner(blocks=9), model, family, windows, plugins)
    assert len(family.layers_of(model)) < tiny.LAYERS
    left = [block for layer in family.layers_of(model) for block in family.blocks_of(layer)]
    assert len(left) == 3
    assert set(left) == set(BLOCKS)
    for step in (Osscar(ratio=0.25), Depth(layers=1)):
        conformance.pruned(step, model, family, windows, plugins)
        conformance.generates_as_it_scores(model, windows)
    conformance.reloads_exactly(model, tmp_path, windows)


def test_no_cache_can_tell_its_length_without_any_attention(plugins):
    model = tiny.model("llama")
    family = find_family(model.config, plugins.families)
    with pytest.raises(Exception, match=r"No attention .* would be left"):
        conformance.cut(model, family, Cuts(blocks=dict.fromkeys(range(tiny.LAYERS), ("feed_forward",))))


def test_cuts_of_blocks_can_be_written_and_read():
    cuts = Cuts(layers=(0, 2), blocks={0: ("attention",), 2: ("feed_forward",)}, heads={2: (0,)})
    assert Cuts.from_json(cuts.to_json()) == cuts


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({}, "exactly one of 'blocks'"),
        ({"blocks": 2, "ratio": 0.1}, "exactly one of 'blocks'"),
        ({"blocks": 0}, "0 blocks"),
        ({"ratio": 1.0}, "ratio 1.0"),
        ({"ratio": math.nan}, "ratio nan"),
    ],
    ids=str,
)
def test_impossible_options_are_refused(options, why):
    with pytest.raises(RecipeError, match=why):
        BlockPruner(**options)


def test_more_blocks_than_there_are_cannot_go(plugins):
    model = tiny.model("llama")
    shape = find_family(model.config, plugins.families).shape(model)
    with pytest.raises(RecipeError, match="11 blocks of 12"):
        BlockPruner(blocks=11).foresee(shape)
    assert BlockPruner(blocks=3).foresee(shape).parameters < shape.parameters

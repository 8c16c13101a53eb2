from __future__ import annotations

from dataclasses import replace

import pytest

import optimum_prune.evaluation.losses as losses_module
import optimum_prune.evaluation.perplexity as perplexity_module
from optimum_prune.anatomy.shape import LayerShape, Shape
from optimum_prune.anatomy.workload import Workload
from optimum_prune.evaluation.losses import CHUNKS, logits_memory, losses_cost
from optimum_prune.evaluation.perplexity import evaluation_cost

WORK = Workload(hidden=64, vocabulary=1000, itemsize=4, windows=16, length=512)
SHAPE = Shape((LayerShape().of_size(50_000),) * 3)
BATCH = 4 * 512
"""Tokens that are evaluated at once."""


def test_few_logits_are_held_with_all_their_copies_and_many_with_a_chunk_of_them():
    assert logits_memory(WORK, 10) == 10 * 1000 * (4 + CHUNKS * 4)
    tokens = 100 * losses_module.LOGITS_PER_CHUNK // 1000
    assert logits_memory(WORK, tokens) == tokens * 1000 * 4 + CHUNKS * 4 * losses_module.LOGITS_PER_CHUNK


@pytest.mark.parametrize("times", [1, 3])
def test_losses_take_the_product_with_the_head_each_time(times):
    cost = losses_cost(WORK, 5000, 500, times)
    assert cost.memory == logits_memory(WORK, 500)
    assert cost.products == times * 5000 * 2 * 64 * 1000
    assert cost.reading == 0


def test_a_head_that_lies_on_disk_is_read_for_each_part_of_the_tokens():
    cost = losses_cost(replace(WORK, offloaded=True), 5000, 500)
    assert cost.reading == 10 * 64 * 1000 * 4
    assert cost.memory == logits_memory(WORK, 500) + 64 * 1000 * 4


def test_a_head_in_16_bits_is_held_twice():
    half = replace(WORK, itemsize=2)
    assert losses_cost(half, 5000, 500).memory == logits_memory(half, 500) + 64 * 1000 * 2


def test_an_evaluation_runs_every_layer_and_the_head_on_all_windows():
    assert perplexity_module.TOKENS_PER_BATCH == BATCH
    cost, layers = evaluation_cost(WORK, SHAPE), WORK.run_all(SHAPE.layers, WORK.tokens)
    assert cost.products == layers.products + WORK.tokens * 2 * 64 * 1000
    assert cost.memory == max(layers.memory, logits_memory(WORK, BATCH)) + 2 * BATCH * 64 * 4


def test_an_evaluation_of_more_windows_takes_longer_and_no_more_memory():
    one, ten = evaluation_cost(WORK, SHAPE), evaluation_cost(WORK.on(160), SHAPE)
    assert ten.memory == one.memory
    assert ten.products == 10 * one.products
    assert ten.elements == 10 * one.elements

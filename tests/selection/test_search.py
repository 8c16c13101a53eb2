from __future__ import annotations

from collections.abc import Sequence

import pytest
import tiny
import torch
from shortened import loss_of

from optimum_prune import Calibration, Decoder, Windows
from optimum_prune import testing as conformance
from optimum_prune.selection import search
from optimum_prune.selection.search import Losses, Variant

SOME = (
    "llama",
    "qwen2",
    "gemma3",
    "gemma2",
    "cohere2",
    "gpt2",
    "gpt_neox",
    "opt",
    "mixtral",
    "qwen3_moe",
    "deepseek_v3",
    "opt-post-norm",
)
"""Sliding windows, blocks side by side, learned positions, mixtures, and norms in every place."""


def measure(decoder: Decoder, windows: Windows, variants: Sequence[Variant], **how) -> Losses:
    return search.measure(decoder, Calibration(windows), variants, "", **how)


def naive(decoder: Decoder, windows: Windows, gaps: Sequence[Sequence[int]]) -> list[float]:
    """The loss of the whole model with each of these gaps."""
    return [loss_of(conformance.with_layers_skipped(decoder, gap, windows), windows) for gap in gaps]


def without(start: int, size: int = 1) -> Variant:
    return Variant(start, start + size, lambda _, hidden: hidden)


def spoiled(start: int, value: float) -> Variant:
    """Puts out what is no number, or no finite one."""
    return Variant(start, start + 1, lambda _, hidden: torch.full_like(hidden, value))


def sampled(decoder: Decoder, count: int = 40, length: int = 24, seed: int = 0) -> Windows:
    """Windows that the model itself wrote, so that it loses by any change."""
    tokens = torch.full((count, 1), tiny.BOS)
    generator = torch.Generator().manual_seed(seed)
    while tokens.shape[1] < length:
        (last,) = conformance.logits(decoder.model, Windows.from_tokens(tokens))[:, -1:].softmax(-1).unbind(1)
        tokens = torch.cat([tokens, last.multinomial(1, generator=generator)], 1)
    return Windows.from_tokens(tokens)


WINDOWS = [range(start, start + size) for size in (1, 2, 3, 4) for start in range(tiny.LAYERS - size + 1)]


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_each_variant_loses_what_the_model_without_its_layers_loses(name, decoder, padded):
    windows = tiny.windows(4, padded=padded)
    found = measure(decoder, windows, [without(gap[0], len(gap)) for gap in WINDOWS])
    base, *expected = naive(decoder, windows, [(), *WINDOWS])
    assert found.base == pytest.approx(base, rel=1e-5)
    assert found.means == pytest.approx(expected, rel=1e-5)
    assert set(found.tokens) == {int(windows.mask[:, 1:].sum())}
    assert found.behind == pytest.approx([mean - min(expected) for mean in expected], abs=1e-4)
    assert [expected[index] for index in found.ranked] == pytest.approx(sorted(expected), rel=1e-5)


@pytest.mark.parametrize("name", ["gemma3", "opt", "deepseek_v2"])
def test_it_does_not_matter_how_much_memory_streams_may_take(name, decoder, monkeypatch):
    windows = tiny.windows(5, padded=True)
    variants = [without(gap[0], len(gap)) for gap in WINDOWS]
    together = measure(decoder, windows, variants)
    of_window = windows.tokens.shape[1] * decoder.config.hidden_size * 4
    all_streams = (len(variants) + 1) * of_window
    for memory in (2 * all_streams, all_streams, all_streams // 3, 2 * of_window, 1):
        monkeypatch.setattr(search, "MEMORY", memory)
        apart = measure(decoder, windows, variants)
        assert (apart.base, *apart.means) == pytest.approx((together.base, *together.means), rel=1e-6)
        assert apart.tokens == together.tokens


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neox", "qwen3_moe"])
def test_variants_can_be_measured_on_top_of_what_is_gone_already(name, decoder):
    windows = tiny.windows(4, padded=True)
    gone = {1, 4}

    def run_layer(batch, index, hidden):
        return hidden if index in gone else batch.run(decoder.modules[index], index, hidden)

    left = [index for index in range(tiny.LAYERS) if index not in gone]
    found = measure(decoder, windows, list(map(without, left)), run_layer=run_layer)
    base, *expected = naive(decoder, windows, [gone, *({index, *gone} for index in left)])
    assert found.base == pytest.approx(base, rel=1e-5)
    assert found.means == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_variant_may_run_other_layers_in_the_place_of_those_it_differs_in(name, decoder):
    other = Decoder(tiny.model(name, seed=1), decoder.family).modules[2]
    windows = tiny.windows(3)
    variant = Variant(2, 5, lambda batch, hidden: batch.run(other, 2, hidden))
    found = measure(decoder, windows, [variant])
    decoder.modules[2].load_state_dict(other.state_dict())
    assert found.means == pytest.approx(naive(decoder, windows, [(3, 4)]), rel=1e-5)


@pytest.mark.parametrize("name", ["llama"])
def test_measuring_changes_nothing(name, decoder):
    before = {key: value.clone() for key, value in decoder.model.state_dict().items()}
    measure(decoder, tiny.windows(2), [without(0), without(5)], race=True)
    assert len(decoder) == tiny.LAYERS
    assert all(torch.equal(value, before[key]) for key, value in decoder.model.state_dict().items())


# Races


def least(seed: int) -> int:
    """The layer that hardly matters; not the first, before which hidden states are small."""
    return 1 + seed % (tiny.LAYERS - 1)


def uneven(seed: int, plugins) -> Decoder:
    """A model one of whose layers hardly matters, and another hardly more."""
    model = tiny.model("llama", seed)
    layers = model.model.layers
    with torch.no_grad():
        for index, scale in ((least(seed), 0.05), (least(seed + 2), 0.2)):
            for block in (layers[index].self_attn.o_proj, layers[index].mlp.down_proj):
                block.weight.mul_(scale)
                block.bias.mul_(scale)
    return Decoder.of(model, plugins.families)


@pytest.mark.parametrize("seed", range(5))
def test_a_race_has_the_winner_of_the_exact_search_and_measures_it_in_full(seed, plugins):
    decoder = uneven(seed, plugins)
    windows = sampled(decoder, seed=seed)
    variants = list(map(without, range(tiny.LAYERS)))
    exact = measure(decoder, windows, variants)
    raced = measure(decoder, windows, variants, race=True)
    assert raced.ranked[0] == exact.ranked[0] == least(seed)
    assert raced.base == pytest.approx(exact.base, rel=1e-6)
    everything = max(exact.tokens)
    survivors = [index for index, tokens in enumerate(raced.tokens) if tokens == everything]
    assert exact.ranked[0] in survivors
    for index in survivors:
        assert raced.means[index] == pytest.approx(exact.means[index], rel=1e-6)
        assert raced.behind[index] == pytest.approx(exact.behind[index], abs=1e-5)
    assert raced.ranked[: len(survivors)] == [index for index in exact.ranked if index in survivors]
    out = set(range(tiny.LAYERS)) - set(survivors)
    assert out, "some layers of such a model cannot be left out, and that shows early"
    assert all(exact.means[index] > exact.means[exact.ranked[0]] for index in out)


def test_who_is_out_is_out_as_soon_as_enough_was_observed_and_no_sooner(plugins):
    decoder = uneven(0, plugins)
    windows = sampled(decoder)
    predicted = windows.tokens.shape[1] - 1
    hopeless = Variant(2, tiny.LAYERS, lambda _, hidden: -100 * hidden)
    found = measure(decoder, windows, [without(least(0)), hopeless], race=True)
    enough = search.FEWEST_BLOCKS * search.BLOCK
    assert found.tokens[0] == len(windows.tokens) * predicted
    assert enough <= found.tokens[1] < enough + predicted
    few = Windows.from_tokens(windows.tokens[: enough // predicted])
    assert set(measure(decoder, few, [without(least(0)), hopeless], race=True).tokens) == {len(few.tokens) * predicted}


def test_variants_that_are_the_same_run_to_the_end(plugins):
    decoder = uneven(1, plugins)
    windows = sampled(decoder)
    found = measure(decoder, windows, [without(1)] * 3, race=True)
    assert len(set(found.tokens)) == len(set(found.means)) == 1
    assert found.behind == (0, 0, 0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("race", [False, True], ids=["exact", "race"])
def test_a_variant_without_a_finite_loss_ranks_last(value, race, plugins):
    decoder = uneven(2, plugins)
    windows = sampled(decoder)
    variants = [spoiled(0, value), without(least(2)), spoiled(5, value), without(2)]
    found = measure(decoder, windows, variants, race=race)
    alone = measure(decoder, windows, [without(least(2)), without(2)], race=race)
    assert found.means[0] == found.means[2] == torch.inf
    assert (found.means[1], found.means[3]) == pytest.approx(alone.means)
    assert found.ranked[0] == 1
    assert found.tokens[1] == len(windows.tokens) * (windows.tokens.shape[1] - 1)
    assert (found.tokens[0] < found.tokens[1]) == race


@pytest.mark.parametrize("race", [False, True], ids=["exact", "race"])
def test_variants_none_of_which_is_finite_are_told_as_they_are(race, plugins):
    decoder = uneven(2, plugins)
    windows = sampled(decoder, 20)
    found = measure(decoder, windows, [spoiled(0, torch.nan), spoiled(3, torch.inf)], race=race)
    assert found.means == (torch.inf, torch.inf)
    assert torch.tensor(found.base).isfinite()


def test_those_that_were_out_rank_behind_those_measured_in_full_whatever_they_lost():
    losses = Losses(1.0, (2.0, 1.5, 3.0, 1.9), (100, 40, 100, 60), (0.0, 0.6, 1.0, 0.5))
    assert losses.ranked == [0, 2, 3, 1]

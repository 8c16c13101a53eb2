"""Whole experts leave: those with the lowest scores, which another computation over the whole model finds too."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import tiny
import torch
from torch.testing import assert_close

from optimum_prune import Cuts, Decoder, Osscar
from optimum_prune.builtin.prune.experts import ExpertPruner
from optimum_prune.errors import RecipeError
from optimum_prune.testing import check_pass, cut, pruned
from optimum_prune.testing.models import logits

SIZES = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1}
HALF = {name: 4 if name == "deepseek_v3" else 2 for name in tiny.MIXTURES}
"""How many experts are half of them."""


@pytest.fixture
def decoder(name: str, plugins) -> Decoder:
    """As everywhere, but with enough experts that some may go from each of the router's groups."""
    if name != "deepseek_v3":
        return Decoder.of(tiny.model(name), plugins.families)
    config = tiny.model(name).config
    config.update(SIZES)
    torch.manual_seed(0)
    return Decoder.of(tiny.filled(type(tiny.model(name))(config)).eval(), plugins.families)


every_mixture = pytest.mark.parametrize("name", tiny.MIXTURES)


def mixed(decoder: Decoder) -> list[int]:
    return [layer.index for layer in decoder.layers if "whole_experts" in layer.axes]


@torch.no_grad()
def routed(decoder: Decoder, index: int, windows):
    """What the whole model calls the experts of a layer with: rows of hidden states, choices, weights."""
    module = decoder.layer(index).part(decoder.family.experts.module)
    calls = []
    handle = module.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((*args, *kwargs.values())), with_kwargs=True
    )
    decoder.model(input_ids=windows.tokens, attention_mask=windows.mask.long(), use_cache=False)
    handle.remove()
    ((hidden, chosen, weights),) = calls
    return module, hidden.flatten(0, -2).double(), chosen.flatten(0, -2), weights.flatten(0, -2).double()


@torch.no_grad()
def by_hand(decoder: Decoder, index: int, windows, score: str) -> list[float]:
    """Scores, token by token, from the definitions."""
    module, hidden, chosen, weights = routed(decoder, index, windows)
    experts = decoder.family.experts
    up, down = getattr(module, experts.inputs).double(), getattr(module, experts.output).double()
    counted = windows.mask.flatten().tolist()
    found = []
    for number in range(len(up)):
        outputs, shares = [], []
        for token, real in enumerate(counted):
            for place in range(chosen.shape[1]):
                if real and chosen[token, place] == number:
                    gate, value = (up[number] @ hidden[token]).chunk(2)
                    outputs.append(down[number] @ (module.act_fn(gate) * value))
                    shares.append(weights[token, place])
        if not outputs:
            found.append(0.0)
            continue
        rows, share = torch.stack(outputs), torch.stack(shares)
        frequency = len(rows) / (sum(counted) * chosen.shape[1])
        found.append(
            {
                "reap": (share * rows.norm(dim=1)).mean(),
                "frequency": torch.tensor(frequency),
                "mean_output": frequency * (rows - rows.mean(0)).square().sum(1).mean(),
            }[score].item()
        )
    return found


@every_mixture
@pytest.mark.parametrize("score", ["reap", "frequency", "mean_output"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_scores_are_those_of_another_computation_and_the_lowest_go(name, decoder, score, padded, plugins):
    windows, dense = tiny.windows(6, padded=padded), copy.deepcopy(decoder.model)
    first = mixed(decoder)[0]
    outcome = pruned(ExpertPruner(keep=HALF[name], score=score), decoder, windows, plugins)
    evidence = [each for each in outcome.plain_evidence() if each.get("layer") == first]
    expected = by_hand(Decoder(dense, decoder.family), first, windows, score)
    assert_close(torch.tensor(evidence[0]["scores"]), torch.tensor(expected), rtol=1e-4, atol=1e-6)
    half = len(expected) // 2
    groups = [range(half), range(half, 2 * half)] if name == "deepseek_v3" else [range(2 * half)]
    best = [sorted(group, key=lambda number: -expected[number])[: HALF[name] // len(groups)] for group in groups]
    assert outcome.cuts.kept(first, "whole_experts") == tuple(sorted(number for group in best for number in group))
    assert all(decoder.layer(index).axes["whole_experts"].units == HALF[name] for index in mixed(decoder))


@every_mixture
def test_later_layers_are_judged_on_the_stream_of_the_pruned_ones(name, decoder, plugins):
    windows, dense = tiny.windows(6), Decoder(copy.deepcopy(decoder.model), decoder.family)
    first, second = mixed(decoder)[:2]
    outcome = pruned(ExpertPruner(keep=HALF[name]), decoder, windows, plugins)
    scores = {each["layer"]: each["scores"] for each in outcome.plain_evidence() if "layer" in each}
    cut(dense, Cuts.along("whole_experts", {first: outcome.cuts.kept(first, "whole_experts")}))
    assert_close(
        torch.tensor(scores[second]), torch.tensor(by_hand(dense, second, windows, "reap")), rtol=1e-4, atol=1e-6
    )


@every_mixture
@pytest.mark.parametrize(
    "options", [{"ratio": 0.5}, {"ratio": 0.5, "score": "mean_output"}, {"ratio": 0.4, "allocation": "global"}]
)
def test_it_leaves_what_it_foresees_decides_the_same_and_reloads(name, decoder, options, tmp_path):
    if name == "deepseek_v3":
        options = {**options, "ratio": 0.5}
    check_pass(ExpertPruner(**options), decoder.model, tmp_path)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v2"])
def test_an_expert_that_does_nothing_goes(name, decoder, plugins):
    """Whatever tells how much it matters; and where it goes, so does hardly anything of the model."""
    experts = decoder.family.experts
    for index in mixed(decoder):
        decoder.layer(index).module.get_parameter(f"{experts.module}.{experts.output}").data[1] = 0
    for score in ("reap", "mean_output"):
        smaller = Decoder(copy.deepcopy(decoder.model), decoder.family)
        outcome = pruned(ExpertPruner(keep=3, score=score), smaller, tiny.windows(6), plugins)
        assert all(outcome.cuts.kept(index, "whole_experts") == (0, 2, 3) for index in mixed(decoder))


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v2"])
def test_globally_a_mixture_that_hardly_matters_loses_more(name, decoder, plugins):
    weak, *others = mixed(decoder)
    experts = decoder.family.experts
    decoder.layer(weak).module.get_parameter(f"{experts.module}.{experts.output}").data.mul_(0.01)
    foreseen = ExpertPruner(ratio=0.25, allocation="global").foresee(decoder.shape())
    pruned(ExpertPruner(ratio=0.25, allocation="global"), decoder, tiny.windows(8), plugins)
    left = {index: decoder.layer(index).axes["whole_experts"].units for index in mixed(decoder)}
    assert left[weak] == 2
    assert max(left[index] for index in others) > 3
    assert decoder.shape().parameters == foreseen.parameters


@pytest.mark.parametrize("name", ["mixtral"])
def test_channels_inside_the_experts_follow(name, decoder, plugins):
    pruned(ExpertPruner(keep=3), decoder, tiny.windows(6), plugins)
    pruned(Osscar(ratio=0.5), decoder, tiny.windows(6), plugins)
    layer = decoder.layers[0]
    assert (layer.axes["whole_experts"].units, layer.axes["experts"].groups) == (3, 3)
    assert logits(decoder.model, tiny.windows(2)).isfinite().all()


@pytest.mark.parametrize("name", ["mixtral"])
def test_experts_that_no_token_reached_are_told_of(name, decoder, plugins):
    """Of one token again and again, all are routed to the same two of four experts."""
    windows = tiny.windows(2)
    alike = replace(windows, tokens=torch.full_like(windows.tokens, 7))
    step = ExpertPruner(keep=3, score="frequency")
    outcome = pruned(step, decoder, alike, plugins)
    assert outcome.notes == [
        f"no token was routed to {2 * tiny.LAYERS} experts, which nothing is known of; more text tells more"
    ]


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        ("llama", {"ratio": 0.5}, "no layer of this model has any"),
        ("mixtral", {"keep": 1}, "keep 1 of 4 experts in each layer, and from 2 to 3 can be kept"),
        ("mixtral", {"keep": 4}, "keep 4 of 4 experts"),
        ("mixtral", {"ratio": 0.9}, "keep 0 of 4 experts in each layer, by its ratio 0.9"),
        ("mixtral", {"ratio": 0.5, "protect": (9,)}, "protect the layer 9"),
        ("deepseek_v2", {"ratio": 0.5, "protect": tuple(range(2, tiny.LAYERS))}, "none but protected layers has any"),
    ],
)
def test_what_a_model_cannot_give_is_refused(name, decoder, options, why):
    with pytest.raises(RecipeError, match=why):
        ExpertPruner(**options).foresee(decoder.shape())


@pytest.mark.parametrize("options", [{}, {"ratio": 0.5, "keep": 2}, {"keep": 0}, {"ratio": 0.5, "protect": (0, 0)}])
def test_options_that_cannot_be_are_refused(options):
    with pytest.raises(RecipeError, match="experts"):
        ExpertPruner(**options)

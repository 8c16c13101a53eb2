"""Wanda and SparseGPT: zeros where an independent computation has them, and weights that make up for them as well as any can."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import tiny
import torch
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from optimum_prune import Calibration, Decoder, compress
from optimum_prune.anatomy.matrices import matrices
from optimum_prune.builtin.prune.hidden import HiddenPruner
from optimum_prune.builtin.prune.sparsegpt import SparseGPT
from optimum_prune.builtin.prune.wanda import Wanda
from optimum_prune.calibration.statistics import SquaredNorms
from optimum_prune.errors import RecipeError
from optimum_prune.refit.sparsifying import inverse_factor, without_lowest
from optimum_prune.selection.sparsity import Sparsity
from optimum_prune.surgery.operation import carry_out
from optimum_prune.testing import check_pass, pruned

SPARSE = [{"ratio": 0.5}, {"ratio": 0.3}, {"pattern": "2:4"}, {"pattern": "1:2"}]
IDS = ["half", "some", "2:4", "1:2"]
MIXTURES = [name for name in tiny.FAMILIES if any(word in name for word in ("moe", "mixtral", "deepseek"))]


def add_squares(norm, inputs):
    norm += inputs.flatten(0, -2).double().pow(2).sum(0)


def by_hand(model, windows, ratio=None, pattern=None):
    """Wanda on a model whose layers have nn.Linear only: another traversal, window by window, in the plain words of the paper."""
    layers = model.model.layers
    states = []

    class Caught(Exception):
        pass

    for tokens in windows.tokens:

        def catch(module, args, kwargs):
            states.append((args, kwargs))
            raise Caught

        handle = layers[0].register_forward_pre_hook(catch, with_kwargs=True)
        with pytest.raises(Caught):
            model(input_ids=tokens[None], use_cache=False)
        handle.remove()
    for layer in layers:
        linears = {path: module for path, module in layer.named_modules() if isinstance(module, nn.Linear)}
        norms = {path: torch.zeros(module.in_features, dtype=torch.float64) for path, module in linears.items()}
        handles = [
            module.register_forward_pre_hook(lambda _, args, norm=norms[path]: add_squares(norm, args[0]))
            for path, module in linears.items()
        ]
        for args, kwargs in states:
            layer(*args, **kwargs)
        for handle in handles:
            handle.remove()
        for path, module in linears.items():
            scores = module.weight.detach().abs().double() * norms[path].sqrt()
            for row, score in zip(module.weight.data, scores, strict=True):
                if pattern is None:
                    row[score.sort().indices[: int(len(score) * ratio)]] = 0
                    continue
                stay, of = map(int, pattern.split(":"))
                for start in range(0, len(score), of):
                    row[start + score[start : start + of].sort().indices[: of - stay]] = 0
        states = [((layer(*args, **kwargs), *args[1:]), kwargs) for args, kwargs in states]


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "mistral", "phi3"])
@pytest.mark.parametrize("options", SPARSE, ids=IDS)
def test_wanda_sets_to_zero_what_another_implementation_does(name, decoder, plugins, options):
    windows, other = tiny.windows(5), copy.deepcopy(decoder.model)
    by_hand(other, windows, **options)
    pruned(Wanda(**options), decoder, windows, plugins)
    for (path, value), expected in zip(decoder.model.named_parameters(), other.parameters(), strict=True):
        assert_close(value, expected, rtol=0, atol=0, msg=path)


@pytest.mark.parametrize("name", tiny.FAMILIES)
@pytest.mark.parametrize("method", [Wanda, SparseGPT])
def test_of_every_family_all_matrices_are_as_sparse_as_asked_and_nothing_else_changes(name, decoder, method, plugins):
    before = {path: value.detach().clone() for path, value in decoder.model.named_parameters()}
    sparse = {
        f"{layer.prefix}{matrix.parameter}": layer.projection(matrix.parameter).maps
        for layer in decoder.layers
        for matrix in matrices(layer)
    }
    outcome = pruned(method(pattern="2:4"), decoder, tiny.windows(6, padded=True), plugins)
    for path, value in decoder.model.named_parameters():
        if path not in sparse:
            assert_close(value, before[path], rtol=0, atol=0)
            continue
        (layer,) = (each for each in decoder.layers if path.startswith(each.prefix))
        for weight in layer.projection(path.removeprefix(layer.prefix)).maps:
            assert (weight.reshape(len(weight), -1, 4).count_nonzero(-1) <= 2).all(), path
            assert weight.count_nonzero() > 0.4 * weight.numel(), path
    (note,) = outcome.notes
    assert note.startswith("50.0 % of ")
    linear = {
        f"{path}.weight"
        for path, module in decoder.modules.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module.weight.shape[0] > 1
    }
    routers = {path for path in linear if path.endswith("mlp.gate.weight")}
    named = {path.removeprefix(f"{decoder.family.layers}.") for path in sparse}
    assert linear - routers <= named


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("method", [Wanda, SparseGPT])
def test_it_reloads_and_decides_the_same_each_time(name, decoder, method, tmp_path):
    check_pass(method(ratio=0.5), decoder.model, tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("name", MIXTURES)
def test_an_expert_is_judged_by_the_tokens_that_are_routed_to_it(name, decoder, plugins):
    """Those are seen in the model's own router, and run through each expert by hand."""
    dense, windows = copy.deepcopy(decoder), tiny.windows(6)
    step = Wanda(ratio=0.5, protect=tuple(range(len(decoder) - 1)))
    pruned(step, decoder, windows, plugins)
    layer, after = dense.layers[-1], decoder.layers[-1]
    experts = dense.family.experts
    module = layer.part(experts.module)
    seen = []
    handle = module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((*args, *kwargs.values())), with_kwargs=True
    )
    dense.model(input_ids=windows.tokens, use_cache=False)
    handle.remove()
    ((hidden, chosen, _),) = seen
    hidden = hidden.flatten(0, -2)
    up, down = getattr(module, experts.inputs), getattr(module, experts.output)
    new_up, new_down = (getattr(after.part(experts.module), each) for each in (experts.inputs, experts.output))
    reached = 0
    for number in range(len(up)):
        rows = hidden[(chosen == number).any(-1)]
        if len(rows) < 2:
            continue
        reached += 1
        gate, value = (rows @ up[number].T).chunk(2, -1)
        inner = module.act_fn(gate) * value
        for weight, inputs, new in ((up[number], rows, new_up[number]), (down[number], inner, new_down[number])):
            scores = weight.abs() * inputs.norm(dim=0)
            gone = scores.argsort(dim=1)[:, : int(weight.shape[1] * 0.5)]
            assert_close(new, weight.scatter(1, gone, 0.0), rtol=0, atol=0)
    assert reached > 1


@pytest.mark.parametrize("options", [{"ratio": 0.5}, {"ratio": 0.5, "share": "mass"}, {"pattern": "2:4"}], ids=str)
def test_what_no_token_reached_goes_by_magnitude(options):
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    (found,) = Wanda(**options)._sparse([weight], SquaredNorms(32, torch.device("cpu")))
    (wanted,) = Wanda(**options)._sparse([weight], _ones(32))
    assert torch.equal(found, wanted)
    assert 0.45 < (found == 0).float().mean() < 0.55


@pytest.mark.parametrize("step", [Wanda(ratio=0.5), SparseGPT(ratio=0.5)], ids=["wanda", "sparsegpt"])
@pytest.mark.parametrize("name", ["mixtral"])
def test_experts_that_no_token_reached_are_told_of(name, step, decoder, plugins):
    """Of one token again and again, all are routed to the same two of four experts."""
    windows = tiny.windows(2)
    alike = replace(windows, tokens=torch.full_like(windows.tokens, 7))
    seen = pruned(step, copy.deepcopy(decoder), windows, plugins)
    assert not any("no token of the text reached" in note for note in seen.notes)
    (note,) = pruned(step, decoder, alike, plugins).notes
    assert f"no token of the text reached {2 * 2 * tiny.LAYERS} matrices of experts" in note


def _ones(features: int) -> SquaredNorms:
    norms = SquaredNorms(features, torch.device("cpu"))
    norms.add(torch.ones(1, features))
    return norms


def test_by_mass_as_many_go_as_are_asked_for_up_to_nearly_all():
    scores = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).abs()
    for ratio in (0.02, 0.9, 0.97, 0.99):
        assert Sparsity(ratio).lowest_by_mass(scores).float().mean().item() == pytest.approx(ratio, abs=3e-3)


def test_by_mass_rows_whose_scores_are_alike_lose_fewer():
    torch.manual_seed(0)
    scores = torch.rand(64, 256) ** torch.linspace(0.1, 8, 64)[:, None]
    gone = Sparsity(0.5).lowest_by_mass(scores)
    assert gone.float().mean().item() == pytest.approx(0.5, abs=2e-3)
    counts = gone.sum(1)
    assert counts[:8].max() + 30 < counts[-8:].min()
    share = (scores * gone).sum(1) / scores.sum(1)
    assert share.max() - share.min() < 0.1  # but for the last that did not fit
    for row, lost in zip(scores, gone, strict=True):
        assert row[lost].max() <= row[~lost].min()


def eliminated_by_hand(weight, gram, gone):
    """What is left of each row when its zeros are made one after the other, each made up for by all that is behind it."""
    left = weight.clone()
    for row, lost in zip(left, gone, strict=True):
        for column in range(len(row)):
            if lost[column]:
                inverse = torch.linalg.inv(gram[column:, column:])
                row[column:] -= row[column] / inverse[0, 0] * inverse[0]
                row[column] = 0
    return left


def test_sparsegpt_makes_up_for_zeros_as_the_inverse_of_what_is_left_says():
    torch.manual_seed(1)
    weight, inputs = torch.randn(9, 24, dtype=torch.float64), torch.randn(200, 24, dtype=torch.float64)
    gram = inputs.T @ inputs
    gone = torch.rand(9, 24) < 0.5
    taken = iter(gone.split(4, dim=1))
    found = without_lowest(weight, inverse_factor(gram.clone()), lambda _: next(taken), 4)
    assert_close(found, eliminated_by_hand(weight, gram, gone))


def test_sparsegpt_decides_by_the_loss_of_a_weight_given_that_the_rest_follows():
    torch.manual_seed(2)
    weight, inputs = torch.randn(5, 12, dtype=torch.float64), torch.randn(100, 12, dtype=torch.float64)
    gram = inputs.T @ inputs
    asked = []

    def lowest(scores):
        asked.append(scores.clone())
        return torch.zeros_like(scores, dtype=torch.bool)

    without_lowest(weight, inverse_factor(gram.clone()), lowest, 6)
    for start, scores in zip((0, 6), asked, strict=True):
        for column in range(6):
            inverse = torch.linalg.inv(gram[start + column :, start + column :])
            assert_close(scores[:, column], weight[:, start + column].square() / inverse[0, 0])


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama"])
@pytest.mark.parametrize("options", SPARSE, ids=IDS)
def test_sparsegpt_changes_outputs_less_than_wanda_and_wanda_less_than_magnitude(name, decoder, options):
    """Of the first layer, whose inputs are the same for all."""
    windows, errors, table = tiny.windows(40), {}, decoder.model.get_input_embeddings().weight.data
    torch.manual_seed(3)
    table.copy_(torch.randn(len(table), 12) @ torch.randn(12, table.shape[1]) + 0.3 * torch.randn(table.shape))
    tokens = decoder.model.get_input_embeddings()(windows.tokens)
    inputs = decoder.layers[0].module.input_layernorm(tokens).flatten(0, 1)
    dense = decoder.layers[0].part("self_attn.q_proj").weight.clone()
    for method in (Wanda, SparseGPT):
        changed = Decoder(copy.deepcopy(decoder.model), decoder.family)
        step = method(**options, protect=tuple(range(1, len(decoder))))
        for decision in step.decide(changed, Calibration(windows)):
            carry_out(changed, decision)
        weight = changed.layers[0].part("self_attn.q_proj").weight
        errors[method] = (inputs @ (weight - dense).T).square().sum()
    sparsity = Sparsity.asked("magnitude", options.get("ratio"), options.get("pattern"))
    magnitude = dense.masked_fill(sparsity.lowest(dense.abs()), 0)
    assert errors[SparseGPT] < 0.8 * errors[Wanda]
    assert errors[Wanda] < (inputs @ (magnitude - dense).T).square().sum()


@pytest.mark.parametrize("method", [Wanda, SparseGPT])
@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({}, "needs one of 'ratio'"),
        ({"ratio": 0.5, "pattern": "2:4"}, "needs one of 'ratio'"),
        ({"pattern": "4:2"}, "has the pattern '4:2'. Say how many weights stay"),
        ({"pattern": "half"}, "has the pattern 'half'"),
        ({"pattern": "0:4"}, "has the pattern '0:4'"),
        ({"ratio": 1.0}, "ratio"),
        ({"ratio": 0.5, "protect": (1, 1)}, "Name each once"),
    ],
)
def test_options_that_cannot_be_are_refused(method, options, why):
    with pytest.raises(RecipeError, match=why.replace(".", r"\.")):
        method(**options)


def test_a_pattern_leaves_no_choice_by_mass():
    with pytest.raises(RecipeError, match="Leave 'share' out"):
        Wanda(pattern="2:4", share="mass")


@pytest.mark.parametrize("name", ["llama"])
@pytest.mark.parametrize("method", [Wanda, SparseGPT])
def test_a_pattern_that_does_not_go_into_a_size_is_refused_before_anything_runs(name, decoder, method):
    with pytest.raises(RecipeError, match="is no multiple of 7"):
        method(pattern="3:7").foresee(decoder.shape())
    with pytest.raises(RecipeError, match="is to protect the layer 77"):
        method(ratio=0.5, protect=(77,)).foresee(decoder.shape())


@pytest.mark.parametrize("behind", [[HiddenPruner(size=24)], []], ids=["refitted", "alone"])
def test_zeros_that_a_later_pass_loses_are_said_to_be_lost(behind, recipe, tmp_path):
    report = compress(recipe(Wanda(ratio=0.5), *behind), tmp_path / "out")
    notes = [note for outcome in report.passes for note in outcome.notes]
    assert any("and 50% were behind wanda" in note for note in notes) == bool(behind), notes

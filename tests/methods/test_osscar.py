from __future__ import annotations

import copy
from itertools import combinations, pairwise

import conformance
import pytest
import tiny
import torch
from torch import Tensor
from torch.testing import assert_close

from optimum_prune import Cuts, Decision, Osscar, Progress, surgery
from optimum_prune.anatomy import Shape, find_family
from optimum_prune.errors import NumericalError, RecipeError
from optimum_prune.methods.osscar import damped, eliminate, refit


def problem(size: int, tokens: int, outputs: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Gram of correlated activations and weights, `[out, in]`, whose channels differ in importance."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    activations = normal(tokens, size) + normal(tokens, size // 4) @ normal(size // 4, size)
    return damped(activations.T @ activations, 0.01), normal(outputs, size) * normal(size).exp()


def objective(gram: Tensor, dense: Tensor, weight: Tensor) -> float:
    change = weight - dense
    return 0.5 * torch.trace(change.T @ gram @ change).item()


def least_squares(gram: Tensor, dense: Tensor, kept: tuple[int, ...]) -> tuple[Tensor, float]:
    """`min |A W - A B|` over W supported on `kept`, where `A'A` is the gram."""
    root = torch.linalg.cholesky(gram).T
    weight = torch.zeros_like(dense)
    weight[list(kept)] = torch.linalg.lstsq(root[:, list(kept)], root @ dense).solution
    return weight, objective(gram, dense, weight)


def naive(gram: Tensor, dense: Tensor, keep: int, step: int) -> tuple[int, ...]:
    """The greedy, with every inverse and every weight computed afresh after each removal."""
    alive = list(range(len(gram)))
    while len(alive) > keep:
        inverse = torch.linalg.inv(gram[alive][:, alive])
        weight = inverse @ (gram @ dense)[alive]
        cost = weight.square().sum(1) / inverse.diagonal()
        cheapest = cost.argsort()[: min(step, len(alive) - keep)].tolist()
        alive = [channel for position, channel in enumerate(alive) if position not in cheapest]
    return tuple(alive)


@pytest.mark.parametrize("step", [1, 4, 7, 100])
@pytest.mark.parametrize(("size", "keep", "tokens"), [(60, 20, 300), (150, 13, 400), (200, 60, 80), (200, 136, 1000)])
def test_lazy_updates_choose_what_fresh_inverses_choose(size, keep, tokens, step):
    gram, weight = problem(size, tokens)
    found = eliminate(gram, weight, keep, step)
    assert found.kept == naive(gram, weight.T, keep, step)
    expected, loss = least_squares(gram, weight.T, found.kept)
    assert found.loss == pytest.approx(loss, rel=1e-8)
    assert_close(found.weight, expected[list(found.kept)].T, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_the_refit_is_least_squares_on_every_subset(seed):
    gram, weight = problem(8, 30, seed=seed)
    for keep in (1, 3, 5, 7):
        for kept in combinations(range(8), keep):
            expected, loss = least_squares(gram, weight.T, kept)
            refitted, found = refit(gram, weight.T, torch.tensor(kept))
            assert found == pytest.approx(loss, rel=1e-9)
            assert_close(refitted, expected[list(kept)], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("keep", [2, 4, 6])
@pytest.mark.parametrize("seed", range(5))
def test_the_greedy_lies_between_the_best_subset_and_trivial_ones(seed, keep):
    gram, weight = problem(8, 30, seed=seed)
    losses = [least_squares(gram, weight.T, kept)[1] for kept in combinations(range(8), keep)]
    found = eliminate(gram, weight, keep).loss
    assert min(losses) * (1 - 1e-9) <= found <= sum(losses) / len(losses)
    by_norm = weight.norm(dim=0).argsort(descending=True)[:keep]
    unfitted = torch.zeros_like(weight)
    unfitted[:, by_norm] = weight[:, by_norm]
    assert found <= objective(gram, weight.T, unfitted.T)


def test_keeping_fewer_keeps_a_part_and_costs_more():
    gram, weight = problem(150, 400)
    results = [eliminate(gram, weight, keep) for keep in (150, 149, 100, 86, 40, 1)]
    for more, fewer in pairwise(results):
        assert set(fewer.kept) < set(more.kept)
        assert 0 <= more.relative_error < fewer.relative_error < 1
    assert results[0].loss == 0
    assert_close(results[0].weight, weight)


def test_the_relative_error_compares_with_removing_everything():
    gram, weight = problem(40, 100)
    found = eliminate(gram, weight, 10)
    assert found.relative_error == pytest.approx(found.loss / objective(gram, weight.T, torch.zeros_like(weight.T)))


def test_elimination_is_deterministic():
    gram, weight = problem(150, 40)
    first, second = eliminate(gram, weight, 50), eliminate(gram.clone(), weight.clone(), 50)
    assert first.kept == second.kept
    assert torch.equal(first.weight, second.weight)


def test_arguments_are_left_as_they_were():
    gram, weight = problem(100, 300)
    before = gram.clone(), weight.clone()
    eliminate(gram, weight, 20)
    assert torch.equal(gram, before[0])
    assert torch.equal(weight, before[1])


def test_dead_channels_go_first_and_leave_the_others_alone():
    generator = torch.Generator().manual_seed(0)
    activations = torch.randn(500, 96, generator=generator, dtype=torch.float64)
    dead = torch.arange(0, 96, 3)
    activations[:, dead] = 0
    weight = torch.randn(12, 96, generator=generator, dtype=torch.float64)
    found = eliminate(damped(activations.T @ activations, 0.01), weight, 64)
    assert set(found.kept).isdisjoint(dead.tolist())
    assert_close(found.weight, weight[:, list(found.kept)], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_few_tokens_give_finite_weights_that_reproduce_them(tokens):
    generator = torch.Generator().manual_seed(0)
    activations = torch.randn(tokens, 80, generator=generator)
    weight = torch.randn(12, 80, generator=generator)
    found = eliminate(damped(activations.T @ activations, 1e-6), weight, 40)
    assert len(found.kept) == 40
    assert found.weight.isfinite().all()
    assert 0 <= found.relative_error <= 1
    assert_close(
        activations[:, list(found.kept)].double() @ found.weight.T,
        (activations @ weight.T).double(),
        rtol=0,
        atol=1e-2,
    )


def test_without_a_token_the_weights_stay_and_the_smallest_go():
    weight = torch.randn(12, 80, generator=torch.Generator().manual_seed(0))
    found = eliminate(damped(torch.zeros(80, 80), 0.01), weight, 30)
    assert set(found.kept) == set(weight.norm(dim=0).argsort(descending=True)[:30].tolist())
    assert_close(found.weight.float(), weight[:, list(found.kept)])


def test_weights_of_zero_lose_nothing():
    gram, weight = problem(40, 100)
    found = eliminate(gram, torch.zeros_like(weight), 10)
    assert (len(found.kept), found.loss, found.relative_error) == (10, 0, 0)


def test_damping_is_relative_to_the_mean_of_the_diagonal():
    gram = torch.diag(torch.tensor([1.0, 2.0, 6.0]))
    assert_close(damped(gram, 0.1), torch.diag(torch.tensor([1.3, 2.3, 6.3], dtype=torch.float64)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("width", [1, 2, 7, 64, 100, 1023, 1536, 14336])
@pytest.mark.parametrize("multiple", [None, 1, 3, 64])
@pytest.mark.parametrize("ratio", [0.001, 0.1, 0.3, 0.5, 0.75, 0.999])
def test_kept_widths_are_the_nearest_multiple_but_never_none_nor_all(width, multiple, ratio):
    step = Osscar(ratio=ratio, multiple_of=multiple)
    possible = [kept for kept in range(1, width) if kept % (multiple or 1) == 0]
    if not possible:
        with pytest.raises(RecipeError, match=r"Lower multiple_of|width"):
            step.kept_width(width)
        return
    kept = step.kept_width(width)
    assert kept in possible
    if multiple is not None:
        assert abs(kept - width * (1 - ratio)) <= min(abs(other - width * (1 - ratio)) for other in possible) + 1e-9
    elif width >= 1024:
        assert kept % 64 == 0
    assert step.foresee(Shape(5, width)) == Shape(5, kept)


@pytest.mark.parametrize(
    "options",
    [
        {"ratio": 0.0},
        {"ratio": 1.0},
        {"ratio": -0.1},
        {"ratio": 0.2, "multiple_of": 0},
        {"ratio": 0.2, "damping": 0.0},
        {"ratio": 0.2, "damping": -1.0},
        {"ratio": 0.2, "step": 0},
        {"ratio": float("nan")},
        {"ratio": 0.2, "damping": float("nan")},
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused(options):
    with pytest.raises(RecipeError, match="osscar has"):
        Osscar(**options)


@pytest.mark.parametrize("name", ["llama", "gemma3", "opt"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_each_layer_is_decided_by_the_stream_of_the_layers_cut_before_it(name, padded, plugins):
    model = tiny.model(name)
    family = find_family(model.config, plugins.families)
    windows = tiny.windows(5, padded=padded)
    step = Osscar(ratio=0.5)
    path = family.feed_forward.output
    dense = copy.deepcopy(model)
    for index, decision in enumerate(step.decide(model, family, windows, Progress())):
        linear = family.linear(family.layers_of(model)[index], path)
        grams, means = [], []
        for whose in (model, dense):
            seen: list[Tensor] = []
            module = family.linear(family.layers_of(whose)[index], path).module
            handle = module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].flatten(0, -2)))
            conformance.logits(whose, windows)
            handle.remove()
            rows = seen[0][windows.mask.flatten()].double()
            means.append(rows.mean(0))
            rows = rows if linear.bias is None else rows - rows.mean(0)
            grams.append(rows.T @ rows)
        expected = eliminate(damped(grams[0], step.damping), linear.weight.detach(), tiny.WIDTH // 2)
        assert decision.cuts == Cuts(channels={index: expected.kept})
        name = f"{family.layers}.{index}.{path}"
        assert model.get_parameter(f"{name}.weight") is linear.module.weight
        assert_close(decision.weights[f"{name}.weight"], expected.weight, rtol=1e-3, atol=1e-4)
        if linear.bias is not None:  # the mean output stays what it was
            before = linear.weight.double() @ means[0] + linear.bias
            after = expected.weight @ means[0][list(expected.kept)] + decision.weights[f"{name}.bias"]
            assert_close(after, before, rtol=1e-3, atol=1e-4)
        assert decision.evidence["layer"] == index
        assert decision.evidence["width"] == tiny.WIDTH // 2
        assert decision.evidence["relative_error"] == pytest.approx(expected.relative_error, rel=1e-3)
        assert index == 0 or not torch.allclose(grams[0], grams[1], rtol=0.01)
        surgery.carry_out(model, family, decision)
    assert index == tiny.LAYERS - 1


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_osscar_stays_closer_to_the_dense_model_than_random_channels_do(name, plugins):
    dense = tiny.model(name)
    family = find_family(dense.config, plugins.families)
    calibration, held_out = tiny.windows(60), tiny.windows(20, seed=1)
    wanted = conformance.logits(dense, held_out)

    def distance(model) -> float:
        return (conformance.logits(model, held_out) - wanted).square().mean().item()

    model = copy.deepcopy(dense)
    conformance.pruned(Osscar(ratio=0.25), model, family, calibration, plugins)
    at_random = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        drawn = [
            torch.randperm(tiny.WIDTH, generator=generator)[:48].sort().values.tolist() for _ in range(tiny.LAYERS)
        ]
        other = copy.deepcopy(dense)
        conformance.cut(other, family, Cuts(channels=dict(enumerate(drawn))))
        at_random.append(distance(other))
    assert distance(model) < 0.7 * min(at_random)


def test_weights_that_are_not_finite_are_named_as_the_cause(plugins):
    model = tiny.model("llama")
    family = find_family(model.config, plugins.families)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 3] = torch.nan
    with pytest.raises(NumericalError, match=r"layer 2 .*not finite"):
        conformance.pruned(Osscar(ratio=0.25), model, family, tiny.windows(), plugins)


@pytest.mark.parametrize("seed", range(5))
def test_swaps_lower_the_loss_and_never_raise_it(seed):
    gram, weight = problem(40, 60, seed=seed)
    losses = [eliminate(gram, weight, 12, step=40, swaps=swaps).loss for swaps in (0, 1, 2, 4, 100)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("seed", range(5))
def test_the_local_search_ends_where_no_swap_of_the_cheapest_helps(seed):
    """By brute force: every channel outside in place of the cheapest inside."""
    gram, weight = problem(24, 60, seed=seed)
    kept = eliminate(gram, weight, 10, step=24, swaps=1000).kept
    loss = refit(gram, weight.T, torch.tensor(kept))[1]
    cheapest = min(kept, key=lambda j: refit(gram, weight.T, torch.tensor([k for k in kept if k != j]))[1])
    for other in set(range(24)) - set(kept):
        swapped = sorted({*kept, other} - {cheapest})
        assert refit(gram, weight.T, torch.tensor(swapped))[1] >= loss * (1 - 1e-8)


def test_one_shot_is_close_to_the_greedy_and_above_it():
    gram, weight = problem(200, 400)
    greedy, ranked = eliminate(gram, weight, 160), eliminate(gram, weight, 160, step=200)
    naive = (weight.T.square().sum(1) / torch.linalg.inv(gram).diagonal()).topk(160).indices
    assert ranked.kept == tuple(sorted(naive.tolist()))
    assert greedy.loss <= ranked.loss < 1.5 * greedy.loss


@pytest.mark.parametrize("name", ["opt", "gpt2-wide", "gpt_neox"])
def test_the_bias_takes_over_the_mean_of_what_is_lost(name, plugins):
    """Better than the same cut whose bias stays."""
    model = tiny.model(name)
    family = find_family(model.config, plugins.families)
    windows = tiny.windows(8)
    expected = conformance.logits(model, windows)
    errors = []
    for with_bias in (True, False):
        cut = copy.deepcopy(model)
        for decision in Osscar(ratio=0.5).decide(cut, family, windows, Progress()):
            weights = {name: value for name, value in decision.weights.items() if with_bias or "bias" not in name}
            assert len(decision.weights) == 2
            surgery.carry_out(cut, family, Decision(decision.cuts, weights))
        errors.append((conformance.logits(cut, windows) - expected).square().mean())
    assert errors[0] < errors[1]

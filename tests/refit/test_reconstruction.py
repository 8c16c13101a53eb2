from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import tiny
import torch
from torch import Tensor
from torch.testing import assert_close

from optimum_prune import Calibration, Decoder, DecoderLayer, Windows
from optimum_prune.anatomy.linear import Linear
from optimum_prune.anatomy.shape import ATTENTION, FEED_FORWARD
from optimum_prune.calibration.statistics import Gram
from optimum_prune.calibration.visit import LayerVisit
from optimum_prune.errors import NumericalError
from optimum_prune.refit.reconstruction import ProjectionTarget, axis_in_front, moved, refitted

PLAIN = ("llama", "llama-tied", "qwen3", "phi3", "glm", "cohere", "gpt2", "gpt_neox", "gpt_neox-sequential", "opt")
"""Families that add what the FFN's output projection puts out to the hidden states as it is."""
NORMED = ("gemma2", "gemma3", "glm4", "opt-post-norm")
"""Families with a norm behind it."""
WINDOWS = tiny.windows(12)
TINY = 1e-7
"""Damping that does not show."""


def visited(decoder: Decoder, windows: Windows, index: int = 2) -> LayerVisit:
    for visit in Calibration(windows).walk(decoder, ""):
        if visit.index == index:
            return visit
    raise AssertionError(index)


def output_of(layer: DecoderLayer, block: str = FEED_FORWARD) -> Linear:
    """The output projection of a block."""
    return layer.linear_of(layer.output_of(block))


def outputs(visit: LayerVisit, layer: DecoderLayer) -> list[Tensor]:
    """Hidden states behind a layer in the place of the visited one, batch by batch."""
    with torch.no_grad():
        return [batch.run(layer.module, visit.index, hidden) for batch, hidden in visit.stream]


def attended(visit: LayerVisit, layer: DecoderLayer) -> list[Tensor]:
    """Hidden states behind the attention of a layer in the place of the visited one, likewise."""
    return LayerVisit(layer, visit.stream).behind(ATTENTION)


def copied(visit: LayerVisit) -> DecoderLayer:
    """A copy of the visited layer."""
    return replace(visit.layer, module=copy.deepcopy(visit.layer.module))


def with_output(visit: LayerVisit, weight: Tensor, bias: Tensor | None) -> DecoderLayer:
    """A copy of the visited layer whose FFN has another output projection."""
    layer = copied(visit)
    linear = output_of(layer)
    with torch.no_grad():
        linear.module.weight.copy_(linear.stored(weight))
        if bias is not None:
            linear.module.bias.copy_(bias)
    return layer


def other_projection(visit: LayerVisit, seed: int = 0) -> tuple[Tensor, Tensor | None]:
    linear = output_of(visit.layer)
    generator = torch.Generator().manual_seed(seed)
    weight = linear.weight.detach() + 0.1 * torch.randn(linear.weight.shape, generator=generator)
    bias = None if linear.bias is None else linear.bias.detach() + torch.randn(linear.bias.shape, generator=generator)
    return weight, bias


def observed(visit: LayerVisit) -> Gram:
    """The gram of the inputs of the FFN's output projection."""
    return visit.gram(axis_in_front(visit, FEED_FORWARD))


def target_of(
    visit: LayerVisit, gram: Gram, goal: list[Tensor], damping: float = TINY, strength: float = 1.0
) -> ProjectionTarget | None:
    return moved(visit, axis_in_front(visit, FEED_FORWARD), gram, goal, damping, strength)


def squared_error(windows: Windows, wanted: list[Tensor], found: list[Tensor]) -> float:
    return (torch.cat(wanted) - torch.cat(found))[windows.mask].double().square().sum().item()


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_a_goal_that_other_weights_reach_is_reached(name, decoder, padded):
    windows = tiny.windows(12, padded=padded)
    visit = visited(decoder, windows)
    weight, bias = other_projection(visit)
    goal = outputs(visit, with_output(visit, weight, bias))
    target = target_of(visit, observed(visit), goal)
    assert_close(target.weight.float(), weight, rtol=0, atol=1e-2)
    found = outputs(visit, with_output(visit, target.weight, target.bias))
    assert_close(torch.cat(found)[windows.mask], torch.cat(goal)[windows.mask], rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", PLAIN)
def test_where_the_goal_is_out_of_reach_least_squares_come_as_near_as_can_be(name, decoder):
    visit = visited(decoder, WINDOWS)
    generator = torch.Generator().manual_seed(0)
    now = outputs(visit, visit.layer)
    goal = [hidden + torch.randn(hidden.shape, generator=generator) for hidden in now]
    target = target_of(visit, observed(visit), goal)
    rows = torch.cat([channels for channels, _ in visit.outputs(FEED_FORWARD)]).double()
    lack = (torch.cat(goal) - torch.cat(now)).flatten(0, -2).double()
    if target.bias is not None:
        rows = torch.cat([rows, torch.ones(len(rows), 1)], 1)
    best = torch.linalg.lstsq(rows, lack).solution
    found = squared_error(WINDOWS, goal, outputs(visit, with_output(visit, target.weight, target.bias)))
    assert found == pytest.approx((lack - rows @ best).square().sum().item(), rel=1e-3)


@pytest.mark.parametrize("name", PLAIN)
def test_strength_goes_a_straight_way_from_nothing_to_all(name, decoder):
    visit = visited(decoder, WINDOWS)
    weight, bias = other_projection(visit)
    goal = outputs(visit, with_output(visit, weight, bias))
    gram = observed(visit)
    none, half, full = (target_of(visit, gram, goal, 0.1, strength) for strength in (0.0, 0.5, 1.0))
    linear = output_of(visit.layer)
    assert_close(none.weight, linear.weight.double(), rtol=0, atol=0)
    assert_close(half.weight, (none.weight + full.weight) / 2)
    assert not torch.allclose(full.weight, none.weight, atol=1e-3)
    if linear.bias is not None:
        assert_close(none.bias, linear.bias.double(), rtol=0, atol=0)
        assert_close(half.bias, (none.bias + full.bias) / 2)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt"])
@pytest.mark.parametrize("damping", [TINY, 0.1, 100.0])
def test_a_bias_takes_a_constant_shift_whatever_the_damping(name, decoder, damping):
    visit = visited(decoder, tiny.windows(12, padded=True))
    linear = output_of(visit.layer)
    shift = torch.linspace(-1, 1, len(linear.bias))
    goal = [hidden + shift for hidden in outputs(visit, visit.layer)]
    target = target_of(visit, observed(visit), goal, damping)
    assert_close(target.bias.float(), linear.bias.detach() + shift, rtol=0, atol=1e-3)
    assert_close(target.weight.float(), linear.weight.detach(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "opt"])
def test_more_damping_stays_nearer_to_the_old_weights_and_never_makes_it_worse(name, decoder):
    windows = tiny.windows(12, padded=True)
    visit = visited(decoder, windows)
    generator = torch.Generator().manual_seed(0)
    now = outputs(visit, visit.layer)
    goal = [hidden + hidden.roll(1, -1) + torch.randn(hidden.shape, generator=generator) for hidden in now]
    gram, old = observed(visit), output_of(visit.layer).weight
    errors, distances = [], []
    for damping in (TINY, 0.01, 0.1, 1.0, 100.0):
        target = target_of(visit, gram, goal, damping)
        errors.append(squared_error(windows, goal, outputs(visit, with_output(visit, target.weight, target.bias))))
        distances.append((target.weight - old).norm().item())
    assert errors == sorted(errors)
    assert distances == sorted(distances, reverse=True)
    assert errors[-1] <= squared_error(windows, goal, now)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_what_is_padding_does_not_matter(name, decoder):
    windows = tiny.windows(12, padded=True)
    visit = visited(decoder, windows)
    weight, bias = other_projection(visit)
    goal = outputs(visit, with_output(visit, weight, bias))
    gram = observed(visit)
    expected = target_of(visit, gram, goal, 0.1)
    for (batch, _), wanted in zip(visit.stream, goal, strict=True):
        wanted[~batch.mask] = 1e6
    found = target_of(visit, gram, goal, 0.1)
    assert torch.equal(found.weight, expected.weight)


@pytest.mark.parametrize("name", NORMED)
def test_a_projection_with_a_norm_behind_it_stays_as_it_is(name, decoder):
    visit = visited(decoder, WINDOWS)
    goal = [2 * hidden for hidden in outputs(visit, visit.layer)]
    assert target_of(visit, observed(visit), goal, 0.1) is None
    assert refitted(visited(decoder, WINDOWS), FEED_FORWARD, goal, 0.1) == {}


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("block", [ATTENTION, FEED_FORWARD])
def test_what_is_not_moved_is_to_compute_what_it_computes(name, decoder, block):
    for layer in decoder.layers:
        projection = layer.projection(layer.output_of(block))
        targets = [ProjectionTarget.of(projection, group) for group in range(len(projection.maps))]
        stored = layer.module.get_parameter(projection.name)
        found = projection.stored([target.weight for target in targets], targets[0].bias)
        assert torch.equal(found.pop(projection.name), stored)
        if projection.bias is not None:
            assert torch.equal(*found.values(), projection.bias)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_attention_reaches_what_another_output_projection_of_it_reaches(name, decoder, padded):
    windows = tiny.windows(12, padded=padded)
    visit = visited(decoder, windows)
    changed = copied(visit)
    linear = output_of(changed, ATTENTION)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in linear.module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    goal = attended(visit, changed)
    before = squared_error(windows, goal, attended(visit, visit.layer))
    found = refitted(visit, ATTENTION, goal, TINY)
    prefix = f"{visit.layer.prefix}{decoder.family.attention_output}."
    assert {name.removeprefix(prefix) for name in found} == {name for name, _ in linear.module.named_parameters()}
    with torch.no_grad():
        for name, value in found.items():
            linear.module.get_parameter(name.removeprefix(prefix)).copy_(value)
    assert before > 1
    assert squared_error(windows, goal, attended(visit, changed)) < 1e-4 * before


@pytest.mark.parametrize("name", PLAIN)
def test_hidden_states_behind_attention_are_those_before_the_layer_and_what_attention_puts_out(name, decoder):
    visit = visited(decoder, WINDOWS)
    seen: list[Tensor] = []
    module = visit.layer.part(decoder.family.attention)
    handle = module.register_forward_hook(lambda _, __, output: seen.append(output[0]))
    outputs(visit, visit.layer)
    handle.remove()
    for (_, hidden), put_out, found in zip(visit.stream, seen, visit.behind(ATTENTION), strict=True):
        assert_close(found, hidden + put_out)


@pytest.mark.parametrize("name", NORMED)
def test_attention_with_a_norm_behind_it_stays_as_it_is(name, decoder):
    visit = visited(decoder, WINDOWS)
    goal = [2 * hidden for hidden in attended(visit, visit.layer)]
    assert refitted(visit, ATTENTION, goal, 0.1) == {}


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_moving_changes_nothing_by_itself(name, decoder):
    before = {key: value.clone() for key, value in decoder.model.state_dict().items()}
    visit = visited(decoder, WINDOWS)
    weight, bias = other_projection(visit)
    target_of(visit, observed(visit), outputs(visit, with_output(visit, weight, bias)))
    assert all(torch.equal(value, before[key]) for key, value in decoder.model.state_dict().items())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_new_weights_have_the_names_and_shapes_of_the_old(name, decoder):
    visit = visited(decoder, WINDOWS)
    linear = output_of(visit.layer)
    path = f"{visit.layer.prefix}{decoder.family.feed_forward.output}"
    weights = refitted(visit, FEED_FORWARD, [2 * hidden for hidden in outputs(visit, visit.layer)], TINY)
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == {
        f"{path}.{name}": tuple(parameter.shape) for name, parameter in linear.module.named_parameters()
    }
    assert not any(weight.requires_grad for weight in weights.values())


@pytest.mark.parametrize("name", ["llama"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_and_goals_that_are_not_finite_are_named(name, decoder, value):
    visit = visited(decoder, WINDOWS)
    goal = outputs(visit, visit.layer)
    with torch.no_grad():
        visit.layer.module.mlp.down_proj.weight[3, 3] = value
    with pytest.raises(NumericalError, match=r"layer 2 .* not finite"):
        target_of(visit, observed(visit), goal)

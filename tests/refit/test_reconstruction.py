from __future__ import annotations

import copy

import pytest
import tiny
import torch
from torch import Tensor
from torch.testing import assert_close

from optimum_prune import Calibration, Progress, layerwise
from optimum_prune.errors import NumericalError
from optimum_prune.layerwise import Visit
from optimum_prune.reconstruction import Aim, moved, observed_channels, refitted

PLAIN = ("llama", "llama-tied", "qwen3", "phi3", "glm", "cohere", "gpt2", "gpt_neox", "gpt_neox-sequential", "opt")
"""Families that add what the FFN's output projection puts out to the hidden states as it is."""
NORMED = ("gemma2", "gemma3", "glm4", "opt-post-norm")
"""Families with a norm behind it."""
WINDOWS = tiny.windows(12)
TINY = 1e-7
"""Damping that does not show."""


def visited(model, family, windows: Calibration, index: int = 2) -> Visit:
    for visit in layerwise.walk(model, family, windows, Progress(), ""):
        if visit.index == index:
            return visit
    raise AssertionError(index)


def outputs(visit: Visit, layer) -> list[Tensor]:
    """Hidden states behind a layer in the place of the visited one, batch by batch."""
    with torch.no_grad():
        return [batch.run(layer, visit.index, hidden) for batch, hidden in visit.stream]


def attended(visit: Visit, family, layer) -> list[Tensor]:
    """Hidden states behind the attention of a layer in the place of the visited one, likewise."""
    return Visit(visit.index, layer, family, visit.stream).attended()


def with_output(visit: Visit, family, weight: Tensor, bias: Tensor | None):
    """A copy of the visited layer whose FFN has another output projection."""
    layer = copy.deepcopy(visit.layer)
    linear = family.linear(layer, family.feed_forward.output)
    with torch.no_grad():
        linear.module.weight.copy_(linear.stored(weight))
        if bias is not None:
            linear.module.bias.copy_(bias)
    return layer


def other_projection(visit: Visit, family, seed: int = 0) -> tuple[Tensor, Tensor | None]:
    linear = family.linear(visit.layer, family.feed_forward.output)
    generator = torch.Generator().manual_seed(seed)
    weight = linear.weight.detach() + 0.1 * torch.randn(linear.weight.shape, generator=generator)
    bias = None if linear.bias is None else linear.bias.detach() + torch.randn(linear.bias.shape, generator=generator)
    return weight, bias


def aimed(visit: Visit, family, goal: list[Tensor], damping: float = TINY, strength: float = 1.0) -> Aim:
    return moved(visit, family, observed_channels(visit, family), goal, damping, strength)


def squared_error(windows: Calibration, wanted: list[Tensor], found: list[Tensor]) -> float:
    return (torch.cat(wanted) - torch.cat(found))[windows.mask].double().square().sum().item()


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_a_goal_that_other_weights_reach_is_reached(name, subject, padded):
    model, family = subject
    windows = tiny.windows(12, padded=padded)
    visit = visited(model, family, windows)
    weight, bias = other_projection(visit, family)
    goal = outputs(visit, with_output(visit, family, weight, bias))
    aim = aimed(visit, family, goal)
    assert_close(aim.weight.float(), weight, rtol=0, atol=1e-2)
    found = outputs(visit, with_output(visit, family, aim.weight, aim.bias))
    assert_close(torch.cat(found)[windows.mask], torch.cat(goal)[windows.mask], rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", PLAIN)
def test_where_the_goal_is_out_of_reach_least_squares_come_as_near_as_can_be(name, subject):
    model, family = subject
    visit = visited(model, family, WINDOWS)
    generator = torch.Generator().manual_seed(0)
    now = outputs(visit, visit.layer)
    goal = [hidden + torch.randn(hidden.shape, generator=generator) for hidden in now]
    gram = observed_channels(visit, family)
    aim = moved(visit, family, gram, goal, TINY, 1.0)
    rows = torch.cat([channels for channels, _ in visit.outputs()]).double()
    lack = (torch.cat(goal) - torch.cat(now)).flatten(0, -2).double()
    if aim.bias is not None:
        rows = torch.cat([rows, torch.ones(len(rows), 1)], 1)
    best = torch.linalg.lstsq(rows, lack).solution
    found = squared_error(WINDOWS, goal, outputs(visit, with_output(visit, family, aim.weight, aim.bias)))
    assert found == pytest.approx((lack - rows @ best).square().sum().item(), rel=1e-3)


@pytest.mark.parametrize("name", PLAIN)
def test_strength_goes_a_straight_way_from_nothing_to_all(name, subject):
    model, family = subject
    visit = visited(model, family, WINDOWS)
    weight, bias = other_projection(visit, family)
    goal = outputs(visit, with_output(visit, family, weight, bias))
    gram = observed_channels(visit, family)
    none, half, full = (moved(visit, family, gram, goal, 0.1, strength) for strength in (0.0, 0.5, 1.0))
    linear = family.linear(visit.layer, family.feed_forward.output)
    assert_close(none.weight, linear.weight.double(), rtol=0, atol=0)
    assert_close(half.weight, (none.weight + full.weight) / 2)
    assert not torch.allclose(full.weight, none.weight, atol=1e-3)
    if linear.bias is not None:
        assert_close(none.bias, linear.bias.double(), rtol=0, atol=0)
        assert_close(half.bias, (none.bias + full.bias) / 2)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt"])
@pytest.mark.parametrize("damping", [TINY, 0.1, 100.0])
def test_a_bias_takes_a_constant_shift_whatever_the_damping(name, subject, damping):
    model, family = subject
    visit = visited(model, family, tiny.windows(12, padded=True))
    linear = family.linear(visit.layer, family.feed_forward.output)
    shift = torch.linspace(-1, 1, len(linear.bias))
    goal = [hidden + shift for hidden in outputs(visit, visit.layer)]
    aim = aimed(visit, family, goal, damping)
    assert_close(aim.bias.float(), linear.bias.detach() + shift, rtol=0, atol=1e-3)
    assert_close(aim.weight.float(), linear.weight.detach(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "opt"])
def test_more_damping_stays_nearer_to_the_old_weights_and_never_makes_it_worse(name, subject):
    model, family = subject
    windows = tiny.windows(12, padded=True)
    visit = visited(model, family, windows)
    generator = torch.Generator().manual_seed(0)
    now = outputs(visit, visit.layer)
    goal = [hidden + hidden.roll(1, -1) + torch.randn(hidden.shape, generator=generator) for hidden in now]
    gram = observed_channels(visit, family)
    old = family.linear(visit.layer, family.feed_forward.output).weight
    errors, distances = [], []
    for damping in (TINY, 0.01, 0.1, 1.0, 100.0):
        aim = moved(visit, family, gram, goal, damping, 1.0)
        errors.append(squared_error(windows, goal, outputs(visit, with_output(visit, family, aim.weight, aim.bias))))
        distances.append((aim.weight - old).norm().item())
    assert errors == sorted(errors)
    assert distances == sorted(distances, reverse=True)
    assert errors[-1] <= squared_error(windows, goal, now)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_what_is_padding_does_not_matter(name, subject):
    model, family = subject
    windows = tiny.windows(12, padded=True)
    visit = visited(model, family, windows)
    weight, bias = other_projection(visit, family)
    goal = outputs(visit, with_output(visit, family, weight, bias))
    gram = observed_channels(visit, family)
    expected = moved(visit, family, gram, goal, 0.1, 1.0)
    for (batch, _), wanted in zip(visit.stream, goal, strict=True):
        wanted[~batch.mask] = 1e6
    found = moved(visit, family, gram, goal, 0.1, 1.0)
    assert torch.equal(found.weight, expected.weight)


@pytest.mark.parametrize("name", NORMED)
def test_a_projection_with_a_norm_behind_it_stays_as_it_is(name, subject):
    model, family = subject
    visit = visited(model, family, WINDOWS)
    goal = [2 * hidden for hidden in outputs(visit, visit.layer)]
    aim = aimed(visit, family, goal, 0.1)
    linear = family.linear(visit.layer, family.feed_forward.output)
    assert torch.equal(aim.weight, linear.weight)
    assert (aim.bias is None) == (linear.bias is None)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_attention_reaches_what_another_output_projection_of_it_reaches(name, subject, padded):
    model, family = subject
    windows = tiny.windows(12, padded=padded)
    visit = visited(model, family, windows)
    changed = copy.deepcopy(visit.layer)
    linear = family.linear(changed, family.attention_output)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in linear.module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    goal = attended(visit, family, changed)
    before = squared_error(windows, goal, attended(visit, family, visit.layer))
    found = refitted(visit, family, goal, TINY, family.attention_output)
    prefix = f"{family.layers}.{visit.index}.{family.attention_output}."
    assert {name.removeprefix(prefix) for name in found} == {name for name, _ in linear.module.named_parameters()}
    with torch.no_grad():
        for name, value in found.items():
            linear.module.get_parameter(name.removeprefix(prefix)).copy_(value)
    assert before > 1
    assert squared_error(windows, goal, attended(visit, family, changed)) < 1e-4 * before


@pytest.mark.parametrize("name", PLAIN)
def test_hidden_states_behind_attention_are_those_before_the_layer_and_what_attention_puts_out(name, subject):
    model, family = subject
    visit = visited(model, family, WINDOWS)
    seen: list[Tensor] = []
    module = family.module(visit.layer, family.attention)
    handle = module.register_forward_hook(lambda _, __, output: seen.append(output[0]))
    outputs(visit, visit.layer)
    handle.remove()
    for (_, hidden), put_out, found in zip(visit.stream, seen, visit.attended(), strict=True):
        assert_close(found, hidden + put_out)


@pytest.mark.parametrize("name", NORMED)
def test_attention_with_a_norm_behind_it_stays_as_it_is(name, subject):
    model, family = subject
    visit = visited(model, family, WINDOWS)
    goal = [2 * hidden for hidden in attended(visit, family, visit.layer)]
    assert refitted(visit, family, goal, 0.1, family.attention_output) == {}


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_moving_changes_nothing_by_itself(name, subject):
    model, family = subject
    before = {key: value.clone() for key, value in model.state_dict().items()}
    visit = visited(model, family, WINDOWS)
    weight, bias = other_projection(visit, family)
    aimed(visit, family, outputs(visit, with_output(visit, family, weight, bias)))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_new_weights_have_the_names_and_shapes_of_the_old(name, subject):
    model, family = subject
    visit = visited(model, family, WINDOWS)
    linear = family.linear(visit.layer, family.feed_forward.output)
    path = f"{family.layers}.{visit.index}.{family.feed_forward.output}"
    weights = aimed(visit, family, [2 * hidden for hidden in outputs(visit, visit.layer)]).whole(path, linear)
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == {
        f"{path}.{name}": tuple(parameter.shape) for name, parameter in linear.module.named_parameters()
    }
    assert not any(weight.requires_grad for weight in weights.values())


@pytest.mark.parametrize("name", ["llama"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_and_goals_that_are_not_finite_are_named(name, subject, value):
    model, family = subject
    visit = visited(model, family, WINDOWS)
    goal = outputs(visit, visit.layer)
    with torch.no_grad():
        visit.layer.mlp.down_proj.weight[3, 3] = value
    with pytest.raises(NumericalError, match=r"layer 2 .* not finite"):
        aimed(visit, family, goal)

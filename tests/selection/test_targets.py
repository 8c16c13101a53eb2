from __future__ import annotations

import math

import pytest
import tiny
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_prune import AxisShape, Decoder, LayerShape, Osscar, Shape
from optimum_prune import testing as conformance
from optimum_prune.anatomy.shape import ATTENTION, FEED_FORWARD
from optimum_prune.errors import RecipeError
from optimum_prune.selection.targets import Target


def with_axis(units: int, *, groups: int, multiple: int) -> AxisShape:
    return AxisShape("channels", units, FEED_FORWARD, groups=groups, multiple=multiple)


@pytest.mark.parametrize("width", [1, 2, 7, 8, 24, 64, 100, 1023, 1536, 14336])
@pytest.mark.parametrize("multiple", [None, 1, 3, 64])
@pytest.mark.parametrize("ratio", [0.001, 0.1, 0.3, 0.5, 0.75, 0.999])
@pytest.mark.parametrize("experts", [False, True], ids=["FFN", "experts"])
def test_kept_widths_are_the_nearest_multiple_but_never_none_nor_all(width, multiple, ratio, experts):
    step = Osscar(ratio=ratio, multiple_of=multiple)
    axis = with_axis(width, groups=4 if experts else 0, multiple=8 if experts else 1)
    shape = Shape((LayerShape((axis,)),) * 5)
    least = math.lcm(multiple or 1, 8 if experts else 1)
    possible = [kept for kept in range(1, width) if kept % least == 0]
    if not possible:
        with pytest.raises(RecipeError, match=r"Lower multiple_of|width"):
            step.foresee(shape)
        return
    (kept,) = {layer.units("channels") for layer in step.foresee(shape).layers}
    assert kept in possible
    if multiple is not None:
        assert abs(kept - width * (1 - ratio)) <= min(abs(other - width * (1 - ratio)) for other in possible) + 1e-9
    elif width >= 1024:
        assert kept % 64 == 0


@pytest.mark.parametrize("width", [24, 64, 100, 1023, 1536, 14336])
@pytest.mark.parametrize("multiple", [None, 1, 3])
def test_of_a_layer_whole_or_narrowed_the_width_is_a_multiple_of_the_least(width, multiple):
    target = Target("osscar", FEED_FORWARD, multiple_of=multiple)
    axes = (with_axis(width, groups=0, multiple=1), with_axis(width + 8, groups=0, multiple=1))
    shape = Shape(tuple(LayerShape((axis,)) for axis in axes))
    least = target.least(shape)["channels"]
    for axis in axes:
        assert axis.units % least == 0
        assert target.kept(axis, 0.3) % least == 0


@pytest.mark.parametrize("name", tiny.WITHOUT_HEADS)
def test_heads_that_the_config_cannot_say_are_refused(name, decoder):
    with pytest.raises(RecipeError, match="cannot say that there are fewer heads"):
        Osscar(head_ratio=0.5).foresee(decoder.shape())


def test_heads_must_divide_the_hidden_size_where_the_config_insists(plugins):
    sizes = {**tiny.SIZES, "hidden_size": 48, "num_attention_heads": 8, "num_key_value_heads": 4}
    decoder = Decoder.of(LlamaForCausalLM(LlamaConfig(**sizes)), plugins.families)
    # With 2 query heads for each key-value head, 2, 4, 6 and 8 query heads all but the last divide 48 evenly.
    heads = decoder.shape().layers[0].axis_named("heads")
    assert heads.possible == tuple(heads for heads in (1, 2, 3, 4) if 48 % (2 * heads) == 0)
    sizes = {**sizes, "hidden_size": 40, "num_attention_heads": 10, "num_key_value_heads": 5}
    decoder = Decoder.of(LlamaForCausalLM(LlamaConfig(**sizes)).eval(), plugins.families)
    shape = decoder.shape()
    assert shape.layers[0].axis_named("heads").possible == (1, 2, 4, 5)
    with pytest.raises(RecipeError, match=r"keeps 3 of 5 key-value heads, .* allows 1, 2, 4"):
        Osscar(head_ratio=0.4).foresee(shape)
    conformance.pruned(Osscar(head_ratio=0.6), decoder, tiny.windows(2), plugins)
    config = decoder.config
    assert (config.num_key_value_heads, config.num_attention_heads, config.head_dim) == (2, 4, 4)


def test_no_fewer_heads_than_one_can_be_asked_for():
    single = Shape((LayerShape((AxisShape("heads", 1, ATTENTION),)),))
    with pytest.raises(RecipeError, match=r"allows no fewer. Leave head_ratio out"):
        Osscar(head_ratio=0.5).foresee(single)


@pytest.mark.parametrize("name", ["llama"])
@pytest.mark.parametrize(("ratio", "kept"), [(0.001, 1), (0.3, 1), (0.5, 1), (0.999, 1)])
def test_a_head_goes_and_a_head_stays_whatever_the_ratio(name, decoder, ratio, kept):
    assert {layer.units("heads") for layer in Osscar(head_ratio=ratio).foresee(decoder.shape()).layers} == {kept}


@pytest.mark.parametrize("name", ["llama", "gemma3-vision", "gpt2", "opt", "mixtral", "qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("options", [{}, {"multiple_of": 1}, {"head_ratio": 0.5}, {"protect": (0, 3)}], ids=str)
def test_no_other_width_comes_nearer_to_the_parameters_asked_for(name, decoder, options):
    shape = decoder.shape()
    if "head_ratio" in options and name in tiny.WITHOUT_HEADS:
        options = {}
    others = [Osscar(ratio=ratio / 200, **options).foresee(shape).parameters for ratio in range(1, 200)]
    low, high = min(others) / shape.parameters, max(others) / shape.parameters
    for part in (0.0, 0.2, 0.5, 0.77, 1.0):
        wanted = low + part * (high - low)
        found = Osscar(params=wanted, **options).foresee(shape).parameters
        nearest = min(abs(other - wanted * shape.parameters) for other in others)
        assert abs(found - wanted * shape.parameters) <= nearest + 1e-6

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from torch.testing import assert_close

from optimum_prune import Calibration
from optimum_prune.calibration.visit import LayerVisit
from optimum_prune.refit.reading import reread
from optimum_prune.surgery.operation import assign, sharing_copy

DAMPING = 0.01


def visits(decoder, windows, noise: float) -> tuple[LayerVisit, LayerVisit]:
    """Visits of a layer whose stream is not what it was, and of the same in the dense model."""
    calibration = Calibration(windows)
    stream = calibration.embed(decoder)
    torch.manual_seed(0)
    other = replace(decoder, model=sharing_copy(decoder.model).requires_grad_(False))
    changed = [(batch, hidden + noise * hidden.roll(1, -1)) for batch, hidden in stream]
    return LayerVisit(other.layer(2), changed), LayerVisit(decoder.layer(2), stream)


def read(visit: LayerVisit, parameter: str) -> torch.Tensor:
    """What a matrix makes of the stream of a visit."""
    module = visit.layer.part(parameter.rpartition(".")[0])
    rows = [batch.unpadded(each) for (batch, _), each in zip(visit.stream, visit.inputs_of(parameter), strict=True)]
    return module(torch.cat(rows))


@pytest.mark.parametrize(
    "name", ["llama", "qwen2", "qwen3", "gemma2", "gpt2", "gpt_neox", "opt", "phi3", "deepseek_v2"]
)
@pytest.mark.parametrize("block", ["attention", "feed_forward"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_what_a_block_reads_comes_nearer_to_what_it_read(name, block, padded, decoder):
    now, dense = visits(decoder, tiny.windows(8, padded=padded), 0.3)
    new = reread(now, dense, block, DAMPING, 1.0)
    prefix = now.layer.prefix
    parameters = [each.removeprefix(prefix) for each in new]
    assert parameters, "there is something that reads"
    assert not set(parameters) & set(now.layer.outputs_of(block))
    before = {each: (read(now, each), read(dense, each)) for each in parameters}
    assign(now.layer.module, {each.removeprefix(prefix): value for each, value in new.items()})
    for each, (was, wanted) in before.items():
        after = read(now, each)
        assert (after - wanted).norm() < 0.9 * (was - wanted).norm(), each


@pytest.mark.parametrize("name", ["llama"])
def test_where_nothing_changed_everything_stays(name, decoder):
    now, dense = visits(decoder, tiny.windows(4), 0.0)
    for block in ("attention", "feed_forward"):
        for name, value in reread(now, dense, block, DAMPING, 1.0).items():
            assert_close(value, decoder.model.get_parameter(name).detach())


@pytest.mark.parametrize("name", ["llama"])
def test_half_of_the_way_is_half(name, decoder):
    now, dense = visits(decoder, tiny.windows(4), 0.3)
    whole, half = (reread(now, dense, "attention", DAMPING, strength) for strength in (1.0, 0.5))
    for name, value in half.items():
        assert_close(value, (decoder.model.get_parameter(name).detach() + whole[name]) / 2)


@pytest.mark.parametrize("name", ["llama"])
def test_the_least_squares_are_those_of_torch(name, decoder):
    tiny.in_double(decoder.model)
    now, dense = visits(decoder, tiny.windows(8), 0.3)
    (name, *_) = new = reread(now, dense, "feed_forward", 1e-9, 1.0)
    path = name.removeprefix(now.layer.prefix)
    inputs = torch.cat([each.flatten(0, -2) for each in now.inputs_of(path)])
    bias = dense.layer.module.get_parameter(path.replace("weight", "bias")).detach()
    expected = torch.linalg.lstsq(inputs, read(dense, path) - bias).solution.T
    assert_close(new[name], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["mixtral"])
def test_experts_of_a_mixture_stay_as_they_are(name, decoder):
    now, dense = visits(decoder, tiny.windows(4), 0.3)
    assert reread(now, dense, "feed_forward", DAMPING, 1.0) == {}

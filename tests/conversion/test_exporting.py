"""What exporters have in common, shown with the one that needs torch alone."""

import copy

import pytest
import tiny
import torch

from optimum_prune.conversion.exporting import CachedRuntime, Limits, export, first_inputs, trace
from optimum_prune.evaluation.comparison import relative_difference

pytest.importorskip("transformers", minversion="5.23", reason="exporters are newer than the oldest transformers")
exporters = pytest.importorskip("transformers.exporters")
pytestmark = pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning")


class InTorch(CachedRuntime):
    def __init__(self, graph, traced, limits=None):
        self.graph, self.traced, self.limits = graph, traced, limits or Limits()

    def start(self, windows):
        return first_inputs(self.traced, torch.zeros(windows, 1, dtype=torch.long))[self.traced.cache]

    def step(self, tokens, before, cache):
        windows, length = tokens.shape
        inputs = {
            "input_ids": tokens,
            "attention_mask": torch.ones(windows, before + length, dtype=torch.long),
            "position_ids": torch.arange(before, before + length).repeat(windows, 1),
            self.traced.cache: copy.deepcopy(cache),
        }
        output = self.graph(**{name: inputs[name] for name in self.traced.inputs if name in inputs})
        return output.logits, output[self.traced.cache]


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def model(request):
    return tiny.model(request.param)


@pytest.fixture(scope="module")
def graph(model):
    traced = trace(model)
    return export(exporters.DynamoExporter(), traced, exporters.DynamoConfig()), traced


@pytest.mark.parametrize(("windows", "length"), [(1, 30), (3, 9)])
def test_one_graph_reads_any_batch_and_length_at_once_or_in_steps(windows, length, graph, model):
    tokens = tiny.windows(count=windows, length=length).tokens
    with torch.no_grad():
        expected = model(tokens).logits
    assert relative_difference(InTorch(*graph).logits(tokens), expected) < 1e-4
    in_steps = InTorch(*graph, Limits(windows=2, tokens=4))
    assert relative_difference(in_steps.logits(tokens), expected) < 1e-4


def test_generation_with_the_cache_is_that_of_the_model(graph, model):
    prompt = tiny.windows(count=1, length=12).tokens
    with torch.no_grad():
        expected = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False, eos_token_id=None
        )
    assert InTorch(*graph).generate(prompt[0], 8) == expected[0, 12:].tolist()


def test_every_axis_that_varies_is_open_and_no_other(model):
    traced = trace(model, masked=False, limits=Limits(windows=1, tokens=16, before=64))
    assert "attention_mask" not in traced.inputs
    assert traced.inputs["input_ids"].shape == (1, 2)
    assert traced.shapes["input_ids"][1].max == 16
    assert {axis[2].max for axis in traced.shapes[traced.cache]} == {64}

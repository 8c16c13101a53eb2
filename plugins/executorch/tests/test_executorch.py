import pytest
import tiny
import torch
from optimum_prune_executorch import ExecuTorch
from transformers import AutoTokenizer

from optimum_prune import load_model
from optimum_prune.errors import PassError, RecipeError
from optimum_prune.evaluation.comparison import relative_difference


@pytest.mark.parametrize(("name", "max_batch"), [("small", 1), ("heterogeneous", 3)])
def test_sizes_within_the_limits_compute_what_the_checkpoint_does(name, max_batch, request, convert, run_example):
    source, step = request.getfixturevalue(name), ExecuTorch(max_length=48, max_tokens=8, max_batch=max_batch)
    folder, made = convert(step, source)
    assert made.comparison.difference < 1e-4
    assert made.comparison.same_tokens == made.comparison.generated

    model, runtime = load_model(source), step.open(folder, "cpu")
    for windows, length in ((1, 1), (1, 40), (5, 11)):  # more than fits is read in several steps
        tokens = tiny.windows(count=windows, length=length, seed=2).tokens
        with torch.no_grad():
            expected = model(tokens).logits
        assert relative_difference(runtime.logits(tokens), expected) < 1e-4
    for windows in range(1, max_batch + 1):
        found, _ = runtime.step(tokens[:windows, :8], 0, runtime.start(windows))
        assert relative_difference(found, expected[:windows, :8]) < 1e-4
    with pytest.raises(PassError, match="larger max_length"):
        runtime.logits(tiny.windows(count=1, length=60).tokens)

    text = tiny.text(words=6)
    assert AutoTokenizer.from_pretrained(folder)(text) == AutoTokenizer.from_pretrained(source)(text)
    assert {"config.json", "generation_config.json", "model.pte"} <= {file.name for file in folder.iterdir()}
    assert run_example(folder, text).startswith(text)


@pytest.mark.parametrize("options", [{"max_batch": 0}, {"max_tokens": 1}, {"max_length": 4}])
def test_sizes_for_which_there_is_no_program_are_refused(options):
    with pytest.raises(RecipeError, match="Give a whole number of at least"):
        ExecuTorch(**options)


def test_a_cache_longer_than_the_model_is_refused(small, spec_of):
    with pytest.raises(RecipeError, match="max_length of at most"):
        ExecuTorch(max_length=1_000_000).check(spec_of(small))

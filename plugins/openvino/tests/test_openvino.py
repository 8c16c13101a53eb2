import openvino
import pytest
import tiny
import torch
from optimum_prune_openvino import OpenVino
from transformers import AutoTokenizer

from optimum_prune import load_model
from optimum_prune.errors import RecipeError
from optimum_prune.evaluation.comparison import relative_difference


def size(folder):
    return (folder / "openvino_model.bin").stat().st_size


@pytest.fixture(params=["small", "heterogeneous"])
def source(request):
    return request.getfixturevalue(request.param)


def test_any_batch_and_length_computes_what_the_checkpoint_does(source, convert, run_example):
    folder, made = convert(OpenVino(), source)
    assert made.comparison.difference < 1e-4
    assert made.comparison.same_tokens == made.comparison.generated

    model, runtime = load_model(source), OpenVino().open(folder, "cpu")
    computed_in = runtime.request.get_compiled_model().get_property("INFERENCE_PRECISION_HINT")
    assert computed_in == openvino.Type.f32  # where the processor has bfloat16, OpenVINO would take that
    for windows, length in ((1, 1), (1, 40), (5, 3)):
        tokens = tiny.windows(count=windows, length=length, seed=2).tokens
        with torch.no_grad():
            expected = model(tokens).logits
        assert relative_difference(runtime.logits(tokens), expected) < 1e-4
        cache = runtime.start(windows)
        for position in range(length):
            found, cache = runtime.step(tokens[:, position : position + 1], position, cache)
        assert relative_difference(found[:, 0], expected[:, -1]) < 1e-4

    text = tiny.text(words=6)
    assert AutoTokenizer.from_pretrained(folder)(text) == AutoTokenizer.from_pretrained(source)(text)
    assert {"config.json", "generation_config.json", "openvino_model.xml"} <= {file.name for file in folder.iterdir()}
    assert size(folder) < 1.02 * (source / "model.safetensors").stat().st_size  # tied weights are there once
    assert run_example(folder, text).startswith(text)


def test_float16_halves_the_file(small, convert):
    folder, made = convert(OpenVino(dtype="float16"), small)
    assert made.comparison.difference < 0.01
    assert size(folder) < 0.55 * (small / "model.safetensors").stat().st_size


def test_int8_and_int4_are_smaller_and_text_makes_int4_better(heterogeneous, convert, tmp_path):
    found = {}
    for name, step in {
        "int8": OpenVino(quantize="int8"),
        "rounded": OpenVino(quantize="int4", awq=False, scale_estimation=False),
        "int4": OpenVino(quantize="int4"),
    }.items():
        (tmp_path / "openvino").rename(tmp_path / f"{name}-before") if (tmp_path / "openvino").exists() else None
        folder, made = convert(step, heterogeneous)
        found[name] = made.comparison.difference, size(folder)
    assert found["int8"][0] < found["int4"][0] < found["rounded"][0]
    assert found["int4"][1] < found["int8"][1] < 0.3 * (heterogeneous / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"group_size": 32}, "leave group_size out"),
        ({"quantize": "int8", "gptq": True}, "Give `quantize: int4`"),
        ({"quantize": "int4", "ratio": 1.5}, "Give a number of at least 0 and at most 1"),
        ({"quantize": "int4", "group_size": 0}, "Give a whole number of at least 1"),
    ],
)
def test_options_without_effect_are_refused(options, remedy):
    with pytest.raises(RecipeError, match=remedy):
        OpenVino(**options)


def test_groups_must_divide_the_widths(small, spec_of):
    with pytest.raises(RecipeError, match="groups of 96"):
        OpenVino(quantize="int4", group_size=96).check(spec_of(small))

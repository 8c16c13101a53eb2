from pathlib import Path

import pytest
import tiny
import torch
from optimum_prune_onnx import Onnx
from transformers import AutoTokenizer

from optimum_prune import load_model
from optimum_prune.conversion.conversion import folder_bytes
from optimum_prune.errors import RecipeError
from optimum_prune.evaluation.comparison import relative_difference


@pytest.fixture(params=["small", "heterogeneous"])
def source(request):
    return request.getfixturevalue(request.param)


def test_any_batch_and_length_computes_what_the_checkpoint_does(source, convert, run_example):
    folder, made = convert(Onnx(), source)
    assert made.comparison.difference < 1e-4
    assert made.comparison.same_tokens == made.comparison.generated

    model, runtime = load_model(source), Onnx().open(folder, "cpu")
    for windows, length in ((1, 1), (1, 40), (5, 3)):
        tokens = tiny.windows(count=windows, length=length, seed=2).tokens
        with torch.no_grad():
            expected = model(tokens).logits
        assert relative_difference(runtime.logits(tokens), expected) < 1e-4
        found, cache = runtime.step(tokens[:, :1], 0, runtime.start(windows))
        for position in range(1, length):
            found, cache = runtime.step(tokens[:, position : position + 1], position, cache)
        assert relative_difference(found[:, 0], expected[:, -1]) < 1e-4

    text = tiny.text(words=6)
    assert AutoTokenizer.from_pretrained(folder)(text) == AutoTokenizer.from_pretrained(source)(text)
    assert {"config.json", "generation_config.json", "model.onnx", "model.onnx.data"} <= {
        file.name for file in folder.iterdir()
    }
    assert (folder / "model.onnx.data").stat().st_size < 1.02 * (
        source / "model.safetensors"
    ).stat().st_size  # tied weights once
    assert run_example(folder, text).startswith(text)
    shorter_is_padded(runtime, model)
    names_no_place(folder)


def names_no_place(folder):
    """It may be published: no file says where anything lies on the machine that wrote it."""
    places = [str(Path(torch.__file__).parent.parent), str(Path(__file__).parent), str(folder), str(Path.home())]
    for file in folder.rglob("*"):
        content = file.read_bytes() if file.is_file() else b""
        assert not [place for place in (*places, "site-packages") if place.encode() in content], file


def shorter_is_padded(runtime, model):
    """One text of a batch has two tokens less, and padding before them."""
    tokens = tiny.windows(count=1, length=6).tokens
    padded = torch.stack([tokens[0], torch.cat([torch.zeros(2, dtype=torch.long), tokens[0, :4]])])
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": padded.numpy(), "attention_mask": mask.numpy(), "position_ids": positions.numpy()}
    (logits,) = runtime.session.run(["logits"], inputs | runtime.start(2))
    with torch.no_grad():
        expected = model(tokens).logits
    assert relative_difference(torch.from_numpy(logits[1, 2:]), expected[0, :4]) < 1e-4


@pytest.mark.parametrize("options", [{"quantize": "int8"}, {"dtype": "float16"}])
def test_smaller_weights(options, small, convert):
    folder, made = convert(Onnx(**options), small)
    assert made.comparison.difference > 1e-4
    assert folder_bytes(folder) < 0.75 * (small / "model.safetensors").stat().st_size + 400_000
    names_no_place(folder)


def test_int8_of_float16_is_refused():
    with pytest.raises(RecipeError, match="Leave dtype out"):
        Onnx(quantize="int8", dtype="float16")

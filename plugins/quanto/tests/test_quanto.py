import json
from dataclasses import replace

import pytest
import torch
from optimum_prune_quanto import Quanto, align
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from optimum_prune import load_model
from optimum_prune.errors import RecipeError, VerificationError

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

SETTINGS = {"qint8": Quanto(), "qint4": Quanto(weights="qint4"), "with-output": Quanto(exclude=())}


def most(step: Quanto) -> float:
    return 0.05 if step.weights == "qint8" else 0.5


@pytest.mark.parametrize("step", SETTINGS.values(), ids=SETTINGS)
def test_logits_stay_near_and_the_cache_agrees(step, small, convert):
    _, done = convert(step, small)
    assert 0 < done.comparison.difference < most(step)
    assert done.comparison.with_cache < 0.02
    assert done.evidence["quantized_layers"] == 4 * 7 + (not step.exclude)


@pytest.mark.parametrize("step", SETTINGS.values(), ids=SETTINGS)
def test_heterogeneous_checkpoints_are_quantized_too(step, heterogeneous, convert):
    folder, done = convert(step, heterogeneous)
    assert 0 < done.comparison.difference < most(step)
    assert done.evidence["quantized_layers"] == 3 * 4 + 3 * 3 + (not step.exclude)
    assert (folder / "modeling_pruned.py").is_file()


def test_tied_embeddings_stay_tied_unless_the_output_is_quantized(small, convert):
    from optimum.quanto import QuantizedModelForCausalLM

    folder, _ = convert(Quanto(), small)
    model = QuantizedModelForCausalLM.from_pretrained(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.model.embed_tokens.weight, load_model(small).model.embed_tokens.weight)


def test_the_output_is_of_its_own_once_it_is_quantized(small, convert):
    folder, _ = convert(Quanto(exclude=()), small)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head" in json.loads((folder / "quanto_qmap.json").read_text())


@pytest.mark.parametrize("checkpoint", ["small", "heterogeneous"])
def test_bfloat16_weights_of_8_bits_run_where_they_are_mapped(checkpoint, convert, request, tmp_path):
    source = tmp_path / "source"
    for name in ("model.safetensors", "config.json"):
        assert (request.getfixturevalue(checkpoint) / name).is_file()
    model = load_model(request.getfixturevalue(checkpoint), dtype=torch.bfloat16)
    model.save_pretrained(source)
    AutoTokenizer.from_pretrained(request.getfixturevalue(checkpoint)).save_pretrained(source)
    folder, done = convert(Quanto(), source, dtype="bfloat16")
    assert done.comparison.difference < 0.1
    for name, place in places(folder / "model.safetensors").items():
        assert place % 64 == 0, name


def places(file) -> dict[str, int]:
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    return {
        name: 8 + length + t["data_offsets"][0]
        for name, t in header.items()
        if name != "__metadata__" and t["dtype"] == "I8"
    }


@pytest.mark.parametrize("others", range(1, 9))
def test_aligned_files_hold_the_same(others, tmp_path):
    tensors = {f"scale{i}": torch.rand(2 * i + 1, dtype=torch.bfloat16) for i in range(others)}
    tensors["packed"] = torch.arange(-64, 64, dtype=torch.int8)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    align(tmp_path / "model.safetensors")
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert places(tmp_path / "model.safetensors")["packed"] % 64 == 0
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_the_tokenizer_is_there_and_no_empty_card(small, convert):
    folder, _ = convert(Quanto(), small)
    text = "one two three"
    assert (
        AutoTokenizer.from_pretrained(folder)(text).input_ids == AutoTokenizer.from_pretrained(small)(text).input_ids
    )
    assert not (folder / "README.md").exists()


def test_windows_of_any_number_and_length_run(small, convert):
    folder, _ = convert(Quanto(weights="qint4"), small)
    runtime = Quanto().open(folder, "cpu")
    for shape in [(1, 1), (1, 7), (3, 5)]:
        assert torch.isfinite(runtime.logits(torch.ones(shape, dtype=torch.long))).all()


def test_a_tolerance_that_is_too_small_is_an_error(small, convert):
    with pytest.raises(VerificationError, match="quanto"):
        convert(Quanto(tolerance=1e-6), small)


@pytest.mark.parametrize(("weights", "width", "multiple"), [("qint8", 200, 16), ("qint4", 208, 32)])
def test_widths_that_its_kernels_cannot_take_are_refused(weights, width, multiple, small, spec_of):
    known = spec_of(small)
    narrower = replace(known, shape=known.shape.narrowed({"channels": width}))
    with pytest.raises(RecipeError, match=f"multiple_of: {multiple}"):
        Quanto(weights=weights).check(narrower)

from pathlib import Path

import pytest
import torch
from optimum_prune_executorch import ExecuTorch
from optimum_prune_onnx import Onnx
from optimum_prune_openvino import OpenVino
from optimum_prune_torchao import DYNAMIC, WEIGHT_ONLY, TorchAo
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_prune import Recipe, Settings, load_model
from optimum_prune.errors import RecipeError, VerificationError

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torchao.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torchao.*"),
]

SETTINGS = [
    TorchAo(),
    TorchAo(group_size=64),
    TorchAo(quant_type=DYNAMIC),
    TorchAo(quant_type=DYNAMIC, reduce_range=True),
]
NAMES = ["weight-only", "groups", "dynamic", "dynamic-reduced"]


@pytest.mark.parametrize("step", SETTINGS, ids=NAMES)
def test_logits_stay_near_and_the_cache_agrees(step, small, convert):
    _, done = convert(step, small)
    assert 0 < done.comparison.difference < 0.1
    assert done.comparison.with_cache < 0.02
    assert done.evidence["quantized_layers"] == 4 * 7


@pytest.mark.parametrize("step", [TorchAo(), TorchAo(quant_type=DYNAMIC)], ids=[WEIGHT_ONLY, DYNAMIC])
def test_heterogeneous_checkpoints_are_quantized_too(step, heterogeneous, convert):
    folder, done = convert(step, heterogeneous)
    assert 0 < done.comparison.difference < 0.1
    assert done.evidence["quantized_layers"] == 3 * 4 + 3 * 3
    assert (folder / "modeling_pruned.py").is_file()


def test_stock_transformers_reads_the_same_weights_and_tokens(small, convert):
    folder, _ = convert(TorchAo(), small)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    weight, original = model.model.layers[0].mlp.up_proj.weight, load_model(small).model.layers[0].mlp.up_proj.weight
    step = original.abs().amax(1, keepdim=True) / 127
    assert ((weight.dequantize() - original).abs() <= 0.51 * step).all()
    text = "one two three"
    assert (
        AutoTokenizer.from_pretrained(folder)(text).input_ids == AutoTokenizer.from_pretrained(small)(text).input_ids
    )


def test_windows_of_any_number_and_length_run(small, convert):
    folder, _ = convert(TorchAo(quant_type=DYNAMIC), small)
    runtime = TorchAo().open(folder, "cpu")
    for shape in [(1, 1), (1, 7), (3, 5)]:
        assert torch.isfinite(runtime.logits(torch.ones(shape, dtype=torch.long))).all()


def test_files_are_smaller(small, convert):
    folder, _ = convert(TorchAo(), small)

    def packed(folder: Path) -> int:
        return (folder / "model.safetensors").stat().st_size

    assert packed(folder) < 0.5 * packed(small)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert any("qdata" in name for name in file.keys())  # noqa: SIM118 - no mapping


def test_a_tolerance_that_is_too_small_is_an_error(small, convert):
    with pytest.raises(VerificationError, match="torchao"):
        convert(TorchAo(tolerance=1e-6), small)


def test_impossible_options_are_refused_with_the_remedy(small, spec_of):
    with pytest.raises(RecipeError, match="Leave group_size out"):
        TorchAo(quant_type=DYNAMIC, group_size=64)
    with pytest.raises(RecipeError, match="Give a whole number of at least 1"):
        TorchAo(group_size=0)
    with pytest.raises(RecipeError, match="Leave reduce_range out"):
        TorchAo(reduce_range=True)
    with pytest.raises(RecipeError, match="group_size of 128, 64, 32, 16"):
        TorchAo(group_size=96).check(spec_of(small))


def test_settings_of_inductor_are_left_alone(small, convert):
    from torch._inductor import config

    before = config.get_config_copy()
    convert(TorchAo(), small)
    assert config.get_config_copy() == before


@pytest.mark.parametrize(
    ("step", "exporter"),
    [
        (TorchAo(), Onnx()),
        pytest.param(TorchAo(group_size=64), OpenVino(), marks=pytest.mark.engines),
        pytest.param(TorchAo(), ExecuTorch(max_length=48), marks=pytest.mark.engines),
    ],
    ids=["onnx", "openvino", "executorch"],
)
def test_exporters_compute_with_its_weights(exporter, step, small, convert):
    folder, _ = convert(step, small)
    exported, done = convert(exporter, folder)
    assert done.comparison.difference < 1e-3
    assert done.comparison.same_tokens == done.comparison.generated
    assert "quantization_config" not in (exported / "config.json").read_text()


def test_rounded_activations_are_not_exported(small):
    settings = Settings(model=str(small))
    Recipe(passes=(TorchAo(), Onnx(quantize="int8")), settings=settings)
    with pytest.raises(RecipeError, match=r"'onnx' comes after 'torchao', and cannot read what that leaves"):
        Recipe(passes=(TorchAo(quant_type=DYNAMIC), Onnx()), settings=settings)

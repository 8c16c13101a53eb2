from pathlib import Path

import pytest
import torch
from optimum_prune_executorch import ExecuTorch
from optimum_prune_onnx import Onnx
from optimum_prune_openvino import OpenVino
from optimum_prune_torchao import DYNAMIC, SPARSE, WEIGHT_ONLY, TorchAo, is_semi_structured
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_prune import Recipe, Settings, load_model
from optimum_prune.errors import PassError, RecipeError, VerificationError

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
    with pytest.raises(RecipeError, match="rounds no weights"):
        TorchAo(quant_type=SPARSE, group_size=64)
    with pytest.raises(RecipeError, match="rounds no activations"):
        TorchAo(quant_type=SPARSE, reduce_range=True)
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


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")


@pytest.fixture(scope="module")
def two_of_four(small, tmp_path_factory) -> Path:
    """The small checkpoint in bfloat16, its layers' weights with 2:4 zeros."""
    model = load_model(small, dtype="bfloat16")
    for name, parameter in model.named_parameters():
        if "_proj" in name:
            parameter.data[:, ::4] = parameter.data[:, 2::4] = 0
    folder = tmp_path_factory.mktemp("checkpoints") / "two-of-four"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(small).save_pretrained(folder)
    return folder


def test_what_is_semi_structured():
    weight = torch.ones(3, 8)
    assert not is_semi_structured(weight)
    weight[:, [0, 1, 6, 7]] = 0
    assert is_semi_structured(weight)
    weight[2, 0], weight[2, 4] = 1, 0  # as many zeros, but three weights among four
    assert not is_semi_structured(weight)
    assert not is_semi_structured(torch.zeros(3, 6))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is an NVIDIA GPU")
def test_sparse_cores_are_asked_for_before_anything_runs(two_of_four, spec_of):
    with pytest.raises(RecipeError, match=r"semi_sparse_weight needs an NVIDIA GPU .* Leave the pass out"):
        TorchAo(quant_type=SPARSE).check(spec_of(two_of_four))


def test_a_run_without_the_gpu_is_refused(two_of_four, quantize, tmp_path):
    with pytest.raises(PassError, match="--device cuda"):
        quantize(TorchAo(quant_type=SPARSE), two_of_four, tmp_path / "target", None)


@GPU
def test_zeros_are_packed_for_the_sparse_cores(two_of_four, convert):
    folder, done = convert(TorchAo(quant_type=SPARSE), two_of_four, dtype="bfloat16", device="cuda")
    assert done.evidence["layers_with_packed_zeros"] == 4 * 7
    assert done.evidence["bytes_on_the_gpu_packed"] < 0.8 * done.evidence["bytes_on_the_gpu_with_zeros"]
    assert done.comparison.difference < 0.05
    assert (folder / "model.safetensors").read_bytes() == (two_of_four / "model.safetensors").read_bytes()


@GPU
def test_without_such_zeros_there_is_nothing_to_pack(small, convert):
    with pytest.raises(PassError, match="no linear layer with 2:4 zeros"):
        convert(TorchAo(quant_type=SPARSE), small, device="cuda")

from dataclasses import dataclass

import pytest
import torch
from optimum_prune_bitsandbytes import BitsAndBytes
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_prune import load_model
from optimum_prune.errors import RecipeError, VerificationError

SETTINGS = {
    "int8": BitsAndBytes(),
    "int8-all-channels": BitsAndBytes(threshold=0.0),
    "nf4": BitsAndBytes(bits=4),
    "nf4-double": BitsAndBytes(bits=4, use_double_quant=True),
    "fp4": BitsAndBytes(bits=4, quant_type="fp4"),
    "nf4-bfloat16": BitsAndBytes(bits=4, compute_dtype="bfloat16"),
}


def repacks() -> bool:
    """Whether bitsandbytes packs weights of 4 bits anew for this processor when they are first used."""
    from bitsandbytes.functional import has_avx512bf16

    return has_avx512bf16()


@dataclass(frozen=True, kw_only=True)
class RunsBeforeItSaves(BitsAndBytes):
    """The trap: what is saved after the first run."""

    def convert(self, job):
        config = self._config(job.source, False)
        model = load_model(job.source, dtype=torch.bfloat16, device_map="cpu", quantization_config=config)
        with torch.no_grad():
            model(torch.ones((1, 4), dtype=torch.long))
        model.save_pretrained(job.target)
        return {}


@dataclass(frozen=True, kw_only=True)
class SavesInAnotherOrder(BitsAndBytes):
    """The same on any processor: packed weights out of order, in a checkpoint that loads without a word."""

    def convert(self, job):
        evidence = super().convert(job)
        file = job.target / "model.safetensors"
        packed = {
            name: t.flip(0).contiguous() if t.dtype == torch.uint8 and t.shape[-1] == 1 else t
            for name, t in load_file(file).items()
        }
        save_file(packed, file, {"format": "pt"})
        return evidence


@pytest.mark.parametrize("step", SETTINGS.values(), ids=SETTINGS)
def test_logits_stay_near_and_the_cache_agrees(step, small, convert):
    _, done = convert(step, small)
    assert 0 < done.comparison.difference < (0.05 if step.bits == 8 else 0.5)
    assert done.comparison.with_cache < 0.02
    assert done.evidence["quantized_layers"] == 4 * 7


@pytest.mark.parametrize("step", [BitsAndBytes(), BitsAndBytes(bits=4)], ids=["int8", "nf4"])
def test_heterogeneous_checkpoints_are_quantized_too(step, heterogeneous, convert):
    folder, done = convert(step, heterogeneous)
    assert 0 < done.comparison.difference < (0.05 if step.bits == 8 else 0.5)
    assert done.evidence["quantized_layers"] == 3 * 4 + 3 * 3
    assert (folder / "modeling_pruned.py").is_file()


@pytest.mark.skipif(not repacks(), reason="this processor has no packing of its own")
def test_saving_after_the_first_run_is_found_out(small, convert):
    with pytest.raises(VerificationError, match="logits"):
        convert(RunsBeforeItSaves(bits=4), small)


def test_packed_weights_out_of_order_are_found_out(small, convert):
    with pytest.raises(VerificationError, match="logits"):
        convert(SavesInAnotherOrder(bits=4), small)


def test_what_is_saved_is_what_was_quantized(small, convert):
    folder, _ = convert(BitsAndBytes(bits=4), small)
    model, source = AutoModelForCausalLM.from_pretrained(folder), load_model(small)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    # The output on the unit vectors is the weight itself.
    for found, layer in zip(model.model.layers, source.model.layers, strict=True):
        weight = found.mlp.up_proj(torch.eye(128)).T
        assert (weight - layer.mlp.up_proj.weight).std() < 0.12 * layer.mlp.up_proj.weight.std()


def test_the_tokenizer_is_there(small, convert):
    folder, _ = convert(BitsAndBytes(), small)
    text = "one two three"
    assert (
        AutoTokenizer.from_pretrained(folder)(text).input_ids == AutoTokenizer.from_pretrained(small)(text).input_ids
    )


@pytest.mark.parametrize("bits", [8, 4])
def test_windows_of_any_number_and_length_run(bits, small, convert):
    folder, _ = convert(BitsAndBytes(bits=bits), small)
    runtime = BitsAndBytes(bits=bits).open(folder, "cpu")
    for shape in [(1, 1), (1, 7), (3, 5)]:
        assert torch.isfinite(runtime.logits(torch.ones(shape, dtype=torch.long))).all()


def test_files_are_smaller(small, convert):
    folder, _ = convert(BitsAndBytes(bits=4), small)
    assert (folder / "model.safetensors").stat().st_size < 0.3 * (small / "model.safetensors").stat().st_size


def test_impossible_options_are_refused_with_the_remedy():
    with pytest.raises(RecipeError, match="Give 4 or 8"):
        BitsAndBytes(bits=3)
    with pytest.raises(RecipeError, match="Give a number of at least 0"):
        BitsAndBytes(threshold=-1.0)
    for options in [{"use_double_quant": True}, {"quant_type": "fp4"}, {"compute_dtype": "float32"}]:
        with pytest.raises(RecipeError, match="bits: 4"):
            BitsAndBytes(**options)

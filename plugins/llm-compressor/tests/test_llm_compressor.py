"""What llm-compressor writes: it reads in transformers, is small, follows the options; what it cannot do is refused beforehand.

Conversions run where llm-compressor is: in this environment, or in the one that OPTIMUM_PRUNE_PYTHON_LLM_COMPRESSOR names.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import optimum_prune_llm_compressor as plugin
import pluggy
import pytest
import tiny
import torch
from optimum_prune_llm_compressor import LlmCompressor
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2Config

import optimum_prune
from optimum_prune import CheckpointSpec, load_model
from optimum_prune.anatomy.decoder import Decoder
from optimum_prune.checkpoint.opening import meta_model
from optimum_prune.errors import RecipeError
from optimum_prune.evaluation.comparison import ReferenceOutputs, compare, relative_difference
from optimum_prune.evaluation.runtime import TransformersRuntime
from optimum_prune.options import build

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:compressed_tensors")
ELSEWHERE = os.environ.get("OPTIMUM_PRUNE_PYTHON_LLM_COMPRESSOR")
INTERPRETER = ELSEWHERE or (sys.executable if importlib.util.find_spec("llmcompressor") else None)
needs_library = pytest.mark.skipif(
    INTERPRETER is None,
    reason="llmcompressor is not installed; OPTIMUM_PRUNE_PYTHON_LLM_COMPRESSOR may name where it is",
)
needs_reader = pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None, reason="compressed-tensors is not installed"
)
CONVERT = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import load_file
from optimum_prune import Job, Progress, Windows
from optimum_prune.conversion.conversion import convert
from optimum_prune.options import build
from optimum_prune_llm_compressor import LlmCompressor
torch.set_num_threads(1)
small, heterogeneous, room = map(Path, sys.argv[1:])
for name, options in json.loads((room / "options.json").read_text()).items():
    text = load_file(room / ("padding" if name == "padded" else "plain"))
    source = heterogeneous if name == "heterogeneous" else small
    job = Job(source, room / name, Windows(text["tokens"], text["mask"], "the test"), "cpu", Progress())
    job.target.mkdir()
    print(json.dumps(dict(convert(build(LlmCompressor, options, "the test"), job))))
"""
WINDOWS = tiny.windows(count=24, length=32)
CONVERTED = {
    "gptq": {},
    "padded": {},
    "heterogeneous": {},
    "rounded": {"algorithm": "round-to-nearest"},
    "narrow": {"algorithm": "round-to-nearest", "group_size": 32},
    "rows": {"scheme": "W8A8", "algorithm": "round-to-nearest"},
}
"""Options of the checkpoints that all tests look at."""


@pytest.fixture(scope="session")
def converted(small, heterogeneous, tmp_path_factory) -> Path:
    """A folder with a converted checkpoint for each entry of `CONVERTED`; llm-compressor is slow to import, so it is once."""
    room = tmp_path_factory.mktemp("converted")
    (room / "options.json").write_text(json.dumps(CONVERTED))
    padding = torch.full((len(WINDOWS.tokens), 5), tiny.PAD)
    padded = {
        "tokens": torch.cat([WINDOWS.tokens, padding], 1),
        "mask": torch.cat([WINDOWS.mask, padding != tiny.PAD], 1),
    }
    save_file(padded, room / "padding")
    save_file({"tokens": WINDOWS.tokens, "mask": WINDOWS.mask}, room / "plain")
    environment = {**os.environ, "PYTHONPATH": str(_path(room / "code"))}
    command = [str(INTERPRETER), "-c", CONVERT, str(small), str(heterogeneous), str(room)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = [
        json.loads(line)["quantized_modules"] for line in done.stdout.split("\n") if line
    ]  # and nothing else is printed
    assert counts == [21 if name == "heterogeneous" else 28 for name in CONVERTED]
    return room


def _path(code: Path) -> Path:
    """A folder that holds what the other interpreter needs of ours, and nothing else of this environment."""
    code.mkdir()
    for module in (optimum_prune, pluggy):
        folder = Path(module.__file__).parent
        (code / folder.name).symlink_to(folder)
    (code / Path(plugin.__file__).name).symlink_to(plugin.__file__)
    return code


@needs_library
@needs_reader
@pytest.mark.parametrize(("name", "bound"), [("gptq", 0.5), ("narrow", 0.5), ("rows", 0.1), ("heterogeneous", 0.5)])
def test_what_is_written_reads_in_transformers(converted, small, heterogeneous, name, bound):
    folder, source = converted / name, heterogeneous if name == "heterogeneous" else small
    expected = ReferenceOutputs.of(
        TransformersRuntime(load_model(source)), tiny.windows(count=4, length=40, seed=1).tokens
    )
    comparison = compare(LlmCompressor().open(folder, "cpu"), expected)
    assert 0 < comparison.difference < bound
    assert comparison.with_cache < 0.02


@needs_library
@pytest.mark.parametrize("name", ["gptq", "narrow", "rows"])
def test_config_and_tokenizer_are_whole(converted, small, name):
    folder, step = converted / name, LlmCompressor(**CONVERTED[name])
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == 50_000
    assert config["tie_word_embeddings"]
    weights = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    assert (weights["group_size"] or -1) == step.weights_of_group
    ours, theirs = (AutoTokenizer.from_pretrained(each)(tiny.text(50))["input_ids"] for each in (small, folder))
    assert ours == theirs


@needs_library
@needs_reader
def test_gptq_beats_rounding_on_its_own_windows(converted, small):
    expected = TransformersRuntime(load_model(small)).logits(WINDOWS.tokens)
    mended, nearest = (
        relative_difference(TransformersRuntime(load_model(converted / name)).logits(WINDOWS.tokens), expected)
        for name in ("gptq", "rounded")
    )
    assert mended < nearest


@needs_library
def test_padding_is_no_text(converted):
    plain, padded = (load_file(converted / name / "model.safetensors") for name in ("gptq", "padded"))
    assert all(torch.equal(plain[name], padded[name]) for name in plain)


@needs_library
def test_modules_to_ignore_stay_as_they_are(converted, small):
    stored, before = (load_file(folder / "model.safetensors") for folder in (converted / "rounded", small))
    assert "model.layers.0.mlp.down_proj.weight_packed" in stored
    assert torch.equal(stored["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"scheme": "W8A8", "group_size": 64}, "Leave group_size out"),
        ({"group_size": 0}, "of at least 1, or -1"),
        ({"dampening_frac": 0.0}, "above 0 and below 1"),
        ({"scheme": "W4A17"}, "W4A16"),
        ({"actorder": "group"}, "static"),
    ],
)
def test_options_that_cannot_work_are_refused(options, remedy):
    with pytest.raises(RecipeError, match=remedy):
        build(LlmCompressor, options, "the test")


def test_groups_that_do_not_divide_the_widths_are_refused(spec_of, small):
    with pytest.raises(RecipeError, match="no multiple"):
        LlmCompressor(group_size=96).check(spec_of(small))
    LlmCompressor(group_size=-1).check(spec_of(small))
    LlmCompressor(scheme="W8A8").check(spec_of(small))


def test_transposed_linear_modules_are_refused_and_not_left_unquantized(plugins):
    config = GPT2Config(n_embd=64, n_head=2, n_layer=2, vocab_size=320)
    decoder = Decoder.of(meta_model(config), plugins.families)
    with pytest.raises(RecipeError, match="transposed"):
        LlmCompressor().check(CheckpointSpec(config, decoder.family, decoder.shape()))

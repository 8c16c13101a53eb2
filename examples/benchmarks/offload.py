"""Memory and time of a pass with the weights on disk and with the weights in memory, each in a process of its own; and whether both
write the same, and what `compress plan` said.

    python examples/benchmarks/offload.py TOKENIZER TEXT [--layers 32] [--hidden 2048] [--width 5632] [--pass "depth: {layers: 4}"]

The model has random weights in the shape of Llama, in shards; TOKENIZER is a folder or Hub id. Look at the ratio of the times.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

PROGRAM = [sys.executable, "-m", "optimum_prune", "compress"]


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tokenizer")
    parser.add_argument("text")
    for name, default in {"layers": 32, "hidden": 2048, "width": 5632, "samples": 16, "length": 512}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--pass", dest="step", default="osscar: {ratio: 0.2}", help="as an entry of a recipe's passes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as room:  # not where files may lie in memory
        measure(options, Path(room))


def measure(options: argparse.Namespace, room: Path) -> None:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # a process counts its parent's peak as its own
        size = pool.submit(write_model, options, room / "model").result()
    print(
        f"{options.layers} layers of {options.hidden} x {options.width}, {options.dtype}: {size / 1e9:.2f} GB of weights"
    )
    windows = {"samples": options.samples, "length": options.length}
    recipe = {
        "dtype": options.dtype,
        "calibration": windows,
        "evaluation": {**windows, "samples": 2},
        "passes": [yaml.safe_load(options.step)],
    }
    (room / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    seconds, digests = {}, {}
    for where, flag in (("on disk", "--offload"), ("in memory", "--no-offload")):
        common = [room / "recipe.yaml", "--model", room / "model", "--text", options.text, flag]
        planned = json.loads(subprocess.check_output([*PROGRAM, "plan", *common, "--json"]))["peak_memory"]
        peak = run([*PROGRAM, "run", *common, "--output", room / "out", "--overwrite", "--quiet"])
        report = json.loads((room / "out/compression/report.json").read_text())
        seconds[where], digests[where] = report["seconds"], digest(room / "out")
        print(f"weights {where}: {peak / 1e9:.2f} GB at the peak, {planned / 1e9:.2f} planned, {seconds[where]:.0f} s")
    print(f"on disk / in memory: {seconds['on disk'] / seconds['in memory']:.2f} of the time")
    print("The same weights to the bit." if len(set(digests.values())) == 1 else "The weights differ.")


def write_model(options: argparse.Namespace, folder: Path) -> int:
    """Writes a model with random weights in shards, and returns their bytes."""
    config = LlamaConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(options.tokenizer)),
        hidden_size=options.hidden,
        intermediate_size=options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=max(options.hidden // 256, 1),
        max_position_embeddings=max(options.length, 2048),
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, options.dtype))
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="1GB")
    AutoTokenizer.from_pretrained(options.tokenizer).save_pretrained(folder)
    return sum(parameter.nbytes for parameter in model.parameters())


def run(command: list[str | Path]) -> int:
    """Runs a program and returns the bytes of memory that it took at its peak."""
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit("The run failed.")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def digest(folder: Path) -> str:
    """Of all weights files."""
    digests = (hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("*.safetensors")))
    return " ".join(digests)


if __name__ == "__main__":
    main()

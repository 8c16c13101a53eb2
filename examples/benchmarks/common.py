"""What the benchmarks have in common: how they are called, what they open, and how they run another implementation."""

import argparse
import subprocess
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_prune import Text
from optimum_prune.anatomy import find_family
from optimum_prune.calibration import draw
from optimum_prune.plugins import load


def arguments(description: str, samples: int, **sizes: int) -> argparse.Namespace:
    """The command line; `sizes` are further whole numbers with their defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--quark", help="an interpreter with amd-quark")
    for name, default in {"samples": samples, "length": 512, **sizes}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="bfloat16")
    return parser.parse_args()


def opened(options: argparse.Namespace):
    """The model, its family, and the windows of text."""
    plugins = load()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype)).eval()
    text = Text(text=options.text, samples=options.samples, length=options.length)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    windows, _ = draw(text, Text(samples=0), tokenizer, plugins.sources, seed=0, limit=10**9)
    print(f"{options.samples} windows of {options.length} tokens, {options.dtype}, {torch.get_num_threads()} threads")
    return model, find_family(model.config, plugins.families), windows


def quark(script: str, options: argparse.Namespace, tokens: torch.Tensor, size: int) -> list[float]:
    """The numbers that a script prints, in the line that starts with "quark", when run on the same windows."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokens.pt"
        torch.save(tokens, file)
        command = [options.quark, Path(__file__).with_name(script), options.model, file, str(size), options.dtype]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    line = next(line for line in output.splitlines() if line.startswith("quark "))
    return [float(number) for number in line.split()[1:]]

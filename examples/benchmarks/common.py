"""What the benchmarks have in common: how they are called, what they open, and how they run another implementation."""

import argparse
import subprocess
import tempfile
from pathlib import Path

import torch

from optimum_prune import Calibration, Decoder, Progress, Text
from optimum_prune.checkpoint.loading import load
from optimum_prune.checkpoint.opening import length_limit, open_checkpoint
from optimum_prune.hooks.plugins import load as load_plugins
from optimum_prune.text.drawing import Reader, draw


def arguments(description: str, samples: int, **sizes: int) -> argparse.Namespace:
    """The command line; `sizes` are further whole numbers with their defaults."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--quark", help="an interpreter with amd-quark; the model must then be a folder")
    for name, default in {"samples": samples, "length": 512, **sizes}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="bfloat16")
    return parser.parse_args()


def opened(options: argparse.Namespace) -> tuple[Decoder, Calibration]:
    """The model with its family, and the windows of text."""
    plugins = load_plugins()
    checkpoint = open_checkpoint(options.model)
    decoder = Decoder.of(load(checkpoint, options.dtype, "cpu", Progress()), plugins.families)
    reader = Reader(checkpoint.tokenizer(), plugins.sources, length_limit(decoder.config))
    text = Text(text=options.text, samples=options.samples, length=options.length)
    windows = draw(text, Text(samples=0), reader, seed=0).calibration
    print(f"{len(windows)} windows of {windows.length} tokens, {options.dtype}, {torch.get_num_threads()} threads")
    return decoder, Calibration(windows)


def quark(script: str, options: argparse.Namespace, tokens: torch.Tensor, size: int) -> list[float]:
    """The numbers that a script prints, in the line that starts with "quark", when run on the same windows."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokens.pt"
        torch.save(tokens, file)
        command = [options.quark, Path(__file__).with_name(script), options.model, file, str(size), options.dtype]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    line = next(line for line in output.splitlines() if line.startswith("quark "))
    return [float(number) for number in line.split()[1:]]

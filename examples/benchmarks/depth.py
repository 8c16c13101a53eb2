"""Times the search for layers to leave out, exact and racing, against AMD Quark's if an interpreter that has it is named.

    python examples/benchmarks/depth.py MODEL TEXT [--quark PYTHON] [--samples 8] [--length 512] [--layers 3]

Everything is measured in one run, on the same windows and in the same dtype; look at the ratios, not at the seconds.
"""

import argparse
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_prune import Depth, Progress, Text
from optimum_prune.anatomy import find_family
from optimum_prune.calibration import draw
from optimum_prune.plugins import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--quark", help="an interpreter with amd-quark")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()

    plugins = load()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype)).eval()
    family = find_family(model.config, plugins.families)
    text = Text(text=options.text, samples=options.samples, length=options.length)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    windows, _ = draw(text, Text(samples=0), tokenizer, plugins.sources, seed=0, limit=10**9)
    print(f"{options.samples} windows of {options.length} tokens, {options.dtype}, {torch.get_num_threads()} threads")

    seconds = {}
    for search in ("exact", "racing"):
        step = Depth(layers=options.layers, search=search, heal=False)
        start = time.perf_counter()
        *_, decision = step.decide(model, family, windows, Progress())
        seconds[search] = time.perf_counter() - start
        print(f"{search}: {seconds[search]:.1f} s, without layers {decision.evidence['dropped']}")
    if options.quark:
        theirs, gone = quark(options, windows.tokens)
        print(f"Quark: {theirs:.1f} s, without layers {gone}")
        print(", ".join(f"{search} / Quark: {ours / theirs:.2f}" for search, ours in seconds.items()))


def quark(options, tokens) -> tuple[float, list[int]]:
    """The seconds of Quark's search, and the layers that it deletes."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokens.pt"
        torch.save(tokens, file)
        script = Path(__file__).with_name("quark_depth.py")
        command = [options.quark, script, options.model, file, str(options.layers), options.dtype]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    line = next(line for line in output.splitlines() if line.startswith("quark "))
    spent, *gone = line.split()[1:]
    return float(spent), [int(index) for index in gone]


if __name__ == "__main__":
    main()

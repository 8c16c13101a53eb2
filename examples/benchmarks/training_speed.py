"""Tokens/s of `distill`, beside those of a bare PyTorch loop of the same computation, and beside `distill` with predictions computed beforehand.

    python examples/benchmarks/training_speed.py MODEL TEXT WORK [--steps 16] [--rounds 3]

The three take turns, each in a process of its own, on steps of 8 windows of 256 tokens, with bfloat16 products of float32 weights. The bare
loop is a forward pass of the dense model, one of the pruned model and its gradients, the divergence of their predictions as torch
computes it, clipping, and AdamW. Printed is the median of each, the seconds of three epochs, and their ratios.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml
from common import opened
from torch.nn import functional
from transformers import AutoModelForCausalLM

DROPPED = [13, 14, 15, 16, 17, 18]
LENGTH, BATCH = 256, 8


def ours(name: str, options: argparse.Namespace, **budget: object) -> dict:
    """What the report says of a training."""
    output, file = options.work / name, options.work / f"{name}.yaml"
    distill = {"alpha": 0, "batch": BATCH * LENGTH, "looks": 1, **budget}
    recipe = {
        "dtype": "bfloat16",
        "calibration": {"text": str(options.text), "samples": 2, "length": LENGTH},
        "evaluation": {"samples": 0},
        "training": {"text": str(options.text), "samples": BATCH * options.steps, "length": LENGTH},
        "passes": [{"depth": {"drop": DROPPED, "heal": False}}, {"distill": distill}],
    }
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    command = ["compress", "run", file, "--model", options.model, "--output", output, "--overwrite", "--quiet"]
    subprocess.run([sys.executable, "-m", "optimum_prune", *map(str, command)], check=True, stdout=subprocess.DEVNULL)
    step = json.loads((output / "compression/report.json").read_text())["passes"][1]
    return step["decisions"][0]["trained"] | {"seconds": step["seconds"]}


def bare(options: argparse.Namespace) -> float:
    """Tokens/s of the loop that one would write."""
    options.model, options.text = str(options.model), str(options.text)
    options.samples, options.length, options.dtype = BATCH * options.steps, LENGTH, "bfloat16"
    decoder, calibration = opened(options)
    teacher = decoder.model.eval()
    student = AutoModelForCausalLM.from_pretrained(options.work / "beforehand", dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0)
    tokens = calibration.windows.tokens
    began = time.monotonic()
    for batch in tokens.split(BATCH):
        with torch.no_grad():
            wanted = teacher(input_ids=batch, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        with torch.autocast("cpu", torch.bfloat16):
            found = student(input_ids=batch, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        loss = functional.kl_div(found.flatten(0, 1), wanted.flatten(0, 1), log_target=True, reduction="batchmean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return tokens.numel() / (time.monotonic() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "text", "work"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.bare:
        print(bare(options))
        return
    loops, speeds, asked, kept = [], [], [], []
    for number in range(options.rounds):
        kept.append(ours("beforehand", options, epochs=3, precompute=True))
        asked.append(ours("asked", options, epochs=3, precompute=False))
        done = subprocess.run([sys.executable, *sys.argv, "--bare"], check=True, capture_output=True, text=True)
        loops.append(float(done.stdout.split()[-1]))
        speeds.append(asked[-1]["tokens_per_second"])
        print(
            f"round {number + 1}: bare loop {loops[-1]:.0f} tokens/s, distill {speeds[-1]:.0f}, three epochs in",
            end=" ",
        )
        print(
            f"{asked[-1]['seconds']:.0f} s, with predictions computed beforehand {kept[-1]['seconds']:.0f} s",
            flush=True,
        )
    ratio = statistics.median(mine / loop for mine, loop in zip(speeds, loops, strict=True))
    faster = statistics.median(a["seconds"] / k["seconds"] for a, k in zip(asked, kept, strict=True))
    print(
        f"distill runs {ratio:.2f} times as fast as the bare loop; predictions computed beforehand make it {faster:.2f} times faster"
    )


if __name__ == "__main__":
    main()

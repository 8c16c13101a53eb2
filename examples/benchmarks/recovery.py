"""What recovery brings back: a model without layers, recovered by each method on the same tokens, judged on texts that none was trained on.

    python examples/benchmarks/recovery.py MODEL CALIBRATION_TEXT TRAINING_TEXT WORK TEXT [TEXT ...] [--tokens 131072] [--dtype bfloat16] [--readme README.md]

Every recipe runs in a process of its own; what is finished in WORK is not run again. Perplexities are of windows of 256 tokens; under
each is its part of that of the model that was only pruned. Seconds and memory are those of the passes that recover.
"""

import argparse
import json
from pathlib import Path

import yaml
from tables import fill, markdown, run

DROPPED = [13, 14, 15, 16, 17, 18]
"""Layers of SmolLM2-135M, the fifth that costs the least in one piece."""
HEADER = ["recovery", "seconds", "GB"]


def recipes(tokens: int) -> dict[str, list]:
    """The passes that recover, by what the table calls them."""
    budget = {"tokens": tokens, "batch": 2048}
    each = {name: {name: budget} for name in ("lora", "pretrain", "distill")}
    alone = {name: [step] for name, step in each.items()}
    both = {"reconstruct, distill": [{"reconstruct": {}}, each["distill"]]}
    return {"none": [], **alone, "reconstruct": [{"reconstruct": {}}], **both}


def recovered(name: str, passes: list, options: argparse.Namespace) -> Path:
    """The folder of the model that a recipe leaves."""
    output = options.work / name.replace(", ", "-")
    if not (output / "compression").is_dir():
        recipe = {
            "dtype": options.dtype,
            "calibration": {"samples": 64, "length": 512},
            "evaluation": {"samples": 0},
            "training": {"text": str(options.training), "length": 256},
            "passes": [{"depth": {"drop": DROPPED}}, *passes],
        }
        file = options.work / f"{output.name}.yaml"
        file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        run(["run", file, "--model", options.model, "--text", options.calibration, "--output", output, "--quiet"])
    return output


def perplexities(model: Path, options: argparse.Namespace) -> list[float]:
    """Of a model, on each of the texts."""
    flags = ["--samples", 100, "--length", 256, "--dtype", options.dtype, "--json"]
    return [json.loads(run(["evaluate", model, "--text", text, *flags]))["perplexity"] for text in options.texts]


def cost(folder: Path) -> tuple[float, float]:
    """Seconds and gigabytes of the passes behind the first."""
    passes = json.loads((folder / "compression/report.json").read_text())["passes"][1:]
    return sum(each["seconds"] for each in passes), max((each["peak_memory"] for each in passes), default=0) / 1e9


def table(options: argparse.Namespace) -> str:
    """The table, row by row as it is measured."""
    rows = [HEADER + [Path(text).stem for text in options.texts]]
    dense = perplexities(options.model, options)
    rows.append(["dense model", "", "", *(f"{value:.2f}" for value in dense)])
    pruned: list[float] = []
    for name, passes in recipes(options.tokens).items():
        folder = recovered(name, passes, options)
        found, (seconds, memory) = perplexities(folder, options), cost(folder)
        pruned = pruned or found
        shares = [f"{value:.2f} ({value / before:.2f})" for value, before in zip(found, pruned, strict=True)]
        rows.append([name, f"{seconds:,.0f}" if passes else "", f"{memory:.2f}" if passes else "", *shares])
        print(" | ".join(rows[-1]), flush=True)
    return markdown(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "calibration", "training", "work"):
        parser.add_argument(name, type=Path)
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--dtype", default="bfloat16", help="float32 is faster on CPUs without tiles for bfloat16")
    fill(parser, "recovery", table)


if __name__ == "__main__":
    main()

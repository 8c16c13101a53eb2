"""Runs every combination of pruning, quantization and export on a model, and tables what each left and what it cost.

    python examples/benchmarks/grid.py MODEL CALIBRATION_TEXT EVALUATION_TEXT WORK [--readme README.md] [--only NAME ...]

The model is pruned once for each way to prune; the other passes then start from that checkpoint, each in a process of its own. What
is finished in WORK is not run again. Passes whose plugin or library is not installed are listed as such.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import yaml

WINDOWS = {
    "dtype": "bfloat16",
    "calibration": {"samples": 32, "length": 512},
    "evaluation": {"samples": 16, "length": 512},
}
PRUNED = {
    "dense": [],
    "depth + OSSCAR": [{"depth": {"layers": 2}}, {"osscar": {"ratio": 0.125}}],
    "OSSCAR global": [{"osscar": {"params": 0.9, "allocation": "global"}}],
}
WRITTEN = {
    "torchao int8": {"torchao": {}},
    "quanto int8": {"quanto": {}},
    "bitsandbytes nf4": {"bitsandbytes": {"bits": 4}},
    "auto-round 4 bits, not tuned": {"auto-round": {"bits": 4, "group_size": 64, "iters": 0}},
    "GPTQ 4 bits": {"gptq": {"bits": 4, "group_size": 64}},
    "llm-compressor W4A16": {"llm-compressor": {"scheme": "W4A16", "group_size": 64}},
    "ONNX": {"onnx": {}},
    "ONNX int8": {"onnx": {"quantize": "int8"}},
    "OpenVINO int8": {"openvino": {"quantize": "int8"}},
    "OpenVINO int4": {"openvino": {"quantize": "int4", "group_size": 64}},
    "ExecuTorch": {"executorch": {}},
    "GGUF q8_0": {"gguf": {"outtype": "q8_0"}},
    "GGUF q4_0": {"gguf": {"outtype": "q4_0"}},
}
COMBINED = {
    "depth + OSSCAR": list(WRITTEN),
    "dense": ["GPTQ 4 bits", "ONNX int8", "OpenVINO int4", "GGUF q4_0"],
    "OSSCAR global": ["torchao int8", "ONNX int8", "OpenVINO int8", "GGUF q8_0"],
}
"""What each way to prune is combined with."""
HEADER = ["recipe", "parameters", "MB on disk", "perplexity", "tokens per second"]


def run(passes: list, model: Path, output: Path, options: argparse.Namespace) -> str:
    """Carries out passes unless that was done before; returns what went wrong, if anything."""
    if (output / "compression").is_dir():
        return ""
    recipe = output.with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump({**WINDOWS, "passes": passes}), encoding="utf-8")
    command = [sys.executable, "-m", "optimum_prune", "compress", "run", recipe, "--model", model, "--output", output]
    texts = ["--text", options.calibration, "--eval-text", options.evaluation]
    done = subprocess.run([*command, *texts, "--quiet"], capture_output=True, text=True, check=False)
    return done.stderr.strip().split("\n")[-1] if done.returncode else ""


def report_of(folder: Path) -> dict:
    return json.loads((folder / "compression" / "report.json").read_text(encoding="utf-8"))


def row(name: str, report: dict) -> list[str]:
    """A row for what the last pass left."""
    artefact = (report["passes"] or [{}])[-1].get("artefact")
    perplexity, speed = report["perplexity"]["after"], report["perplexity"]["tokens_per_second"]["after"]
    size = report["bytes"]["after"]
    if artefact:
        perplexity, speed, size = artefact["perplexity"], artefact["tokens_per_second"], artefact["bytes"]
    return [
        name,
        f"{report['parameters']['after'] / 1e6:.1f} M",
        f"{size / 1e6:.0f}",
        f"{perplexity:.2f}",
        f"{speed:,.0f}",
    ]


def rows(options: argparse.Namespace):
    """The rows of the table, each as soon as it is known."""
    for pruned, names in COMBINED.items():
        steps = PRUNED[pruned]
        base = options.work / slug(pruned)
        if steps:
            if problem := run(steps, options.model, base, options):
                yield [pruned, problem, "", "", ""]
                continue
            report = report_of(base)
            if pruned == next(iter(COMBINED)):
                before = report["perplexity"]
                yield [
                    "dense",
                    f"{report['parameters']['before'] / 1e6:.1f} M",
                    f"{report['bytes']['before'] / 1e6:.0f}",
                    f"{before['before']:.2f}",
                    f"{before['tokens_per_second']['before']:,.0f}",
                ]
            yield row(pruned, report)
        for name in names:
            step = WRITTEN[name]
            title = name if pruned == "dense" else f"{pruned} + {name}"
            if options.only and not any(word in title for word in options.only):
                continue
            output = options.work / slug(title)
            problem = run([step], base if steps else options.model, output, options)
            yield [title, problem, "", "", ""] if problem else row(title, report_of(output))


def slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("evaluation", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument(
        "--readme", type=Path, help="a file to write the table into, between <!-- grid --> and <!-- /grid -->"
    )
    parser.add_argument("--only", nargs="+", help="rows whose name has one of these words")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    lines = [f"| {' | '.join(HEADER)} |", f"|{'---|' * len(HEADER)}"]
    print(*lines, sep="\n")
    for cells in rows(options):
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    if options.readme:
        before, begin, rest = options.readme.read_text(encoding="utf-8").partition("<!-- grid -->\n")
        _, end, after = rest.partition("<!-- /grid -->")
        table = "\n".join(lines)
        options.readme.write_text(f"{before}{begin}{table}\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()

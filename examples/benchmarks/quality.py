"""What each way to make a model smaller costs: perplexity on texts, and accuracy in tasks through lm-eval, with standard errors.

    python examples/benchmarks/quality.py MODEL CALIBRATION_TEXT WORK TEXT [TEXT ...] [--tasks FOLDER] [--shares 0.9 0.8 0.7]
        [--seeds 0 1 2] [--methods ...] [--limit N] [--dtype bfloat16] [--readme README.md]

Every model is made in a process of its own, from windows of 512 tokens; what is finished in WORK is neither made nor measured again.
Perplexities are of windows of 512 tokens. A task is a file of JSON lines, each with a `query`, `choices`, and the number of the right one as
`gold`. Of several seeds, by which calibration windows are drawn, the table has the mean, and the spread of what is lost.
"""

import argparse
import contextlib
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tables import fill, markdown, run
from transformers import AutoModelForCausalLM, AutoTokenizer

SAMPLES, LENGTH, JUDGED = 32, 512, 64
"""Calibration windows, their tokens, and windows of each text to judge by."""
ASKED = {"copa": "{{query}}"}
"""How a task's query is put, where not as a question that is answered."""
METHODS: dict[str, Callable[[float, dict[str, Any]], dict[str, Any]]] = {
    "OSSCAR uniform": lambda share, _: {"osscar": {"params": share}},
    "OSSCAR global": lambda share, _: {"osscar": {"params": share, "allocation": "global"}},
    "depth": lambda share, dense: {"depth": {"layers": layers_gone(share, dense)}},
    "budget": lambda share, _: {"budget": {"params": share}},
    "budget, stock": lambda share, _: {"budget": {"params": share, "form": "stock"}},
}
"""The pass of each method for a share of the parameters."""


def layers_gone(share: float, dense: dict[str, Any]) -> int:
    """How many layers have about what is to go of the parameters."""
    return round((1 - share) * dense["parameters"] / dense["parameters_of_layer"])


def made(method: str, share: float, seed: int, dense: dict[str, Any], options: argparse.Namespace) -> Path:
    """The folder of the model that a method leaves."""
    output = options.work / f"{method.replace(', ', '-').replace(' ', '-')}-{share}-{seed}"
    if not (output / "compression").is_dir():
        recipe = {
            "dtype": options.dtype,
            "seed": seed,
            "calibration": {"samples": SAMPLES, "length": LENGTH},
            "evaluation": {"samples": 0},
            "passes": [METHODS[method](share, dense)],
        }
        file = options.work / f"{output.name}.yaml"
        file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        run(["run", file, "--model", options.model, "--text", options.calibration, "--output", output, "--quiet"])
    return output


def task_files(folder: Path, work: Path) -> list[str]:
    """Writes what lm-eval is to be told of the tasks in a folder; their names."""
    names = []
    for file in sorted(folder.glob("*.jsonl")):
        told = {
            "task": file.stem,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(file.resolve())}},
            "output_type": "multiple_choice",
            "test_split": "test",
            "doc_to_text": ASKED.get(file.stem, "{{query}}\nAnswer:"),
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        }
        (work / f"{file.stem}.yaml").write_text(yaml.safe_dump(told), encoding="utf-8")
        names.append(file.stem)
    return names


def accuracies(model: Path, tokenizer: Path, options: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Of a model, in each task, with its standard error."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=options.dtype, trust_remote_code=True).eval()
    words = HFLM(pretrained=loaded, tokenizer=AutoTokenizer.from_pretrained(tokenizer), batch_size=16, device="cpu")
    with tempfile.TemporaryDirectory() as told, contextlib.redirect_stdout(sys.stderr):
        names = task_files(options.tasks, Path(told))
        tasks = TaskManager(include_path=told, include_defaults=False)
        found = simple_evaluate(words, tasks=names, task_manager=tasks, limit=options.limit)
    results = found["results"]
    return {name: (results[name]["acc_norm,none"], results[name]["acc_norm_stderr,none"]) for name in names}


def judged(model: Path, tokenizer: Path, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What a model loses and can do, measured once."""
    file = options.work / f"{name}.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    flags = ["--samples", JUDGED, "--length", LENGTH, "--dtype", options.dtype, "--json"]
    for text in options.texts:
        if text not in known:
            result = json.loads(run(["evaluate", model, "--text", text, *flags, "--trust-remote-code"]))
            known[text] = math.log(result["perplexity"])
            known["parameters"] = result["parameters"]
            file.write_text(json.dumps(known, indent=2))
    if options.tasks and known.get("limit", 0) != options.limit:  # of all examples, the limit is None
        known["tasks"], known["limit"] = accuracies(model, tokenizer, options), options.limit
        file.write_text(json.dumps(known, indent=2))
    return known


def row(name: str, share: float, seeds: list[dict], options: argparse.Namespace) -> list[str]:
    """A line of the table: means over seeds, of perplexities of the logarithm, with the spread."""
    cells = [f"{share:.2f}", name]
    for text in options.texts:
        losses = [each[text] for each in seeds]
        spread = f" ± {statistics.stdev(losses):.3f} nats" if len(losses) > 1 else ""
        cells.append(f"{math.exp(statistics.mean(losses)):.2f}{spread}")
    if options.tasks:
        means = [statistics.mean(value for value, _ in each["tasks"].values()) for each in seeds]
        errors = [
            math.sqrt(sum(error**2 for _, error in each["tasks"].values())) / len(each["tasks"]) for each in seeds
        ]
        each = [f"{statistics.mean(one['tasks'][task][0] for one in seeds):.3f}" for task in seeds[0]["tasks"]]
        cells += [*each, f"{statistics.mean(means):.3f} ± {statistics.mean(errors):.3f}"]
    return cells


def table(options: argparse.Namespace) -> str:
    """The table, row by row as it is measured."""
    source = options.work / "dense"
    if not source.is_dir():  # as a folder that transformers reads; nothing is cut
        save_dense(options, source)
    dense = {**judged(source, source, "dense", options), "parameters_of_layer": parameters_of_layer(source)}
    tasks = list(dense["tasks"]) if options.tasks else []
    head = ["share", "method", *(Path(text).stem for text in options.texts), *tasks, *(["mean"] if tasks else [])]
    rows = [head, row("dense model", 1.0, [dense], options)]
    for share in options.shares:
        for method in options.methods:
            seeds = []
            for seed in options.seeds:
                folder = made(method, share, seed, dense, options)
                seeds.append(judged(folder, source, folder.name, options))
            kept = statistics.mean(each["parameters"] for each in seeds) / dense["parameters"]
            rows.append(row(method, kept, seeds, options))
            print(" | ".join(rows[-1]), flush=True)
    return markdown(rows)


def save_dense(options: argparse.Namespace, folder: Path) -> None:
    """Saves the model itself as a folder."""
    from optimum_prune import Progress
    from optimum_prune.checkpoint.loading import load
    from optimum_prune.checkpoint.opening import open_checkpoint

    checkpoint = open_checkpoint(str(options.model))
    load(checkpoint, options.dtype, "cpu", Progress()).save_pretrained(folder)
    checkpoint.tokenizer().save_pretrained(folder)


def parameters_of_layer(folder: Path) -> int:
    """Of a decoder layer of a model."""
    from optimum_prune import Decoder
    from optimum_prune.hooks.plugins import load

    decoder = Decoder.of(AutoModelForCausalLM.from_pretrained(folder), load().families)
    return decoder.shape().layers[0].parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "calibration", "work"):
        parser.add_argument(name, type=Path)
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--tasks", type=Path, help="a folder of JSON lines")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.9, 0.8, 0.7])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--limit", type=int, help="examples of each task, the first")
    parser.add_argument("--dtype", default="bfloat16")
    fill(parser, "quality", table)


if __name__ == "__main__":
    main()

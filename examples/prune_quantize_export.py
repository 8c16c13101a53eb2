"""Prunes, quantizes and exports a model in one run, and writes down what happened as it happens.

    python examples/prune_quantize_export.py MODEL TEXT OUT

It needs the plugin onnx. The pruned checkpoint lies in OUT, the quantized graph in OUT/onnx; OUT/compression/report.json has every
figure.
"""

import json
import sys
import time
from pathlib import Path

from optimum_prune import Depth, Osscar, Pass, Progress, Recipe, Settings, Text, compress, hookimpl
from optimum_prune.hooks.plugins import load


class Tracker:
    """Hears every pass and writes a line of JSON for each, as an experiment tracker would."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.started = 0.0

    def log(self, **event: object) -> None:
        """Adds a line."""
        with self.file.open("a", encoding="utf-8") as opened:
            opened.write(json.dumps(event) + "\n")

    @hookimpl
    def before_pass(self, step: Pass, model: object) -> None:
        """An exception raised here would stop the run."""
        self.started = time.perf_counter()
        self.log(event="begins", name=step.name)

    @hookimpl
    def pass_finished(self, outcome) -> None:
        """What a pass from folder to folder wrote was run, and its figures are in `artefact`."""
        figures = (
            {}
            if outcome.artefact is None
            else {"perplexity": outcome.artefact.perplexity, "bytes": outcome.artefact.bytes}
        )
        self.log(event="ends", name=outcome.name, seconds=round(time.perf_counter() - self.started, 2), **figures)


def main(model: str, text: str, output: str) -> None:
    passes = load().passes
    recipe = Recipe(
        passes=(Depth(layers=2), Osscar(ratio=0.125), passes["onnx"](quantize="int8")),
        calibration=Text(text=text, samples=16, length=512),
        settings=Settings(model=model, dtype="bfloat16"),
    )
    report = compress(recipe, output, hooks=[Tracker(Path(f"{output}.jsonl"))], progress=Progress.for_terminal())
    print(report.table())


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Times OSSCAR against what it cannot do without, and against AMD Quark's if an interpreter that has it is named.

    python examples/benchmarks/osscar.py MODEL TEXT [--quark PYTHON] [--samples 16] [--length 512] [--width 1280]

Everything is measured in one run, on the same windows and in the same dtype; look at the ratios, not at the seconds.
"""

import copy
import time
from collections.abc import Callable

import torch
from common import arguments, opened, quark

from optimum_prune import Calibration, Osscar, Progress, layerwise, surgery
from optimum_prune.elimination import damped, eliminate
from optimum_prune.statistics import Gram


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    options = arguments(__doc__, samples=16, width=1280)
    model, family, windows = opened(options)
    dense_width = family.shape(model).layers[0].width
    step = Osscar(ratio=1 - options.width / dense_width, multiple_of=1)

    forward = seconds(lambda: plain_forward(model, windows))
    grams, gram_seconds = grams_of(model, family, windows)
    pruned = copy.deepcopy(model)
    whole = seconds(lambda: prune(pruned, family, windows, step))
    eliminating = cholesky = 0.0
    for layer, gram in zip(family.layers_of(model), grams, strict=True):
        weight = family.linear(layer, family.feed_forward.output).weight
        matrix = damped(gram, 0.01)
        eliminating += seconds(lambda m=matrix, w=weight: eliminate(m, w, options.width))
        cholesky += seconds(lambda m=matrix: torch.cholesky_inverse(torch.linalg.cholesky(m)))

    print(f"plain forward {forward:.1f} s, X'X of every layer {gram_seconds:.1f} s, the whole pass {whole:.1f} s")
    print(f"whole pass / (forward + X'X): {whole / (forward + gram_seconds):.2f}")
    print(f"elimination {eliminating:.1f} s; / (Cholesky + inverse of every layer): {eliminating / cholesky:.2f}")
    if options.quark:
        theirs, their_eliminating = quark("quark_osscar.py", options, windows.tokens, options.width)
        print(f"Quark: the whole pass {theirs:.1f} s, of which elimination {their_eliminating:.1f} s")
        print(f"Quark / ours: the whole pass {theirs / whole:.1f}, elimination {their_eliminating / eliminating:.1f}")


@torch.no_grad()
def plain_forward(model: torch.nn.Module, windows: Calibration) -> None:
    for tokens in windows.tokens.split(max(1, layerwise.TOKENS_PER_BATCH // windows.tokens.shape[1])):
        model(input_ids=tokens, use_cache=False)


def grams_of(model, family, windows):
    """The gram of every layer of the dense model, and the seconds of a plain `X'X` in float32."""
    grams, spent = [], 0.0
    for visit in layerwise.walk(model, family, windows, Progress(), ""):
        rows: list[torch.Tensor] = []
        visit.observe_channels(rows.append)
        gram = Gram(rows[0].shape[1], rows[0].device)
        for part in rows:
            gram.add(part)
            part = part.float()
            spent += seconds(lambda part=part: part.T @ part)
        grams.append(gram.value)
    return grams, spent


def prune(model, family, windows, step) -> None:
    for decision in step.decide(model, family, windows, Progress()):
        surgery.carry_out(model, family, decision)


if __name__ == "__main__":
    main()

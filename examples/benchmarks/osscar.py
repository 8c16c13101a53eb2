"""Times OSSCAR against what it cannot do without, and against AMD Quark's if an interpreter that has it is named.

    python examples/benchmarks/osscar.py MODEL TEXT [--quark PYTHON] [--samples 16] [--length 512] [--width 1280]

Everything is measured in one run, on the same windows and in the same dtype; look at the ratios, not at the seconds.
"""

import copy
import time
from collections.abc import Callable

import torch
from common import arguments, opened, quark

from optimum_prune import Calibration, Decoder, Osscar, PrunePass
from optimum_prune.anatomy.shape import FEED_FORWARD
from optimum_prune.anatomy.workload import TOKENS_PER_BATCH
from optimum_prune.refit.elimination import eliminate
from optimum_prune.refit.solving import damped
from optimum_prune.surgery.operation import carry_out


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    options = arguments(__doc__, samples=16, width=1280)
    decoder, calibration = opened(options)
    dense_width = decoder.shape().layers[0].units("channels")
    step = Osscar(ratio=1 - options.width / dense_width, multiple_of=1)

    forward = seconds(lambda: plain_forward(decoder, calibration))
    grams, gram_seconds = grams_of(decoder, calibration)
    pruned = copy.deepcopy(decoder)
    whole = seconds(lambda: prune(pruned, calibration, step))
    eliminating = cholesky = 0.0
    for layer, gram in zip(decoder.layers, grams, strict=True):
        weight = layer.linear_of(layer.axes["channels"].output).weight
        matrix = damped(gram, 0.01)
        eliminating += seconds(lambda m=matrix, w=weight: eliminate(m, w, options.width))
        cholesky += seconds(lambda m=matrix: torch.cholesky_inverse(torch.linalg.cholesky(m)))

    print(f"plain forward {forward:.1f} s, X'X of every layer {gram_seconds:.1f} s, the whole pass {whole:.1f} s")
    print(f"whole pass / (forward + X'X): {whole / (forward + gram_seconds):.2f}")
    print(f"elimination {eliminating:.1f} s; / (Cholesky + inverse of every layer): {eliminating / cholesky:.2f}")
    if options.quark:
        theirs, their_eliminating = quark("quark_osscar.py", options, calibration.tokens, options.width)
        print(f"Quark: the whole pass {theirs:.1f} s, of which elimination {their_eliminating:.1f} s")
        print(f"Quark / ours: the whole pass {theirs / whole:.1f}, elimination {their_eliminating / eliminating:.1f}")


@torch.no_grad()
def plain_forward(decoder: Decoder, calibration: Calibration) -> None:
    for tokens, _ in calibration.windows.batches(TOKENS_PER_BATCH):
        decoder.model(input_ids=tokens, use_cache=False)


@torch.no_grad()
def grams_of(decoder: Decoder, calibration: Calibration) -> tuple[list[torch.Tensor], float]:
    """The gram of every layer of the dense model, and the seconds of a plain `X'X` in float32."""
    grams, spent = [], 0.0
    for visit in calibration.walk(decoder, ""):
        grams.append(visit.gram(visit.layer.axes["channels"]).value)
        for rows, _ in visit.outputs(FEED_FORWARD):
            part = rows.float()
            spent += seconds(lambda part=part: part.T @ part)
    return grams, spent


def prune(decoder: Decoder, calibration: Calibration, step: PrunePass) -> None:
    for decision in step.decide(decoder, calibration):
        carry_out(decoder, decision)


if __name__ == "__main__":
    main()

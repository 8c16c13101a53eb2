"""Times the search for layers to leave out, exact and racing, against AMD Quark's if an interpreter that has it is named.

    python examples/benchmarks/depth.py MODEL TEXT [--quark PYTHON] [--samples 8] [--length 512] [--layers 3]

Everything is measured in one run, on the same windows and in the same dtype; look at the ratios, not at the seconds.
"""

import time

from common import arguments, opened, quark

from optimum_prune import Depth


def main() -> None:
    options = arguments(__doc__, samples=8, layers=3)
    decoder, calibration = opened(options)
    seconds = {}
    for search in ("exact", "racing"):
        step = Depth(layers=options.layers, search=search, heal=False)
        start = time.perf_counter()
        *_, decision = step.decide(decoder, calibration)
        seconds[search] = time.perf_counter() - start
        print(f"{search}: {seconds[search]:.1f} s, without layers {decision.evidence['dropped']}")
    if options.quark:
        theirs, *gone = quark("quark_depth.py", options, calibration.tokens, options.layers)
        print(f"Quark: {theirs:.1f} s, without layers {[int(index) for index in gone]}")
        print(", ".join(f"{search} / Quark: {ours / theirs:.2f}" for search, ours in seconds.items()))


if __name__ == "__main__":
    main()

"""Run by `test_processes.py` in one process, and in several under torchrun: prunes tiny models and saves what became of them.

process_runs.py FOLDER CASE ...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import tiny
import torch
from safetensors.torch import save_file

from optimum_prune import Depth, Osscar, Progress
from optimum_prune.anatomy.decoder import Decoder
from optimum_prune.builtin.prune.bernoulli import Bernoulli
from optimum_prune.builtin.prune.block_pruner import BlockPruner
from optimum_prune.builtin.prune.budget import Budget
from optimum_prune.builtin.prune.experts import ExpertPruner
from optimum_prune.builtin.prune.hidden import HiddenPruner
from optimum_prune.builtin.prune.sparsegpt import SparseGPT
from optimum_prune.builtin.prune.wanda import Wanda
from optimum_prune.evaluation.perplexity import perplexity
from optimum_prune.hooks.plugins import load
from optimum_prune.machine import processes
from optimum_prune.testing import pruned

CASES = {
    "osscar-uniform": ("llama", Osscar(ratio=0.25, head_ratio=0.5), tiny.windows(5)),
    "osscar-padded": ("llama-tied", Osscar(ratio=0.25), tiny.windows(5, padded=True)),
    "osscar-global": ("qwen3", Osscar(ratio=0.25, allocation="global"), tiny.windows(9)),
    "osscar-norm-behind": ("gemma2", Osscar(ratio=0.25, allocation="global"), tiny.windows(6)),
    "mixture": ("qwen3_moe", Osscar(ratio=0.25), tiny.windows(5)),
    "mixture-shared": ("deepseek_v3", Osscar(ratio=0.25), tiny.windows(2, 8)),
    "depth-racing": ("llama", Depth(layers=2), tiny.spoken(tiny.model("llama"), 15, 64, 1)),
    "depth-greedy": ("qwen2", Depth(layers=2, shape="greedy"), tiny.spoken(tiny.model("qwen2"), 13, 64, 1)),
    "depth-exact": ("llama", Depth(layers=2, search="exact"), tiny.windows(5, padded=True)),
    "depth-taylor": (
        "llama-tied",
        Depth(layers=2, shape="ranked", criterion="taylor", protect_first=0, protect_last=0),
        tiny.windows(5),
    ),
    "depth-angular": ("mistral", Depth(layers=2, criterion="angular"), tiny.windows(5)),
    "block-pruner": ("llama", BlockPruner(blocks=3), tiny.spoken(tiny.model("llama"), 13, 64, 1)),
    "wanda": ("llama", Wanda(ratio=0.5), tiny.windows(5, padded=True)),
    "sparsegpt": ("qwen3_moe", SparseGPT(pattern="2:4"), tiny.windows(5)),
    "experts": ("mixtral", ExpertPruner(keep=3), tiny.windows(5)),
    "hidden": ("llama-tied", HiddenPruner(size=24), tiny.windows(5, padded=True)),
    "bernoulli": ("llama", Bernoulli(ratio=0.25, steps=3, batch=60), tiny.windows(5)),
    "budget": ("llama", Budget(params=0.75, multiple_of=8), tiny.windows(9)),
    "budget-mixture": ("qwen3_moe", Budget(params=0.8, multiple_of=8, finalists=1), tiny.windows(5)),
    "one-window": ("llama", Osscar(ratio=0.25, allocation="global"), tiny.windows(1)),
    "one-window-depth": ("llama", Depth(layers=1), tiny.windows(1, 64)),
}


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    plugins = load()
    with processes.started():
        for case in sys.argv[2:]:
            family, step, windows = CASES[case]
            model = tiny.model(family)
            before = perplexity(model, windows, Progress()).value
            outcome = pruned(step, Decoder.of(model, plugins.families), windows, plugins)
            found = {
                "processes": processes.size(),
                "before": before,
                "after": perplexity(model, windows, Progress()).value,
                "cuts": outcome.cuts.to_json(),
                "evidence": list(outcome.evidence),
            }
            place = folder / f"{case}-{processes.rank()}"
            place.with_suffix(".json").write_text(json.dumps(found, default=str))
            save_file(
                {name: value.contiguous() for name, value in model.named_parameters()},
                place.with_suffix(".safetensors"),
            )


if __name__ == "__main__":
    main()

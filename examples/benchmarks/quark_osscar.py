"""Run by osscar.py with an interpreter that has amd-quark: prints the seconds of its OSSCAR, and of the elimination in it."""

import sys
import time

import torch
from quark.torch import ModelPruner
from quark.torch.algorithm.osscar.osscar import OSSCAR
from quark.torch.pruning.config import OSSCARConfig, PConfig
from transformers import AutoModelForCausalLM

folder, tokens, width, dtype = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
eliminating = 0.0
prune = OSSCAR.prune


def timed(*args, **kwargs):
    global eliminating
    start = time.perf_counter()
    result = prune(*args, **kwargs)
    eliminating += time.perf_counter() - start
    return result


OSSCAR.prune = timed
config = OSSCARConfig(
    inside_layer_modules=["mlp.down_proj"],
    mlp_pruning_modules=["mlp.down_proj"],
    mlp_scaling_layers={"mlp.down_proj": ["mlp.up_proj", "mlp.gate_proj"]},
    mlp_pruning_ratio=1 - int(width) / model.config.intermediate_size,
    mlp_intermediate_size_name="intermediate_size",
    model_decoder_layers="model.layers",
)
windows = torch.load(tokens)
loader = torch.utils.data.DataLoader(windows, batch_size=1)
start = time.perf_counter()
ModelPruner(PConfig(algo_config=config)).pruning_model(model, loader)
print("quark", time.perf_counter() - start, eliminating)

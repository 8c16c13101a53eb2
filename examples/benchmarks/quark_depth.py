"""Run by depth.py with an interpreter that has amd-quark: prints the seconds of its depth-wise search, and what it deletes."""

import sys
import time

import torch
from quark.torch import ModelPruner
from quark.torch.pruning.config import LayerImportancePruneConfig, PConfig
from transformers import AutoModelForCausalLM

folder, tokens, layers, dtype = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
kept = list(model.model.layers)
config = LayerImportancePruneConfig(
    delete_layer_num=int(layers),
    layer_num_field="num_hidden_layers",
    model_decoder_layers="model.layers",
    layer_norm_field="model.norm",
)
loader = list(torch.load(tokens).split(1))
start = time.perf_counter()
pruned = ModelPruner(PConfig(algo_config=config)).pruning_model(model, loader)
seconds = time.perf_counter() - start
left = {id(layer) for layer in pruned.model.layers}
gone = [index for index, layer in enumerate(kept) if id(layer) not in left]
print("quark", seconds, *gone)

"""Run by `test_pruned_across_processes.py` under torchrun: a step of distributed training of a checkpoint.

distributed_run.py FOLDER OUTPUT
"""

from __future__ import annotations

import sys

import tiny
import torch
from safetensors.torch import save_file
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM


def main(folder: str, output: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).train()
    parallel = DistributedDataParallel(model)
    own = tiny.windows(2).tokens[distributed.get_rank()][None]
    for _ in range(2):  # the second forward pass is where parameters without gradients are noticed
        parallel.zero_grad()
        parallel(input_ids=own, labels=own).loss.backward()
    if distributed.get_rank() == 0:
        save_file({name: each.grad.contiguous() for name, each in model.named_parameters()}, output)
    del parallel  # without its group, it sometimes waits for ever when it goes
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])

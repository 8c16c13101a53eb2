"""What may happen to the folder of a checkpoint."""

from __future__ import annotations

import json
from contextlib import contextmanager

import tiny
import torch
from safetensors.torch import load_file, save_file

from optimum_prune import Progress
from optimum_prune.checkpoint import loading, opening

CPU = "cpu"


def opened(folder, dtype="auto", weights=None):
    return loading.load(opening.open_checkpoint(str(folder)), dtype, CPU, Progress(), weights)


def edit(file, **changes):
    plain = json.loads(file.read_text())
    plain.update(changes)
    file.write_text(json.dumps({key: value for key, value in plain.items() if value is not None}))


@contextmanager
def stored(folder):
    """The weights of a checkpoint, by name; what becomes of them is saved."""
    weights = load_file(folder / "model.safetensors")
    yield weights
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def shard_missing(folder):
    tiny.save("llama", folder, max_shard_size="50KB")
    (folder / "model.safetensors").unlink()
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def header_broken(folder):
    (folder / "model.safetensors").write_bytes(b"\x00" * 5000)


def emptied(folder):
    (folder / "model.safetensors").write_bytes(b"")


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def tensor_missing(folder):
    with stored(folder) as weights:
        del weights["model.layers.2.self_attn.o_proj.weight"]


def tensor_added(folder):
    with stored(folder) as weights:
        weights["model.layers.2.stray.weight"] = torch.zeros(3)


def tensor_changed(folder):
    with stored(folder) as weights:
        weights["model.layers.2.mlp.down_proj.weight"][0, 0] += 0.05


def layers_swapped(folder):
    with stored(folder) as weights:
        a, b = "model.layers.2.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"
        weights[a], weights[b] = weights[b], weights[a]


def attention_silenced(folder):
    with stored(folder) as weights:
        weights["model.layers.3.self_attn.o_proj.weight"].zero_()


def tensor_of_another_shape(folder):
    edit(folder / "config.json", intermediate_size=48)


def too_many_layers(folder):
    edit(folder / "config.json", num_hidden_layers=7)


def too_few_layers(folder):
    edit(folder / "config.json", num_hidden_layers=5)


def other_rope(folder):
    edit(folder / "config.json", rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0})

"""Weights and activations on disk: the same result to the bit, and the memory given back."""

import hashlib
import json
import mmap
import struct
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from optimum_prune import Depth, Osscar, Recipe, Settings, Text, checkpoint, compress
from optimum_prune.anatomy import find_family
from optimum_prune.errors import CheckpointError, RecipeError
from optimum_prune.methods.block_pruner import BlockPruner
from optimum_prune.offload import Shelf, Store, held, weight_files, write
from optimum_prune.progress import Progress
from optimum_prune.recipe import size_of
from optimum_prune.surgery import carry_out


def digests(folder):
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.suffix in (".safetensors", ".json") and "compression" not in file.parts
    }


def resident(tensor):
    """How many of a mapped tensor's bytes are in memory; Linux only."""
    pages = range(tensor.data_ptr() // mmap.PAGESIZE, -(-(tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE))
    with Path("/proc/self/pagemap").open("rb", buffering=0) as opened:
        opened.seek(8 * pages[0])
        entries = struct.unpack(f"{len(pages)}Q", opened.read(8 * len(pages)))
    return sum(entry >> 63 for entry in entries) * mmap.PAGESIZE


@pytest.fixture
def recipe(text_file):
    def recipe(model, *passes, **settings):
        return Recipe(
            passes=passes,
            calibration=Text(text=str(text_file), samples=6, length=24),
            evaluation=Text(samples=4),
            settings=Settings(model=str(model), device="cpu", **settings),
        )

    return recipe


STEPS = [
    (Osscar(ratio=0.25, head_ratio=0.5),),
    (Osscar(ratio=0.25, allocation="global"),),
    (Depth(layers=2),),
    (Depth(layers=1, shape="ranked", criterion="taylor", protect_first=0, protect_last=0), Osscar(ratio=0.25)),
    (BlockPruner(blocks=2),),
]


@pytest.mark.parametrize("steps", STEPS, ids=lambda steps: "-".join(step.name for step in steps))
@pytest.mark.parametrize("memory", ["10KB", None])
def test_a_run_on_disk_writes_the_same_files(steps, memory, recipe, llama, tmp_path):
    compress(recipe(llama, *steps, offload=False), tmp_path / "resident")
    report = compress(recipe(llama, *steps, offload=True, memory=memory), tmp_path / "offloaded")
    assert digests(tmp_path / "offloaded") == digests(tmp_path / "resident")
    whole = json.loads((tmp_path / "resident/compression/report.json").read_text())
    assert report.perplexity.after.value == whole["perplexity"]["after"]


@pytest.mark.parametrize(
    "family", ["llama-tied", "qwen3", "gemma3", "opt", "gpt2", "mixtral", "qwen3_moe", "deepseek_v3"]
)
def test_of_every_kind_of_architecture(family, recipe, checkpoints, tmp_path):
    for offload in (False, True):
        step = Osscar(ratio=0.25)
        compress(recipe(checkpoints(family), step, offload=offload, dtype="bfloat16"), tmp_path / str(offload))
    assert digests(tmp_path / "True") == digests(tmp_path / "False")


def test_shards_are_read_and_written(recipe, tmp_path):
    tiny.save("llama", tmp_path / "model", max_shard_size="60KB")
    assert len(weight_files(tmp_path / "model")) > 2
    compress(recipe(tmp_path / "model", Depth(layers=1), offload=True), tmp_path / "out")
    compress(recipe(tmp_path / "model", Depth(layers=1)), tmp_path / "whole")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


class TestDamage:
    def test_a_shard_that_is_missing_is_named(self, recipe, tmp_path):
        tiny.save("llama", tmp_path / "model", max_shard_size="60KB")
        gone = weight_files(tmp_path / "model")[1]
        gone.unlink()
        with pytest.raises(CheckpointError, match=rf"lacks the weights file {gone.name}"):
            compress(recipe(tmp_path / "model", Depth(layers=1), offload=True), tmp_path / "out")

    def test_a_shard_that_ends_too_early_is_named(self, recipe, tmp_path):
        tiny.save("llama", tmp_path / "model")
        file = tmp_path / "model/model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
            compress(recipe(tmp_path / "model", Depth(layers=1), offload=True), tmp_path / "out")

    def test_a_weight_that_is_missing_is_named(self, llama, tmp_path):
        tiny.save("llama", tmp_path / "model")
        file = tmp_path / "model/model.safetensors"
        tensors = load_file(file)
        del tensors["model.layers.1.mlp.down_proj.weight"]
        save_file(tensors, file, metadata={"format": "pt"})
        opened = checkpoint.open_checkpoint(str(tmp_path / "model"))
        with pytest.raises(CheckpointError, match=r"missing.*layers\.1\.mlp\.down_proj"):
            checkpoint.load(opened, "auto", "cpu", Progress(), Store(tmp_path / "store"))

    def test_what_has_no_safetensors_cannot_stay_on_disk(self, recipe, tmp_path):
        tiny.save("llama", tmp_path / "model")
        (tmp_path / "model/model.safetensors").rename(tmp_path / "model/pytorch_model.bin")
        with pytest.raises(CheckpointError, match=r"has no safetensors file.*leave --offload out"):
            compress(recipe(tmp_path / "model", Depth(layers=1), offload=True), tmp_path / "out")


def test_a_size_has_a_unit_or_is_refused():
    assert [size_of(text) for text in ("8GiB", "500 MB", "1.5kib", "100")] == [2**33, 500_000_000, 1536, 100]
    with pytest.raises(RecipeError, match=r"'much' is no size"):
        Settings(memory="much")


class TestStore:
    @pytest.fixture
    def mapped(self, tmp_path):
        tensors = {"weight": torch.randn(512, 2048), "bias": torch.randn(512)}
        save_file(tensors, tmp_path / "file.safetensors")
        store = Store(tmp_path / "store")
        linear = nn.Linear(2048, 512)
        for name, tensor in store.map(tmp_path / "file.safetensors").items():
            getattr(linear, name).data = tensor
        return store, linear, tensors

    def test_a_layer_gives_its_memory_back_when_it_has_run(self, mapped):
        store, linear, tensors = mapped
        model = nn.ModuleDict({"layers": nn.ModuleList([linear])})
        store.attach(model)
        inputs = torch.randn(3, 2048)
        expected = nn.functional.linear(inputs, tensors["weight"], tensors["bias"])
        assert torch.equal(linear(inputs), expected)
        assert resident(linear.weight) < 2**18 < linear.weight.nbytes
        assert torch.equal(linear(inputs), expected)

    def test_a_layer_that_is_held_gives_its_memory_back_at_the_end(self, mapped):
        store, linear, _ = mapped
        store.attach(nn.ModuleDict({"layers": nn.ModuleList([linear])}))
        with held(linear):
            linear(torch.randn(3, 2048))
            assert resident(linear.weight) >= linear.weight.nbytes
        assert resident(linear.weight) == 0

    def test_what_changes_is_written_and_mapped_anew(self, mapped, tmp_path):
        store, linear, tensors = mapped
        linear.weight = nn.Parameter(linear.weight.detach()[:, ::2].clone())
        store.settle(linear)
        assert torch.equal(linear.weight, tensors["weight"][:, ::2])
        store.release(linear)
        assert resident(linear.weight) == 0
        assert torch.equal(linear.weight, tensors["weight"][:, ::2])
        assert len(list((tmp_path / "store").iterdir())) == 1
        store.settle(linear)  # nothing changed since
        assert len(list((tmp_path / "store").iterdir())) == 1


class TestShelf:
    def test_keeps_what_fits_in_memory_and_the_rest_in_files(self, tmp_path):
        shelf = Shelf(tmp_path / "shelf", 1000)
        small, large = torch.arange(100.0), torch.randn(300, 1000).bfloat16()
        assert shelf.keep(small) is small
        kept = shelf.keep(large)
        assert torch.equal(kept, large)
        shelf.put_back(kept)
        assert resident(kept) == 0
        assert torch.equal(kept, large)

    def test_has_room_again_when_something_is_gone(self, tmp_path):
        shelf = Shelf(tmp_path / "shelf", 1000)
        first = shelf.keep(torch.arange(200.0))
        second = torch.arange(200.0)
        assert shelf.keep(second) is not second
        del first
        assert shelf.keep(second) is second

    def test_leaves_no_file_behind(self, tmp_path):
        shelf = Shelf(tmp_path / "shelf", 0)
        kept = shelf.keep(torch.randn(10))
        assert list((tmp_path / "shelf").iterdir()) == []
        assert kept.shape == (10,)


class Watched(Shelf):
    """Knows how many bytes were kept at most, and how many of them were in memory whenever one more was."""

    def __init__(self, folder):
        super().__init__(folder, 0)
        self.kept = self.in_memory = 0
        self._live = []

    def keep(self, tensor):
        kept = super().keep(tensor)
        self._live = [other for other in self._live if other() is not None]
        self._live.append(weakref.ref(kept))
        self.kept = max(self.kept, sum(other().nbytes for other in self._live))
        self.in_memory = max(self.in_memory, sum(resident(other()) for other in self._live))
        return kept


@pytest.mark.skipif(sys.platform != "linux", reason="which pages are in memory is known on Linux only")
@pytest.mark.parametrize(
    "step",
    [
        Osscar(ratio=0.5, head_ratio=0.5),
        Osscar(ratio=0.5, correction=0.5),
        Depth(drop=(1,)),
        Depth(layers=1),
        Depth(layers=1, criterion="taylor", heal=False, protect_first=0, protect_last=0),
        Depth(layers=1, criterion="cosine", heal=False),
    ],
    ids=str,
)
def test_little_of_the_activations_is_in_memory_at_a_time(step, plugins, tmp_path):
    model = tiny.model("llama")
    shelf = Watched(tmp_path / "shelf")
    calibration = replace(tiny.windows(96, 128), shelf=shelf)  # 6 batches, a few of which a step works on
    family = find_family(model.config, plugins.families)
    for decision in step.decide(model, family, calibration, Progress()):
        carry_out(model, family, decision)
    assert shelf.kept > 1e6
    assert shelf.in_memory < 0.35 * shelf.kept


def test_files_are_written_as_safetensors_does(tmp_path):
    kinds = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
    kinds += [torch.int8, torch.uint8, torch.bool]
    tensors = {f"ünder {kind}": (10 * torch.randn(3, 5)).to(kind) for kind in kinds}
    tensors |= {"empty": torch.empty(0, 3), "scalar": torch.tensor(1.5), "strided": torch.randn(6, 4).T}
    write(tensors, tmp_path / "ours", {"format": "pt"})
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()

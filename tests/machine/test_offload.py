"""Weights and activations on disk: the same result to the bit, and the memory given back."""

import hashlib
import json
import sys
import weakref

import pytest
import tiny
from pages import resident
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_prune import Depth, Osscar, Recipe, Settings, Text, compress
from optimum_prune.anatomy.decoder import Decoder
from optimum_prune.builtin.prune.bernoulli import Bernoulli
from optimum_prune.builtin.prune.block_pruner import BlockPruner
from optimum_prune.builtin.prune.budget import Budget
from optimum_prune.builtin.prune.experts import ExpertPruner
from optimum_prune.builtin.prune.hidden import HiddenPruner
from optimum_prune.builtin.prune.sheared import Sheared
from optimum_prune.builtin.prune.sparsegpt import SparseGPT
from optimum_prune.builtin.prune.wanda import Wanda
from optimum_prune.builtin.recover.reconstruct import Reconstruct
from optimum_prune.calibration.calibration import Calibration
from optimum_prune.checkpoint import loading, opening, saving
from optimum_prune.errors import CheckpointError, RecipeError
from optimum_prune.machine.activation_store import ActivationStore, MappedActivations
from optimum_prune.machine.mapped_weights import MappedWeights
from optimum_prune.machine.progress import Progress
from optimum_prune.machine.tensor_files import weight_files
from optimum_prune.recipe import size_of
from optimum_prune.selection.otherwise import by_magnitude, chosen_otherwise
from optimum_prune.surgery.cuts import Cuts
from optimum_prune.surgery.operation import carry_out


def digests(folder):
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.suffix in (".safetensors", ".json") and "compression" not in file.parts
    }


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
    (Wanda(pattern="2:4"),),
    (SparseGPT(ratio=0.5),),
    (HiddenPruner(ratio=0.25),),
    (Bernoulli(ratio=0.25, steps=2),),
    (Budget(params=0.8, own_text=0.5, multiple_of=8),),
    (Sheared(layers=5, width=48, steps=2, batch=64),),
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


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2"])
def test_experts_leave_the_same_on_disk(family, recipe, checkpoints, tmp_path):
    for offload in (False, True):
        step = ExpertPruner(keep=3, allocation="global")
        compress(recipe(checkpoints(family), step, offload=offload), tmp_path / str(offload))
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
        opened = opening.open_checkpoint(str(tmp_path / "model"))
        with pytest.raises(CheckpointError, match=r"missing.*layers\.1\.mlp\.down_proj"):
            loading.load(opened, "auto", "cpu", Progress(), MappedWeights(tmp_path / "changed"))

    def test_what_has_no_safetensors_cannot_stay_on_disk(self, recipe, tmp_path):
        tiny.save("llama", tmp_path / "model")
        (tmp_path / "model/model.safetensors").rename(tmp_path / "model/pytorch_model.bin")
        with pytest.raises(CheckpointError, match=r"has no safetensors file.*leave --offload out"):
            compress(recipe(tmp_path / "model", Depth(layers=1), offload=True), tmp_path / "out")


def test_a_size_has_a_unit_or_is_refused():
    assert [size_of(text) for text in ("8GiB", "500 MB", "1.5kib", "100")] == [2**33, 500_000_000, 1536, 100]
    with pytest.raises(RecipeError, match=r"'much' is no size"):
        Settings(memory="much")


class Watched(ActivationStore):
    """Knows how many bytes were stored at most, and how many of them were in memory whenever one more was."""

    def __init__(self, folder):
        self.budget = 0
        self.stored = self.in_memory = 0
        self._mapped = MappedActivations(folder, 0)
        self._live = []

    def store(self, tensor):
        stored = self._mapped.store(tensor)
        self._live = [other for other in self._live if other() is not None]
        self._live.append(weakref.ref(stored))
        self.stored = max(self.stored, sum(other().nbytes for other in self._live))
        self.in_memory = max(self.in_memory, sum(resident(other()) for other in self._live))
        return stored

    def release(self, *tensors):
        self._mapped.release(*tensors)


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
    decoder = Decoder.of(tiny.model("llama"), plugins.families)
    activations = Watched(tmp_path / "activations")
    calibration = Calibration(tiny.windows(96, 128), activations)  # 6 batches, a few of which a step works on
    for decision in step.decide(decoder, calibration):
        carry_out(decoder, decision)
    assert activations.stored > 1e6
    assert activations.in_memory < 0.35 * activations.stored


@pytest.mark.skipif(sys.platform != "linux", reason="which pages are in memory is known on Linux only")
@pytest.mark.parametrize(
    "cuts",
    [
        Cuts.along("channels", {index: tuple(range(8)) for index in range(tiny.LAYERS)}),
        Cuts(layers=(0, 1, 2, 3)),
        Cuts(blocks={1: ("mlp",), 4: ("mlp",)}),
    ],
    ids=["units", "layers", "blocks"],
)
def test_weights_that_are_looked_at_to_choose_by_magnitude_are_given_back(cuts, wide, plugins, tmp_path):
    weights = MappedWeights(tmp_path / "changed")
    model = loading.load(opening.open_checkpoint(str(wide)), "auto", "cpu", Progress(), weights)
    weights.release(model)
    chosen_otherwise(Decoder.of(model, plugins.families), cuts, by_magnitude())
    in_memory = sum(resident(value) for value in model.model.layers.parameters())
    assert in_memory < 0.2 * sum(value.nbytes for value in model.model.layers.parameters())


@pytest.mark.skipif(sys.platform != "linux", reason="which pages are in memory is known on Linux only")
def test_what_was_reconstructed_is_not_in_memory_when_that_is_done(wide, recipe, tmp_path, monkeypatch):
    parts, save = [], saving.save

    def look(model, *arguments):
        weights = [value.data for value in model.model.layers.parameters() if value.ndim > 1]
        parts.append(sum(map(resident, weights)) / sum(value.nbytes for value in weights))
        return save(model, *arguments)

    monkeypatch.setattr(saving, "save", look)
    compress(recipe(wide, Depth(drop=(1,)), Reconstruct(steps=2), offload=True), tmp_path / "out")
    assert parts[0] < 0.2


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A checkpoint whose layers are many pages long, of which the system reads a few at a time."""
    folder = tiny.save("llama", tmp_path_factory.mktemp("wide"))  # for its tokenizer
    LlamaForCausalLM(LlamaConfig(**{**tiny.SIZES, "intermediate_size": 4096})).save_pretrained(folder)
    return folder

"""One rule says whether weights stay on disk, for plans and for runs."""

from dataclasses import replace

import pytest
import tiny
import torch

from optimum_prune import Depth, Recipe, Settings, Text, compress
from optimum_prune.errors import CheckpointError, RecipeError
from optimum_prune.machine.progress import Progress
from optimum_prune.plan.forecast import forecast
from optimum_prune.plan.offloading import Room, Weights, stays_on_disk
from optimum_prune.plan.source import open_source

GB = 10**9
WEIGHTS = Weights("some/model", size=14 * GB, local=True, mappable=True, converted=False)
HOST = Room("cpu", host=64 * GB)
ACCELERATOR = Room("cuda", host=2 * GB, accelerator=80 * GB)


@pytest.mark.parametrize(
    ("weights", "room", "expected"),
    [
        (WEIGHTS, HOST, False),
        (WEIGHTS, replace(HOST, host=20 * GB), False),
        (WEIGHTS, replace(HOST, host=19 * GB), True),
        (WEIGHTS, replace(HOST, on_host=4), True),
        (replace(WEIGHTS, mappable=False), replace(HOST, host=1 * GB), False),
        (WEIGHTS, ACCELERATOR, False),
        (replace(WEIGHTS, converted=True), replace(ACCELERATOR, host=15 * GB), False),
    ],
)
def test_weights_stay_on_disk_by_themselves_where_they_would_fill_the_hosts_memory(weights, room, expected):
    assert stays_on_disk(None, weights, room) is expected
    assert stays_on_disk(False, weights, room) is False


def test_they_stay_there_if_it_is_asked_for():
    assert stays_on_disk(True, WEIGHTS, HOST)
    with pytest.raises(RecipeError, match=r"takes a folder with safetensors files.*leave --offload out"):
        stays_on_disk(True, replace(WEIGHTS, local=False), HOST)
    with pytest.raises(RecipeError, match=r"the device is cuda.*Use --device cpu, or leave --offload out"):
        stays_on_disk(True, WEIGHTS, ACCELERATOR)


@pytest.mark.parametrize(
    ("weights", "room", "message"),
    [
        (
            WEIGHTS,
            replace(ACCELERATOR, accelerator=8 * GB),
            r"14\.0 GB on cuda, and 8\.0 GB are free on cuda: with --device cpu",
        ),
        (WEIGHTS, replace(ACCELERATOR, on_accelerator=6), r"80\.0 GB are free on cuda"),
        (
            replace(WEIGHTS, mappable=False),
            replace(ACCELERATOR, accelerator=8 * GB),
            r"use a smaller --dtype, or a device with more memory\.$",
        ),
        (replace(WEIGHTS, converted=True), ACCELERATOR, r"2\.0 GB are free on the host, where they are converted"),
    ],
)
def test_on_an_accelerator_what_does_not_fit_is_refused(weights, room, message):
    with pytest.raises(RecipeError, match=message) as caught:
        stays_on_disk(None, weights, room)
    assert "\n" not in str(caught.value)


@pytest.fixture
def recipe(llama, text_file):
    def recipe(model=llama, **settings):
        return Recipe(
            passes=(Depth(drop=(1,)),),
            calibration=Text(text=str(text_file), samples=4, length=24),
            evaluation=Text(samples=2),
            settings=Settings(model=str(model), **{"device": "cpu", **settings}),
        )

    return recipe


class TestAPlanAndItsRun:
    """agree, since the run carries out the plan."""

    @pytest.fixture
    def mapped(self, monkeypatch):
        """Whether each model that was loaded was mapped."""
        from optimum_prune.checkpoint import loading

        found, load = [], loading.load

        def counted(*arguments):
            found.append(arguments[-1] is not None)
            return load(*arguments)

        monkeypatch.setattr("optimum_prune.checkpoint.loading.load", counted)
        return found

    @pytest.mark.parametrize(("free", "offloaded"), [(10**12, False), (10**5, True)])
    def test_on_weights_on_disk(self, free, offloaded, recipe, plugins, mapped, monkeypatch, tmp_path):
        monkeypatch.setattr("optimum_prune.plan.offloading.free_memory", lambda: free)
        assert forecast(recipe(), plugins).offloaded is offloaded
        compress(recipe(), tmp_path / "out")
        assert mapped == [offloaded]

    def test_on_what_does_not_fit_on_an_accelerator(self, recipe, plugins, mapped, monkeypatch, tmp_path):
        small = Room("cuda", host=10**5, accelerator=10**5)
        monkeypatch.setattr("optimum_prune.plan.source.device_of", lambda settings: "cuda")
        monkeypatch.setattr(Room, "around", lambda device: small)
        for ask in (lambda: forecast(recipe(), plugins), lambda: compress(recipe(), tmp_path / "out")):
            with pytest.raises(RecipeError, match="are free on cuda: with --device cpu they can stay on disk"):
                ask()
        assert mapped == []
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("free", [10**12, 10**5])
    def test_on_weights_that_are_no_safetensors(self, free, recipe, plugins, mapped, monkeypatch, tmp_path):
        model = tiny.save("llama", tmp_path / "model")
        (model / "model.safetensors").unlink()
        torch.save(tiny.model("llama").state_dict(), model / "pytorch_model.bin")
        monkeypatch.setattr("optimum_prune.plan.offloading.free_memory", lambda: free)
        assert not forecast(recipe(model), plugins).offloaded
        compress(recipe(model), tmp_path / "out")
        assert mapped == [False]
        with pytest.raises(CheckpointError, match="has no safetensors file"):
            compress(recipe(model, offload=True), tmp_path / "again")


def test_the_size_of_weights_is_that_in_the_dtype_that_they_are_loaded_in(llama, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "optimum_prune.plan.source.stays_on_disk", lambda asked_for, weights, room: asked.append(weights) or False
    )
    for dtype in ("auto", "bfloat16"):
        open_source(Settings(model=str(llama), device="cpu", dtype=dtype), Progress())
    size = sum(parameter.nbytes for parameter in tiny.model("llama").parameters())
    assert [weights.size for weights in asked] == pytest.approx([size, size / 2], rel=0.05)
    assert [weights.converted for weights in asked] == [False, True]

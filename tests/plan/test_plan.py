"""A plan holds every decision of a run, and is made before a weight is read."""

import collections

import pytest
import tiny
import torch
from folder_passes import Archive, Halve
from transformers import AutoConfig

from optimum_prune import Depth, Osscar, Pruner, Recipe, Settings, Text, compress
from optimum_prune.builtin.prune.hidden import HiddenPruner
from optimum_prune.builtin.prune.sheared import Sheared
from optimum_prune.builtin.prune.wanda import Wanda
from optimum_prune.builtin.recover.distill import Distill
from optimum_prune.builtin.recover.reconstruct import Reconstruct
from optimum_prune.errors import OutputError, RecipeError
from optimum_prune.machine.progress import Progress
from optimum_prune.plan.plan import make_plan
from optimum_prune.plan.source import open_source
from optimum_prune.text.text import Wanted
from optimum_prune.text.windows import Texts


@pytest.fixture
def recipe(llama, text_file):
    def recipe(*passes, samples=4, length=24, **settings):
        return Recipe(
            passes=passes,
            calibration=Text(text=str(text_file), samples=samples, length=length),
            evaluation=Text(samples=2, length=16),
            settings=Settings(model=str(llama), device="cpu", **settings),
        )

    return recipe


@pytest.fixture
def planned(plugins):
    def planned(recipe, texts=None):
        return make_plan(recipe, plugins, open_source(recipe.settings, Progress()), texts)

    return planned


@pytest.fixture
def nothing_loads(monkeypatch):
    def load(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr("optimum_prune.checkpoint.loading.load", load)


def test_it_says_what_will_be_done_and_reads_no_weight(recipe, planned, nothing_loads):
    plan = planned(recipe(Osscar(ratio=0.25), Depth(layers=2), Halve(), Archive(), dtype="bfloat16", memory="1MB"))
    assert [len(shape.layers) for shape in plan.shapes] == [6, 6, 4, 4, 4]
    assert (plan.dtype, plan.device, plan.offloads, plan.activation_budget) == (torch.bfloat16, "cpu", False, 10**6)
    assert (plan.calibration, plan.evaluation) == (Wanted(4, 24), Wanted(2, 16))
    assert plan.disk == 2 * plan.shapes[-1].parameters
    assert plan.teacher_bytes == 0


def test_given_windows_are_the_windows(recipe, planned):
    plan = planned(recipe(Depth(layers=1)), Texts(tiny.windows(5, 12), None))
    assert plan.calibration == Wanted(5, 12)
    assert plan.evaluation.windows == 0


@pytest.mark.parametrize(
    ("passes", "options", "message"),
    [
        ((Depth(layers=6),), {}, "6 layers of 6"),
        ((Halve(group_size=24),), {}, "hidden size of the model will be 32"),
        (
            (HiddenPruner(size=24), Reconstruct()),
            {},
            "'reconstruct' compares hidden states with those of the dense model, which have 32 features, .* will have 24",
        ),
        ((Sheared(hidden_size=24), Distill(hidden=0.5)), {}, "'distill' compares hidden states"),
        ((HiddenPruner(ratio=0.99),), {}, "hidden has ratio 0.99, and of 32 features from 4 to 28 can be kept"),
        ((HiddenPruner(params=0.9999),), {}, "hidden has params 0.9999, and of 32 features from 4 to 28 can be kept"),
        ((Wanda(ratio=0.001),), {}, "ratio 0.001, by which no row of a matrix would lose one of its weights"),
        (
            (Depth(layers=1),),
            {"length": 1000},
            "Windows of 1000 tokens are asked for, and the model takes at most 128",
        ),
    ],
)
def test_whatever_would_fail_is_refused_before_a_weight_is_read(
    passes, options, message, recipe, planned, nothing_loads, tmp_path
):
    asked = recipe(*passes, **options)
    for ask in (lambda: planned(asked), lambda: compress(asked, tmp_path / "out")):
        with pytest.raises(RecipeError, match=message):
            ask()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_refused_before_a_weight_is_read(recipe, nothing_loads, monkeypatch, tmp_path):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr("optimum_prune.plan.checks.shutil.disk_usage", lambda folder: usage(0, 0, 1000))
    with pytest.raises(OutputError, match=r"takes 0\.0 GB on disk, and .* has 0\.0 GB left\. Make room"):
        compress(recipe(Depth(layers=1)), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_model_in_memory_is_planned_too(plugins):
    model = tiny.model("qwen2")
    pruner = Pruner.from_pretrained(model)
    plan = make_plan(Recipe(passes=(Depth(layers=1),), settings=pruner.settings), plugins, pruner.source)
    assert plan.shapes[0].parameters == model.num_parameters()
    assert (plan.source.in_memory, plan.offloads) == (True, False)


def test_nothing_but_the_config_is_needed_to_forecast(llama, tmp_path):
    AutoConfig.from_pretrained(llama).save_pretrained(tmp_path)
    source = open_source(Settings(model=str(tmp_path), device="cpu"), Progress(), config_only=True)
    assert source.tokenizer is None
    assert source.mappable  # as far as anybody can say

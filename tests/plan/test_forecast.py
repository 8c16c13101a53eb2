from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from optimum_prune import Cuts, Decision, Depth, Osscar, PrunePass, Recipe, RecoverPass, Settings, Text
from optimum_prune.anatomy.decoder import Decoder
from optimum_prune.anatomy.shape import Shape
from optimum_prune.anatomy.workload import Workload
from optimum_prune.builtin.prune.bernoulli import Bernoulli
from optimum_prune.builtin.prune.block_pruner import BlockPruner
from optimum_prune.builtin.prune.budget import Budget
from optimum_prune.builtin.prune.hidden import HiddenPruner
from optimum_prune.builtin.prune.sheared import Sheared
from optimum_prune.builtin.prune.sparsegpt import SparseGPT
from optimum_prune.builtin.prune.wanda import Wanda
from optimum_prune.calibration.stream import walk_cost
from optimum_prune.checkpoint.opening import meta_model
from optimum_prune.checkpoint.saving import weight_bytes
from optimum_prune.cli.main import main
from optimum_prune.hooks.plugins import load
from optimum_prune.plan.forecast import duration, forecast
from optimum_prune.plan.speed import Speed

WORK = Workload(hidden=512, vocabulary=32000, itemsize=2, windows=16, length=512)
STEPS = [
    Osscar(ratio=0.25),
    Osscar(ratio=0.25, head_ratio=0.5, correction=0.2),
    Osscar(ratio=0.25, allocation="global"),
    Depth(layers=2),
    Depth(layers=2, shape="greedy", search="exact"),
    Depth(layers=2, shape="ranked", heal=False),
    Depth(layers=2, criterion="taylor", protect_first=0, protect_last=0),
    Depth(layers=2, criterion="cosine"),
    Depth(drop=(1,)),
    BlockPruner(blocks=2),
    Wanda(ratio=0.5),
    SparseGPT(pattern="2:4"),
    HiddenPruner(ratio=0.25),
    Bernoulli(ratio=0.25, layers=1),
    Budget(params=0.8),
    Sheared(layers=5, width=768),
]
SPEED = Speed(products=1e-11, elements=1e-9, statistics=1e-11, solving=1e-10, reading=1e-9)


def shape_of(width: int = 1024, layers: int = 6, hidden: int = 512) -> Shape:
    """That of a Llama whose weights nobody makes."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
    )
    return Decoder.of(meta_model(config), load().families).shape()


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_more_text_and_wider_layers_never_cost_less(step):
    plain = step.estimate(shape_of(), WORK)
    larger = {
        "more windows": step.estimate(shape_of(), replace(WORK, windows=64)),
        "longer windows": step.estimate(shape_of(), replace(WORK, length=1024)),
        "wider": step.estimate(shape_of(width=4096), WORK),
        "in float32": step.estimate(shape_of(), replace(WORK, itemsize=4)),
        "deeper": step.estimate(shape_of(layers=12), WORK),
    }
    for what, cost in larger.items():
        assert cost.memory >= plain.memory, what
        assert SPEED.seconds(cost) >= SPEED.seconds(plain), what
    for what in ("more windows", "longer windows"):
        assert larger[what].memory > plain.memory or step.name in ("osscar", "bernoulli", "sheared", "budget"), what
        assert SPEED.seconds(larger[what]) > SPEED.seconds(plain), what


@pytest.mark.parametrize("step", [Osscar(ratio=0.25), Depth(drop=(1,))], ids=str)
def test_offloaded_the_peak_does_not_depend_on_the_number_of_layers(step):
    work = replace(WORK, offloaded=True)
    few, many = (step.estimate(shape_of(layers=layers), work) for layers in (4, 40))
    assert many.memory == few.memory
    assert few.reading > 0
    assert walk_cost(work, shape_of()).memory > walk_cost(WORK, shape_of()).memory  # a layer is part of it


def test_a_pass_that_does_not_say_costs_a_walk():
    class Strange(PrunePass):
        name = "strange"

        def foresee(self, shape):
            return shape

        def decide(self, decoder, calibration):
            yield Decision(Cuts())

    assert Strange().estimate(shape_of(), WORK) == walk_cost(WORK, shape_of())


def test_a_pass_that_recovers_and_does_not_say_costs_a_walk_through_both_models():
    class Alone(RecoverPass):
        name = "alone"
        needs_teacher = False

        def recover(self, recovery):
            return {}

    class Taught(Alone):
        name = "taught"
        needs_teacher = True

    assert Alone().estimate(shape_of(), WORK) == walk_cost(WORK, shape_of())
    assert Taught().estimate(shape_of(), WORK) == walk_cost(WORK, shape_of(), streams=2)


def test_a_plan_knows_the_bytes_of_the_weights_without_them(llama, tmp_path, plugins):
    shutil.copy(llama / "config.json", tmp_path)
    settings = Settings(model=str(tmp_path), device="cpu")
    found = forecast(Recipe(passes=(Depth(drop=(1, 2)),), settings=settings), plugins)
    model = AutoModelForCausalLM.from_pretrained(llama)
    assert found.phases[0].shape.parameters * found.itemsize == weight_bytes(model)
    assert (found.windows, found.length) == (128, model.config.max_position_embeddings)


def test_a_plan_as_json_has_every_figure(llama, text_file, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("passes: [osscar: {ratio: 0.5}, depth: {layers: 1}]")
    flags = ["--model", str(llama), "--text", str(text_file), "--samples", "4", "--length", "32", "--device", "cpu"]
    assert main(["compress", "plan", str(recipe), *flags, "--eval-samples", "0", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [step["name"] for step in plan["steps"]] == ["loading", "osscar", "depth", "saving", "verification"]
    assert [plan[key] for key in ("windows", "length", "evaluation_windows")] == [4, 32, 0]
    assert plan["peak_memory"] == max(step["peak_memory"] for step in plan["steps"])
    assert plan["steps"][2]["bound"] == "at most"
    assert plan["steps"][2]["layers"] == tiny.LAYERS - 1
    assert plan["steps"][1]["width"] == [32] * tiny.LAYERS
    assert plan["disk"] == plan["steps"][2]["bytes"]


def test_what_does_not_fit_is_said_with_a_remedy(llama, plugins):
    recipe = Recipe(passes=(Osscar(ratio=0.5),), settings=Settings(model=str(llama), device="cpu"))
    found = forecast(recipe, plugins)
    assert "--offload" in found.remarks(free=found.memory - 1, room=2**40)[-1]
    assert "--output elsewhere" in found.remarks(free=2**60, room=found.disk - 1)[-1]
    assert len(found.remarks(free=2**60, room=2**60)) == 2


def test_a_duration_has_a_unit_that_suits_it():
    assert [duration(seconds) for seconds in (0.1, 90, 200, 8000)] == ["1 s", "90 s", "3 min", "2 h"]


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a stretch of a process is known on Linux only")
@pytest.mark.parametrize("offload", [False, True])
def test_the_peak_memory_of_a_run_is_as_planned(offload, tmp_path, text_file, plugins):
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 3, "vocab_size": tiny.VOCABULARY}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 1024}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    text = Text(text=str(text_file), samples=16, length=256)
    settings = Settings(model=str(tmp_path / "model"), device="cpu", offload=offload)
    recipe = Recipe(
        passes=(Osscar(ratio=0.5, one_shot=True),), calibration=text, evaluation=Text(samples=2), settings=settings
    )
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())

    recipe_file, out = str(tmp_path / "recipe.yaml"), tmp_path / "out"
    code = (
        f"from optimum_prune.cli.main import main; main(['compress', 'plan', {recipe_file!r}, '--json']); "
        f"main(['compress', 'run', {recipe_file!r}, '--output', {str(out)!r}, '--quiet'])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=os.environ)
    planned = json.loads(done.stdout)
    (measured,) = json.loads((out / "compression" / "report.json").read_text())["passes"]
    (step,) = [step for step in planned["steps"] if step["name"] == "osscar"]
    assert step["peak_memory"] == pytest.approx(measured["peak_memory"], rel=0.2)

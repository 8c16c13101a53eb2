"""Passes that train, through recipes: what was lost comes back, a model never ends worse, and a killed run goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import tiny
import torch
import yaml
from folder_passes import Archive
from trained import digests, dying, trained

from optimum_prune import Depth, Osscar, Pruner, Recipe, Settings, Text, compress, load_model
from optimum_prune.anatomy.decoder import Decoder
from optimum_prune.builtin.prune.block_pruner import BlockPruner
from optimum_prune.builtin.prune.wanda import Wanda
from optimum_prune.builtin.recover.distill import Distill
from optimum_prune.builtin.recover.pretrain import Pretrain
from optimum_prune.builtin.recover.reconstruct import Reconstruct
from optimum_prune.errors import RecipeError, TextError
from optimum_prune.machine import interrupts
from optimum_prune.machine.progress import Progress
from optimum_prune.plan.forecast import forecast
from optimum_prune.report.report import Report
from optimum_prune.text.training import DomainText, Training
from optimum_prune.text.windows import Domain, Texts, Windows
from optimum_prune.training.lesson import Lesson
from optimum_prune.training.student import Student
from optimum_prune.training.watch import Watch

DEPTH = Depth(drop=(2, 3))
SHORT = {"steps": 12, "batch": 256, "learning_rate": 1e-3, "patience": 100}


@pytest.mark.parametrize(
    "step",
    [Distill(**SHORT), Pretrain(**SHORT), Distill(**SHORT, precompute=True, top=50)],
    ids=["distill", "pretrain", "kept"],
)
@pytest.mark.parametrize("name", ["llama-tied", "qwen3_moe"])
def test_a_model_is_trained_saved_and_reported(name, step, recipe, tmp_path):
    report = compress(recipe(DEPTH, step, name=name), tmp_path / "out")
    found = trained(report)
    losses = [loss for _, loss, _ in found["losses"]]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert found["held_out"]["after"] <= found["held_out"]["before"]
    assert found["steps"] == 12
    assert found["tokens"] == 12 * 256
    assert any(f"{step.name}: " in note and "perplexity on the end of" in note for note in report.notes())
    assert Report.read(tmp_path / "out").passes[-1].plain_evidence()[0]["trained"] == found
    model = load_model(tmp_path / "out")
    if name == "llama-tied":
        assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sorted(each.name for each in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize(
    "prune", [BlockPruner(blocks=2), Osscar(ratio=0.25, allocation="global")], ids=["blocks", "widths"]
)
def test_a_model_whose_layers_differ_is_trained(prune, recipe, tmp_path):
    report = compress(recipe(prune, Reconstruct(steps=4), Pretrain(**SHORT)), tmp_path / "out")
    assert trained(report)["held_out"]["after"] < trained(report)["held_out"]["before"]
    assert not report.stock


def test_training_that_diverges_gives_the_model_back_as_it_was(recipe, tmp_path):
    compress(recipe(DEPTH), tmp_path / "pruned")
    report = compress(recipe(DEPTH, Distill(steps=12, batch=256, learning_rate=1.0)), tmp_path / "out")
    assert digests(tmp_path / "out") == digests(tmp_path / "pruned")
    assert any("so the model is as it was" in note for note in report.notes())


@pytest.mark.parametrize(("step", "precompute"), [(3, True), (9, False)])
def test_a_run_that_was_killed_while_it_trained_goes_on(step, precompute, recipe, tmp_path, monkeypatch):
    wanted = recipe(
        DEPTH, Reconstruct(steps=4), Distill(**SHORT, precompute=precompute, checkpoint_minutes=0), Archive()
    )
    whole = compress(wanted, tmp_path / "whole")
    with dying(step):
        compress(wanted, tmp_path / "out")
    assert (tmp_path / "out.unfinished/training/2-distill").is_dir()
    steps, seen = [], Watch.on_step_end

    def see(self, args, state, control, **rest):
        steps.append(state.global_step)
        return seen(self, args, state, control, **rest)

    monkeypatch.setattr(Watch, "on_step_end", see)
    report = compress(wanted, tmp_path / "out")
    assert steps == list(range(step, 13))
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert trained(report, 2)["losses"] == trained(whole, 2)["losses"]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.parametrize("at", [0, 5, 11])
def test_a_training_that_is_stopped_ends_behind_the_step_at_hand_and_keeps_its_state(
    at, recipe, tmp_path, monkeypatch
):
    wanted, steps, begun = recipe(DEPTH, Pretrain(**SHORT)), [], Student.begin
    whole = compress(wanted, tmp_path / "whole")

    def stop(self, step, part):
        steps.append(step)
        if step == at:
            signal.raise_signal(signal.SIGINT)
        return begun(self, step, part)

    monkeypatch.setattr(Student, "begin", stop)
    kept = f"What was done so far is kept in {tmp_path / 'out'}.unfinished; the same command goes on from there."
    with interrupts.raised(), pytest.raises(KeyboardInterrupt, match=kept):
        compress(wanted, tmp_path / "out")
    assert steps[-1] == at
    monkeypatch.setattr(Student, "begin", begun)
    with interrupts.raised():
        report = compress(wanted, tmp_path / "out")
    assert trained(report)["losses"] == trained(whole)["losses"]
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_the_state_before_goes_only_when_the_next_is_whole(recipe, tmp_path, monkeypatch):
    wanted, write, steps = recipe(DEPTH, Pretrain(**SHORT, checkpoint_minutes=0)), Watch.write_state, []
    whole = compress(wanted, tmp_path / "whole")

    def die(self, place):
        if place.name == "checkpoint-7":
            raise KeyboardInterrupt
        write(self, place)

    monkeypatch.setattr(Watch, "write_state", die)
    with pytest.raises(KeyboardInterrupt):
        compress(wanted, tmp_path / "out")
    monkeypatch.setattr(Watch, "write_state", write)
    begun = Student.begin
    monkeypatch.setattr(Student, "begin", lambda self, step, part: steps.append(step) or begun(self, step, part))
    assert trained(compress(wanted, tmp_path / "out"))["losses"] == trained(whole)["losses"]
    assert steps[0] == 6
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_a_training_that_comes_first_keeps_its_state_too(recipe, tmp_path, monkeypatch):
    wanted, begun = recipe(Pretrain(**SHORT)), Student.begin

    def stop(self, step, part):
        if step == 2:
            signal.raise_signal(signal.SIGINT)
        return begun(self, step, part)

    monkeypatch.setattr(Student, "begin", stop)
    with interrupts.raised(), pytest.raises(KeyboardInterrupt, match="is kept in"):
        compress(wanted, tmp_path / "out")
    monkeypatch.setattr(Student, "begin", begun)
    said = []
    monkeypatch.setattr(Progress, "say", lambda _, sentence: said.append(sentence))
    compress(wanted, tmp_path / "out")
    assert any("Training goes on from the state in" in sentence for sentence in said)


def test_reconstruction_brings_layers_nearer_to_the_dense_model(recipe, tmp_path):
    report = compress(recipe(replace(DEPTH, heal=False), Reconstruct(steps=30)), tmp_path / "out")
    assert any("blocks came nearer to the dense model" in note for note in report.notes())
    layers = report.passes[-1].plain_evidence()[0]["reconstructed"]
    assert list(layers) == ["0", "1", "2", "3"]
    errors = [block for layer in layers.values() for block in layer.values()]
    assert all(block["after"] <= block["before"] for block in errors)
    assert sum(block["after"] for block in errors) < 0.99 * sum(block["before"] for block in errors)


@pytest.mark.parametrize("step", [Reconstruct(steps=4), Distill(**SHORT)], ids=["reconstruct", "distill"])
@pytest.mark.parametrize("stay", [True, False])
def test_zeros_of_a_mask_stay_zero(step, stay, recipe, tmp_path):
    compress(recipe(Wanda(pattern="3:4"), replace(step, keep_zeros=stay)), tmp_path / "out")
    left = [layer.mlp.up_proj.weight for layer in load_model(tmp_path / "out").model.layers]
    assert all(((weight == 0).float().mean() >= 0.25) == stay for weight in left)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "mixtral", "opt-post-norm"])
def test_reconstruction_with_weights_on_disk_is_that_in_memory(name, recipe, tmp_path):
    outs = []
    for offload in (False, True):
        outs.append(tmp_path / str(offload))
        compress(recipe(DEPTH, Reconstruct(steps=4), name=name, offload=offload), outs[-1])
    assert digests(outs[0]) == digests(outs[1])


# Text to train on


def test_without_a_text_it_trains_on_what_passes_choose_by_and_never_on_what_is_reported_on(
    recipe, tmp_path, text_file
):
    report = compress(recipe(DEPTH, Pretrain(**SHORT), training=Training()), tmp_path / "out")
    assert trained(report)["held_out"]["text"] == f"the end of {text_file.name}"
    assert report.perplexity.after.text == f"the end of {text_file.name}"


def test_what_is_reported_on_is_not_trained_on(recipe, other_text_file):
    with pytest.raises(RecipeError, match="must not be what it is"):
        replace(recipe(Pretrain()), evaluation=Text(text=str(other_text_file)))


def domains(*files, **options):
    return Training(domains=tuple(DomainText(text=str(file), **each) for file, each in files), length=16, **options)


def test_weights_move_to_the_domain_that_is_far_from_its_reference(recipe, text_file, other_text_file, tmp_path):
    mixed = domains(
        (text_file, {"reference": 100.0}), (other_text_file, {"reference": 1.0}), dynamic=True, update_every=3
    )
    found = trained(compress(recipe(DEPTH, Pretrain(**SHORT), training=mixed), tmp_path / "out"))["domains"]
    assert found["names"] == [text_file.name, other_text_file.name]
    assert [step for step, _, _ in found["moves"]] == [3, 6, 9, 12]
    assert all(weights[1] > 0.9 for _, _, weights in found["moves"])


def test_the_dense_model_tells_the_references_that_are_not_given(recipe, text_file, other_text_file, tmp_path):
    mixed = domains(
        (text_file, {"weight": 0.5}),
        (other_text_file, {"weight": 0.5, "reference": 2.0}),
        dynamic=True,
        update_every=6,
    )
    found = trained(compress(recipe(DEPTH, Pretrain(**SHORT), training=mixed), tmp_path / "out"))["domains"]
    assert found["references"][0] == pytest.approx(6, abs=1)
    assert found["references"][1] == 2.0


@pytest.mark.parametrize(
    ("training", "why"),
    [
        ({"domains": [{"dataset": "a", "weight": 0.5}, {"dataset": "b", "weight": 0.9}]}, "should sum to 1"),
        ({"domains": [{"dataset": "a", "weight": 0.5}, {"dataset": "b"}]}, "should sum to 1"),
        ({"domains": [{"dataset": "a"}, {"dataset": "a"}]}, "called the same"),
        ({"domains": [{"dataset": "a"}], "dynamic": True}, "no two domains"),
        ({"domains": [{"dataset": "a"}], "dataset": "b"}, "and domains besides"),
        ({"domains": "wiki"}, "Write a list"),
        ({"domain": []}, "No option of training is called 'domain'"),
        ({"domains": [{"texts": "a"}]}, "No option of domain 1 of the training text is called 'texts'"),
        ({"update_every": 0}, "at least 1"),
        ({"samples": 0}, "0 windows of the training text"),
        ({"domains": [{"name": "web"}, {"dataset": "b"}]}, "The domain 'web' names no text"),
        ({"domains": [{"dataset": "b"}, {"weight": 0.5}]}, "Domain 2 of the training text names no text"),
        ({"domains": [{"dataset": "a", "samples": 0}, {"dataset": "b"}]}, "0 windows of the training text a:train"),
        ([], "name: value"),
    ],
)
def test_training_texts_that_cannot_be_are_refused(training, why, plugins):
    with pytest.raises(RecipeError, match=why):
        Recipe.from_dict({"passes": ["pretrain"], "training": training}, plugins)


def test_a_tracker_that_is_none_or_not_installed_is_refused_before_anything_runs(recipe, tmp_path):
    with pytest.raises(RecipeError, match=r"report to 'tensorbord', which is no tracker.*tensorboard"):
        Distill(report_to=("tensorbord",))
    with pytest.raises(RecipeError, match=r"'distill' needs swanlab, which is not installed here. Run: pip install"):
        forecast(recipe(DEPTH, Distill(report_to=("swanlab",))))


def test_a_text_that_is_too_short_is_refused_before_the_passes(recipe, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text(tiny.text(8))
    with pytest.raises(TextError, match="too few"):
        compress(recipe(DEPTH, Pretrain(), training=Training(text=str(short), length=32)), tmp_path / "out")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["short.txt"]


def test_a_recipe_says_again_what_it_trains_on(plugins):
    plain = {"passes": ["pretrain"], "training": {"domains": [{"dataset": "a"}, {"dataset": "b"}], "dynamic": True}}
    made = Recipe.from_dict(plain, plugins)
    assert Recipe.from_dict(yaml.safe_load(made.to_yaml()), plugins) == made
    assert "training" not in yaml.safe_load(
        Recipe.from_dict({"passes": ["depth"]} | {"passes": [{"depth": {"layers": 1}}]}, plugins).to_yaml()
    )


# Options


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"minutes": 0}, "above 0"),
        ({"steps": 0}, "at least 1"),
        ({"steps": 3, "tokens": 5}, "Give one of them"),
        ({"learning_rate": 0}, "above 0"),
        ({"alpha": 2}, "at most 1"),
        ({"schedule": "cosinus"}, "Did you mean 'cosine'"),
    ],
)
def test_options_that_cannot_be_are_refused(options, why):
    with pytest.raises(RecipeError, match=why):
        Distill(**options)


@pytest.mark.parametrize(
    ("options", "steps", "tokens"),
    [
        ({"tokens": 131072}, 64, 131072),
        ({"tokens": 10**8}, 1526, 1526 * 65536),
        ({"steps": 1000}, 1000, 1000 * 2048),
        ({"steps": 10, "batch": 4096}, 10, 10 * 4096),
        ({"epochs": 2, "batch": 512}, 20, 10240),
        ({}, 70, 70 * 14336),
    ],
)
def test_a_budget_is_kept_whatever_it_is_given_in(options, steps, tokens, plugins, tmp_path):
    windows = Windows.from_tokens(torch.zeros(20, 256, dtype=torch.long))
    decoder = Decoder.of(tiny.model("llama"), plugins.families)
    found = Distill(**options).scheduled(decoder, Lesson((Domain("one", windows, windows),), tmp_path))
    assert found.steps == steps
    assert found.steps * found.windows * 256 == tokens


def test_the_plan_knows_what_training_takes(recipe, plugins):
    def planned(tokens):
        found = forecast(recipe(DEPTH, Reconstruct(), Distill(tokens=tokens)), plugins)
        return {phase.name: phase for phase in found.phases}

    many, few = planned(10**9), planned(10**6)
    assert many["distill"].seconds > 100 * few["distill"].seconds
    assert many["distill"].memory == pytest.approx(few["distill"].memory, rel=0.05)
    assert many["distill"].memory > many["depth"].memory


def test_epochs_and_minutes_are_budgets_too(recipe, tmp_path):
    report = compress(recipe(DEPTH, Pretrain(epochs=0.5, batch=256)), tmp_path / "epochs")
    whole = compress(recipe(DEPTH, Pretrain(epochs=1, batch=256)), tmp_path / "epoch")
    assert trained(whole)["tokens"] == pytest.approx(2 * trained(report)["tokens"], abs=512)
    assert trained(compress(recipe(DEPTH, Pretrain(minutes=0.01)), tmp_path / "minutes"))["steps"] >= 1
    assert (
        json.loads((tmp_path / "minutes/compression/report.json").read_text())["passes"][1]["options"]["minutes"]
        == 0.01
    )


DYING = """
import os, signal, sys
from optimum_prune.cli.main import main
from optimum_prune.training.watch import Watch

seen = Watch.on_step_end

def die(self, args, state, control, **rest):
    if state.global_step == int(os.environ["DIES_AT"]) and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return seen(self, args, state, control, **rest)

Watch.on_step_end = die
sys.exit(main(sys.argv[1:], program="optimum-prune"))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="processes are killed as POSIX does")
def test_two_processes_train_as_one_does_and_go_on_when_one_was_killed(recipe, tmp_path):
    wanted = recipe(Osscar(ratio=0.25), Distill(**SHORT, checkpoint_minutes=0))
    one = trained(compress(wanted, tmp_path / "one"))
    file, script, out = tmp_path / "recipe.yaml", tmp_path / "dying.py", tmp_path / "two"
    file.write_text(wanted.to_yaml())
    script.write_text(DYING)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    command += ["compress", "run", str(file), "--output", str(out)]
    for dies_at, ends in ((7, 1), (0, 0)):
        environment = {**os.environ, "DIES_AT": str(dies_at)}
        ran = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
        assert ran.returncode == ends, ran.stderr
        kept = f"What was done so far is kept in {out}.unfinished; the same command goes on from there."
        assert (kept in ran.stderr) == bool(ends), ran.stderr
    assert "Training goes on from the state in" in ran.stderr
    two = trained(Report.read(out))
    assert [step for step, _, _ in two["losses"]] == [step for step, _, _ in one["losses"]]
    assert [loss for _, loss, _ in two["losses"]] == pytest.approx([loss for _, loss, _ in one["losses"]], rel=1e-3)
    assert {each.name for each in tmp_path.iterdir()} == {"one", "two", "recipe.yaml", "dying.py"}


# What is given in Python, and how it is launched


def test_windows_that_are_given_are_trained_on_less_some_of_them(llama, tmp_path):
    windows = tiny.windows(40, 32)
    Pruner.from_pretrained(llama).prune(DEPTH, Pretrain(**SHORT), calibration=windows, save_dir=tmp_path / "out")
    found = trained(Report.read(tmp_path / "out"))
    assert found["held_out"]["text"] == "the end of the training text"
    assert found["steps"] == 12


def test_a_text_to_train_on_may_be_given_beside_windows(llama, other_text_file, tmp_path):
    pruner, windows = Pruner.from_pretrained(llama), tiny.windows(8, 32)
    pruner.prune(
        DEPTH, Pretrain(**SHORT), calibration=windows, training=str(other_text_file), save_dir=tmp_path / "out"
    )
    assert trained(Report.read(tmp_path / "out"))["held_out"]["text"] == f"the end of {other_text_file.name}"


def test_tokens_that_the_model_does_not_know_are_refused(llama, tmp_path):
    windows = tiny.windows(20, 32)
    strange = replace(windows, tokens=windows.tokens + tiny.VOCABULARY)
    texts = Texts(windows, None, (Domain("strange", windows, strange),))
    recipe = Recipe(passes=(DEPTH, Pretrain(**SHORT)), settings=Settings(model=str(llama)))
    with pytest.raises(RecipeError, match="Use the tokenizer that belongs to the model"):
        compress(recipe, tmp_path / "out", texts=texts)


@pytest.mark.parametrize("way", ["FSDP", "DEEPSPEED"])
def test_a_model_that_processes_would_share_out_is_not_trained(way, recipe, tmp_path, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{way}", "true")
    if way == "FSDP":  # by which accelerate shares out nothing on the CPU
        compress(recipe(DEPTH, Pretrain(**SHORT)), tmp_path / "out")
    monkeypatch.setattr("optimum_prune.plan.checks.device_of", lambda _: "cuda")
    with pytest.raises(RecipeError, match="trains one that each process holds whole"):
        compress(recipe(DEPTH, Pretrain()), tmp_path / "other")


def test_hidden_states_come_nearer_where_they_count(recipe, tmp_path):
    report = compress(recipe(DEPTH, Distill(**SHORT, hidden=1.0)), tmp_path / "out")
    losses = [loss for _, loss, _ in trained(report)["losses"]]
    assert sum(losses[-3:]) < sum(losses[:3])
    with pytest.raises(RecipeError, match="Leave out 'hidden', or 'precompute'"):
        Distill(hidden=1.0, precompute=True)


def test_answers_alone_are_trained_on(checkpoints, text_file, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(checkpoints("llama"), model)
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }} {{ m.content }} . {% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
    )
    turns = [[tiny.text(12, seed=2 * n), tiny.text(12, seed=2 * n + 1)] for n in range(60)]
    rows = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in turns]
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps({"messages": row}) for row in rows))
    recipe = Recipe(
        passes=(DEPTH, Distill(**SHORT, precompute=True)),
        calibration=Text(text=str(text_file), samples=8, length=16),
        evaluation=Text(samples=2),
        training=Training(text=str(tmp_path / "chat.jsonl"), column="messages", length=32),
        settings=Settings(model=str(model)),
    )
    found = trained(compress(recipe, tmp_path / "out"))
    assert found["steps"] == 12
    assert found["losses"][-1][1] < found["losses"][0][1]


@pytest.mark.parametrize(
    ("step", "free", "why"),
    [
        (Distill(), 10**12, "on 1,000,000 tokens, with weights kept in float32 meanwhile"),
        (Distill(minutes=5), 10**3, "for 5 minutes, with weights left in their dtype"),
        (Pretrain(epochs=2, float32=True), 10**3, "in 2 rounds through its text, with weights kept in float32"),
        (Pretrain(float32=False), 10**12, "left in their dtype"),
    ],
)
def test_a_plan_says_how_long_and_in_which_dtype_it_trains(step, free, why, recipe, plugins, monkeypatch):
    monkeypatch.setattr("optimum_prune.passes.training.free_memory", lambda: free)
    (word,) = forecast(recipe(DEPTH, step), plugins).words
    assert why in word

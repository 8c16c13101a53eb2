"""Training: it ends as the best that it was, goes on after a kill as if there had been none, and leaves the model else as it was."""

from __future__ import annotations

import copy
import math
import os
import re
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import ClassVar

import pytest
import tiny
import torch
from transformers import TrainerCallback, trainer

from optimum_prune.errors import OutputError
from optimum_prune.machine import processes
from optimum_prune.machine.progress import Progress
from optimum_prune.text.windows import Domain, Windows
from optimum_prune.training import engine
from optimum_prune.training.engine import latest
from optimum_prune.training.lesson import Lesson
from optimum_prune.training.objectives import Imitation, Likelihood
from optimum_prune.training.predictions import Asked, Precomputed
from optimum_prune.training.schedule import Course, Schedule, rate_share
from optimum_prune.training.student import Student
from optimum_prune.training.trackers import FOLDER, written_to
from optimum_prune.training.watch import moved

SCHEDULE = Schedule(windows=8, at_once=4, steps=20, learning_rate=2e-3)


def counting(windows, seed):
    """Windows of numbers that go up by one: a text that can be learned."""
    starts = torch.randint(0, 200, (windows, 1), generator=torch.Generator().manual_seed(seed))
    return Windows.from_tokens(starts + torch.arange(16))


@pytest.fixture
def lesson(tmp_path):
    domains = (Domain("one", counting(40, 0), counting(5, 2)), Domain("other", counting(16, 1), counting(3, 3), 0.5))
    return Lesson(domains, tmp_path / "training")


@pytest.fixture(params=["float32", "bfloat16"])
def model(request):
    return tiny.model("llama").to(getattr(torch, request.param))


def train(model, lesson, objective, schedule, **student):
    half = model.dtype is torch.bfloat16
    return engine.train(Student(model, lesson.folder, float32=half, **student), lesson, objective, schedule)


def weights(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def same(some, other):
    return all(torch.equal(value, other[name]) for name, value in some.items())


def test_what_is_learned_is_kept(model, lesson):
    before, config, dtype = weights(model), copy.deepcopy(model.config.to_dict()), model.dtype
    places = {name: value.data_ptr() for name, value in model.named_parameters()}
    found = train(model, lesson, Likelihood(), SCHEDULE)
    assert found["held_out"]["after"] < 0.5 * found["held_out"]["before"]
    assert found["steps"] == 20
    assert found["tokens"] == 20 * 8 * 16
    assert len(found["looks"]) == SCHEDULE.looks + 1
    assert not same(before, weights(model))
    assert model.dtype is dtype
    assert not model.training
    assert model.config.to_dict() == config
    assert {name: value.data_ptr() for name, value in model.named_parameters()} == places


def test_the_best_is_kept_and_not_the_last(model, lesson):
    found = train(model, lesson, Likelihood(), replace(SCHEDULE, learning_rate=0.3, decay="constant", patience=100))
    best = min(value for _, value in found["looks"])
    assert found["held_out"]["after"] == pytest.approx(best, rel=0.02)


@pytest.mark.parametrize("rate", [1.0, 1e9])
def test_a_model_that_never_was_better_is_given_back_as_it_was(rate, model, lesson):
    before = weights(model)
    found = train(model, lesson, Likelihood(), replace(SCHEDULE, learning_rate=rate, warmup=0.0))
    assert same(before, weights(model))
    assert found["held_out"]["after"] == found["held_out"]["before"]
    assert found["kept"] == "the weights as they were"
    assert "so the model is as it was" in found["note"]
    assert found["ended_early"]


class Killed(Exception):
    pass


class Mortal(Likelihood):
    """Is killed when it is asked for its loss so often."""

    def __init__(self, after):
        self.left = count(after, -1)

    def loss(self, run, batch):
        if not next(self.left):
            raise Killed
        return super().loss(run, batch)


@pytest.mark.parametrize("after", [[0], [9], [17, 12]])
def test_after_a_kill_it_goes_on_as_if_there_had_been_none(after, model, lesson, tmp_path):
    start = weights(model)
    whole = train(copy.deepcopy(model), replace(lesson, folder=tmp_path / "whole"), Likelihood(), SCHEDULE)
    often = replace(SCHEDULE, checkpoint_minutes=0)
    for steps in after:
        with pytest.raises(Killed):
            train(model, lesson, Mortal(steps), often)
        assert same(start, weights(model))
        assert (latest(lesson.folder) is not None) == (steps > 2)
    found = train(model, lesson, Likelihood(), often)
    timed = {"seconds", "tokens_per_second"}
    assert {key: found[key] for key in found.keys() - timed} == {key: whole[key] for key in whole.keys() - timed}


def test_a_state_that_is_not_whole_is_not_gone_on_from(model, lesson):
    with pytest.raises(Killed):
        train(model, lesson, Mortal(9), replace(SCHEDULE, checkpoint_minutes=0))
    (latest(lesson.folder) / "course.json").unlink()
    assert latest(lesson.folder) is None
    assert train(model, lesson, Likelihood(), SCHEDULE)["steps"] == 20


def test_a_budget_of_minutes_ends_it(model, lesson):
    found = train(model, lesson, Likelihood(), replace(SCHEDULE, steps=None, minutes=0.02))
    assert found["seconds"] >= 1
    assert found["steps"] >= 1
    assert found["held_out"]["after"] <= found["held_out"]["before"]


@pytest.mark.parametrize("budget", [{}, {"steps": None, "minutes": 0.02}])
def test_the_bar_counts_tokens_and_shows_the_loss_and_the_time_left(budget, model, lesson, capsys):
    shown = replace(lesson, progress=Progress(visible=True))
    found = train(model, shown, Likelihood(), replace(SCHEDULE, **budget))
    lines = capsys.readouterr().err.split("\r")
    (last,) = [line for line in lines if "loss" in line][-1:]
    assert re.search(r"Training: +\d+%.*/\S+ \[\d\d:\d\d<\d\d:\d\d, \S+tok/s, loss \d+\.\d+, ppl \d+.*\]", last), last
    assert found["tokens_per_second"] > found["tokens"] / found["seconds"]
    assert found["held_out"]["after"] <= found["held_out"]["before"]


def test_windows_run_at_once_change_nothing_but_rounding(lesson, tmp_path):
    found = []
    for at_once in (2, 8):
        model = tiny.model("llama")
        train(model, replace(lesson, folder=tmp_path / str(at_once)), Likelihood(), replace(SCHEDULE, at_once=at_once))
        found.append(weights(model))
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-3, atol=1e-4)


def test_activations_that_are_computed_again_change_nothing(lesson, tmp_path):
    found = []
    for again in (False, True):
        model = tiny.model("llama")
        schedule = replace(SCHEDULE, gradient_checkpointing=again)
        train(model, replace(lesson, folder=tmp_path / str(again)), Likelihood(), schedule)
        found.append(weights(model))
    assert same(*found)


def test_tied_embeddings_stay_tied(lesson):
    model = tiny.model("llama-tied")
    train(model, lesson, Likelihood(), SCHEDULE)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("stay", [True, False])
def test_zeros_of_a_mask_stay_zero(stay, model, lesson):
    matrix = model.model.layers[1].mlp.up_proj.weight
    matrix.data[::2] = 0
    train(model, lesson, Likelihood(), SCHEDULE, zeros_stay=stay)
    assert bool((matrix[::2] == 0).all()) is stay
    assert bool((matrix[1::2] != 0).all())


# Distillation


@pytest.fixture
def pupil(model):
    """A model, and another that is near to it."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    return other


def windows_of(lesson):
    mixture = lesson.mixture(SCHEDULE.windows)
    return [place for step in range(SCHEDULE.steps) for place in mixture.of_step(step)]


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_predictions_that_were_kept_teach_what_a_teacher_does(temperature, alpha, model, pupil, lesson, tmp_path):
    kept = Precomputed(tmp_path / "predictions", tiny.VOCABULARY, temperature)
    kept.compute(lambda: model, lesson, windows_of(lesson), 8)
    found = []
    for teacher in (Asked(model), kept):
        objective = Imitation(teacher, alpha, temperature)
        student = copy.deepcopy(pupil)
        place = replace(lesson, folder=tmp_path / type(teacher).__name__)
        found.append([loss for _, loss, _ in train(student, place, objective, SCHEDULE)["losses"]])
    assert found[0] == pytest.approx(found[1], rel=0.05, abs=1e-4)
    assert sum(found[0][-5:]) < sum(found[0][:5])


def test_predictions_are_computed_once(model, lesson, tmp_path, monkeypatch):
    monkeypatch.setattr("optimum_prune.training.predictions.PIECE", 8)
    folder = tmp_path / "predictions"
    Precomputed(folder, 10, 1.0).compute(lambda: model, lesson, windows_of(lesson), 8)
    files = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    damaged = sorted(files)[1]
    damaged.write_bytes(damaged.read_bytes()[:-10])
    Precomputed(folder, 10, 1.0).compute(lambda: model, lesson, windows_of(lesson), 8)
    assert {file for file, time in files.items() if file.stat().st_mtime_ns != time} == {damaged}


@pytest.mark.parametrize("error", [RuntimeError("[enforce fail at inline_container.cc:672]"), OSError(28, "No space")])
def test_a_state_that_cannot_be_kept_is_a_matter_of_the_disk_and_not_left_there_in_parts(
    error, model, lesson, monkeypatch
):
    def full(self, output_dir):
        raise error

    monkeypatch.setattr(engine.Trainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(OutputError, match=r"The state of the training after step 1 cannot be kept in .*training"):
        train(model, lesson, Likelihood(), replace(SCHEDULE, checkpoint_minutes=0))
    assert not list(lesson.folder.glob("checkpoint-*"))


def test_all_processes_go_by_the_clock_of_the_first(monkeypatch):
    course = Course(replace(SCHEDULE, steps=None, minutes=2.0))
    monkeypatch.setattr(processes, "broadcast_from_first", lambda _: 30.0)
    assert course.part(7) == 0
    course.look_at_the_clock()
    assert course.part(7) == 0.25
    assert course.share(7) == pytest.approx(rate_share(0.25, SCHEDULE.warmup, 0.001))


def test_weights_of_domains_move_as_sheared_llama_says():
    weights, losses, references = [0.6, 0.3, 0.1], [3.0, 2.5, 4.0], [2.0, 2.6, 3.9]
    grown = [0.6 * math.e, 0.3, 0.1 * math.exp(0.1)]
    expected = [(1 - 1e-4) * each / sum(grown) + 1e-4 / 3 for each in grown]
    assert moved(weights, losses, references) == pytest.approx(expected, rel=1e-9)
    for _ in range(20):
        weights = moved(weights, [9.0, 1.0, 1.0], [1.0, 1.0, 1.0])
    assert sum(weights) == pytest.approx(1)
    assert min(weights) > 3e-5


class Board(TrainerCallback):
    """A tracker."""

    logged: ClassVar[list[tuple[int, dict]]] = []

    def on_log(self, args, state, control, logs, **_):
        self.logged.append((args.run_name, state.global_step, dict(logs)))


def test_a_tracker_is_told_of_each_step_and_of_what_was_held_out(model, lesson, tmp_path, monkeypatch):
    monkeypatch.setattr(Board, "logged", [])
    monkeypatch.setattr(
        trainer, "get_reporting_integration_callbacks", lambda names: [Board] if names == ["wandb"] else []
    )
    tracked = replace(lesson, logs=tmp_path / "out.logs/1-distill", update_every=10).with_references(model)
    found = train(model, tracked, Likelihood(), replace(SCHEDULE, report_to=("wandb",)))
    assert {name for name, _, _ in Board.logged} == {"out-1-distill"}
    losses = [(step, logs["loss"], logs["learning_rate"]) for _, step, logs in Board.logged if "loss" in logs]
    assert losses == [tuple(each) for each in found["losses"]]
    looks = [[step, logs["held_out_perplexity"]] for _, step, logs in Board.logged if "held_out_perplexity" in logs]
    assert looks == found["looks"]
    weights = [(step, logs["weight of one"]) for _, step, logs in Board.logged if "weight of one" in logs]
    assert weights == [(step, weights[0]) for step, _, weights in found["domains"]["moves"]]


@pytest.mark.parametrize("named", [None, "elsewhere"])
def test_tensorboard_writes_into_a_folder_of_each_start(named, tmp_path, monkeypatch):
    monkeypatch.delenv(FOLDER, raising=False)
    if named:
        monkeypatch.setenv(FOLDER, named)
    with written_to(tmp_path):
        place = os.environ[FOLDER]
    assert place == named if named else Path(place).parent == tmp_path
    assert os.environ.get(FOLDER) == named

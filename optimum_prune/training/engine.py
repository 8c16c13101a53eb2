"""Training by transformers' Trainer: what it is given, and what it goes on from after a kill."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from optimum_prune.errors import OutputError, reason
from optimum_prune.machine import interrupts, processes, tensor_files
from optimum_prune.training.lesson import STATE, Lesson, Objective, TrainingBatch
from optimum_prune.training.schedule import Schedule
from optimum_prune.training.student import Student
from optimum_prune.training.trackers import PROJECT, written_to
from optimum_prune.training.watch import Watch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS = "weights.safetensors"


def train(student: Student, lesson: Lesson, objective: Objective, schedule: Schedule) -> Mapping[str, Any]:
    """Trains a model in place; it ends as the best that it was by the held-out windows, or, if it never was better, as it began.

    A training that was killed goes on from the last state that was kept in the lesson's folder.

    Returns:
        Evidence for the report.
    """
    try:
        with torch.random.fork_rng(), _as_before(student.model, schedule):
            watch = Watch(student, lesson, schedule)
            trainer = _Trainer(watch, lesson, objective, schedule)
            checkpoint = latest(lesson.folder)
            if checkpoint is not None:
                watch.load(json.loads((checkpoint / STATE).read_text()))
                lesson.progress.say(f"Training goes on from the state in {checkpoint}.")
            with written_to(lesson.logs or lesson.folder / "logs"), _stopped_behind_a_step():
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            trainer.accelerator.free_memory()
            return watch.ended()
    except BaseException:
        student.give_back(best=False)
        raise


def latest(folder: Path) -> Path | None:
    """The last state of a training in a folder that was kept whole."""
    found = sorted(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    return next((path for path in reversed(found) if (path / STATE).is_file()), None)


def _stopped_behind_a_step() -> AbstractContextManager[None]:
    """Lets a signal to stop wait until the step at hand is done and its state kept; several processes are told to stop at several moments."""
    return nullcontext() if processes.size() > 1 else interrupts.deferred()


@contextmanager
def _as_before(model: PreTrainedModel, schedule: Schedule) -> Iterator[None]:
    """What training sets of a model is put back after a `with`."""
    configs = {id(each): each for each in (model.config, model.config.get_text_config(), model.generation_config)}
    before = [(each, getattr(each, "use_cache", None)) for each in configs.values() if each is not None]
    if schedule.gradient_checkpointing:
        _checkpointing(model, "enable", {"use_reentrant": False})
    try:
        yield
    finally:
        for config, use_cache in before:
            config.use_cache = use_cache
        if schedule.gradient_checkpointing:
            _checkpointing(model, "disable")
        model.eval()


def _checkpointing(model: PreTrainedModel, switch: str, *options: Mapping[str, bool]) -> None:
    """Switches on or off that activations are computed again instead of kept; versions of transformers call it otherwise."""
    newer = getattr(model, f"activation_checkpointing_{switch}", None)
    (newer or getattr(model, f"gradient_checkpointing_{switch}"))(*options)


class _Positions(Dataset[int]):
    """The places of windows in the order of training; which window it is, is settled when its turn comes."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, position: int) -> int:
        return position


class _Trainer(Trainer):  # type: ignore[misc]  # transformers declares no types
    """A Trainer that asks the lesson for the windows of a step, an objective for the loss, and a schedule for the learning rate."""

    def __init__(self, watch: Watch, lesson: Lesson, objective: Objective, schedule: Schedule) -> None:
        self._watch = watch
        self._lesson = lesson
        self._objective = objective
        self._schedule = schedule
        model = watch.student.model
        super().__init__(
            model,
            _arguments(schedule, lesson, model.device),
            train_dataset=_Positions(schedule.most_steps * schedule.windows),
            data_collator=lambda positions: {"positions": torch.tensor(positions)},
            callbacks=[watch],
        )
        self.remove_callback(PrinterCallback)
        watch.tell = self._tell
        self.model_accepts_loss_kwargs = False  # each loss is a mean, of which batches with more tokens have more

    def _tell(self, figures: dict[str, float]) -> None:
        """Lets trackers know of figures, beside those of each step."""
        due = self.control.should_log
        self.log(figures)
        self.control.should_log = due

    def _get_train_sampler(self, train_dataset: _Positions | None = None) -> Sampler[int]:
        return SequentialSampler(train_dataset or self.train_dataset)

    def create_scheduler(self, *_: Any, optimizer: Optimizer | None = None, **__: Any) -> LambdaLR:
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, self._watch.course.share)
        return self.lr_scheduler

    def create_optimizer(self, *arguments: Any) -> Optimizer:
        made: Optimizer = super().create_optimizer(*arguments)
        self._watch.student.regroup(made)
        return made

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        """The loss of some windows of the step at hand."""
        step, student = self.state.global_step, self._watch.student
        student.begin(step, self._watch.course.part(step))
        windows = self._watch.mixture.of_step(step)
        places = [windows[position % self._schedule.windows] for position in inputs["positions"].tolist()]
        batch = self._lesson.batch(places, self.args.device)

        def run(batch: TrainingBatch, **keywords: Any) -> Any:
            with student.computing():
                return model(input_ids=batch.tokens, use_cache=False, **keywords)

        part = len(places) / len(windows) * self._lesson.counted(windows)
        return self._objective.loss(run, batch) * (len(batch.predicted) / part)

    def _save_checkpoint(self, *arguments: Any, **keywords: Any) -> None:
        """Keeps a state, whole or not at all, and only then removes the one before it."""
        folder = self._watch.lesson.folder
        place = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            super()._save_checkpoint(*arguments, **keywords)
            processes.wait()
            self._watch.write_state(place)
        except (RuntimeError, OSError, SafetensorError) as error:  # torch has no name for a disk that is full
            shutil.rmtree(place, ignore_errors=True)
            raise OutputError(
                f"The state of the training after step {self.state.global_step} cannot be kept in {folder}: {reason(error)} Make room "
                f"there, or name an --output elsewhere."
            ) from error
        if processes.first():
            for older in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
                if older != place:
                    shutil.rmtree(older, ignore_errors=True)

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, Tensor] | None = None) -> None:
        place = Path(output_dir or self.args.output_dir)
        place.mkdir(parents=True, exist_ok=True)
        tensor_files.write(dict(state_dict or self._watch.student.named()), place / WEIGHTS)

    def _load_from_checkpoint(self, checkpoint: str, *_: Any) -> None:
        self._watch.student.put(load_file(Path(checkpoint) / WEIGHTS))


def _arguments(schedule: Schedule, lesson: Lesson, device: torch.device) -> TrainingArguments:
    return TrainingArguments(
        str(lesson.folder),
        max_steps=schedule.most_steps,
        per_device_train_batch_size=schedule.at_once,
        gradient_accumulation_steps=schedule.windows // (schedule.at_once * processes.size()),
        learning_rate=schedule.learning_rate,
        weight_decay=schedule.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=schedule.clip,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=list(schedule.report_to) or "none",
        run_name=lesson.title,
        project=PROJECT,
        disable_tqdm=True,
        seed=lesson.seed,
        use_cpu=device.type == "cpu",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        label_names=[],
        ddp_find_unused_parameters=False,
    )

"""How passes train: for so many steps, tokens, epochs or minutes, with what learning rate, in which dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from optimum_prune.errors import RecipeError, shown
from optimum_prune.evaluation.losses import losses_cost
from optimum_prune.machine import processes
from optimum_prune.machine.memory import free_memory
from optimum_prune.options import option
from optimum_prune.passes.base import Pass
from optimum_prune.training.schedule import Schedule
from optimum_prune.training.trackers import TRACKERS

if TYPE_CHECKING:
    from optimum_prune.anatomy.decoder import Decoder
    from optimum_prune.anatomy.shape import Shape
    from optimum_prune.anatomy.workload import Cost, Workload
    from optimum_prune.training.lesson import Lesson

TOKENS = 1_000_000
"""What is trained on if no budget is given."""
FEWEST_STEPS, SMALLEST_STEP, LARGEST_STEP = 64, 2048, 65536
"""A step has a part of all tokens, so that there are so many steps, and between so few and so many tokens."""
RATE_AT = 1024
"""Features of hidden states, for which learning rates are given; the more there are, the smaller they are."""


@dataclass(frozen=True, kw_only=True)
class TrainingPass(Pass):
    """A pass that trains the whole model by transformers' Trainer."""

    trains: ClassVar[bool] = True
    rate: ClassVar[float] = 1e-4
    """The learning rate at `RATE_AT` features."""
    trained_bytes: ClassVar[int] = 16
    """Of each parameter that is trained: its value, its gradient and two averages of that, in float32."""
    steps: int | None = option("How many steps to train.", None, at_least=1)
    tokens: int | None = option(f"The same as tokens of text; {TOKENS:,} if no budget is given.", None, at_least=1)
    epochs: float | None = option("The same as rounds through the training text.", None, above=0)
    minutes: float | None = option("The same as time.", None, above=0)
    batch: int | None = option(
        f"Tokens of a step; if not given, a {FEWEST_STEPS}th of all, between {SMALLEST_STEP} and {LARGEST_STEP}, and the former where "
        f"`steps` or `minutes` are.",
        None,
        at_least=1,
    )
    micro_batch: int = option("Of these, the tokens that run through the model at a time.", 2048, at_least=1)
    learning_rate: float | None = option(
        f"The largest; if not given, one for {RATE_AT} features of hidden states, and less the more there are.",
        None,
        above=0,
    )
    warmup: float = option("The part of the training in which the learning rate grows.", 0.05, at_least=0, below=1)
    schedule: Literal["cosine", "linear", "constant"] = option("How it falls afterwards.", "cosine")
    weight_decay: float = option("Of AdamW.", 0.0, at_least=0, below=1)
    looks: int = option("How often the held-out perplexity is measured.", 10, at_least=1)
    patience: int = option("After so many of these without a better one, training ends.", 4, at_least=1)
    checkpoint_minutes: float = option("Between states that are kept for a run that is killed.", 10.0, at_least=0)
    gradient_checkpointing: bool = option("Compute activations again instead of keeping them.", False)
    float32: bool | None = option(
        "Keep weights in float32 while they are trained; if not given, where they fit in memory.", None
    )
    keep_zeros: bool = option("Let the zeros of matrices that are zero by a quarter or more stay.", True)
    report_to: tuple[str, ...] = option(
        "Trackers: trackio, wandb, tensorboard (which writes into OUT.logs), mlflow, swanlab, clearml or comet_ml.", ()
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("steps", "tokens", "epochs", "minutes") if getattr(self, name) is not None]
        if len(given) > 1:
            raise RecipeError(f"{self.name} is given {' and '.join(given)}. Give one of them.")
        if strange := [name for name in self.report_to if name not in TRACKERS]:
            raise RecipeError(
                f"{self.name} is to report to {shown(strange[0])}, which is no tracker that it knows. Give one of {', '.join(TRACKERS)}."
            )

    @property
    def needs(self) -> Mapping[str, str]:
        """Trackers too."""
        return {**self.requires, **{name: name for name in self.report_to}}

    @property
    def asks_dense(self) -> bool:
        """Whether the dense model runs through the same text."""
        return self.needs_teacher

    def tokens_wanted(self) -> int | None:
        """How many tokens are trained on; None where only the training shows."""
        if self.steps is not None:
            return self.steps * (self.batch or SMALLEST_STEP)
        return None if self.epochs or self.minutes else self.tokens or TOKENS

    def scheduled(self, decoder: Decoder, lesson: Lesson) -> Schedule:
        """How the model is trained."""
        length = lesson.domains[0].windows.length
        there = lesson.windows * length
        total = there * self.epochs if self.epochs else self.tokens_wanted()
        part = 0 if self.steps or total is None else total / FEWEST_STEPS
        step = self.batch or int(min(max(part, SMALLEST_STEP), LARGEST_STEP))
        most = max(1, step // length // processes.size())
        at_once = min(max(1, self.micro_batch // length), most)
        windows = most // at_once * at_once * processes.size()
        steps = self.steps or (None if total is None else max(1, round(total / (windows * length))))
        return Schedule(
            windows,
            at_once,
            steps=None if self.minutes else steps,
            minutes=self.minutes,
            learning_rate=self.learning_rate or self.rate * RATE_AT / decoder.config.hidden_size,
            warmup=self.warmup,
            decay=self.schedule,
            weight_decay=self.weight_decay,
            looks=self.looks,
            patience=self.patience,
            checkpoint_minutes=self.checkpoint_minutes,
            gradient_checkpointing=self.gradient_checkpointing,
            report_to=self.report_to,
        )

    def estimate(self, shape: Shape, work: Workload) -> Cost:
        """What training takes beside the model: of forward and backward, three times a forward, and what the teacher computes."""
        tokens = self.tokens_wanted() or TOKENS
        at_once = max(1, self.micro_batch // work.length) * work.length
        few = work.on(at_once // work.length)
        teacher = float(self.asks_dense)
        computed = few.run_all(shape.layers, tokens, 3 + teacher)
        predicted = losses_cost(few, tokens, at_once, 3 + teacher)
        kept = sum(few.run(layer, at_once).memory for layer in shape.layers)
        if self.gradient_checkpointing:
            kept = few.states(len(shape.layers)) + max(few.run(layer, at_once).memory for layer in shape.layers)
        spent = replace(predicted, memory=2 * predicted.memory + kept)
        return computed.followed_by(spent).with_memory(self.trained_memory(shape, work))

    def keeps(self, shape: Shape, work: Workload) -> float:
        """The weights that it began with, the best, and a state of the training, with two averages of gradients, beside the one that follows it."""
        state = 3 * (work.itemsize if self.float32 is False else 4)
        return self.trained_parameters(shape, work) * 2 * (work.itemsize + state)

    def trained_parameters(self, shape: Shape, _: Workload) -> float:
        """How many parameters of a model are trained."""
        return shape.parameters

    def remark(self, shape: Shape) -> str:
        """How long it trains, and in which dtype."""
        tokens = self.tokens_wanted()
        rounds = f"in {self.epochs:g} rounds through its text" if self.epochs else f"for {self.minutes or 0:g} minutes"
        budget = rounds if tokens is None else f"on {tokens:,} tokens"
        needed = self.trained_bytes * shape.parameters
        kept = f"kept in float32 meanwhile, {needed / 1e9:,.2f} GB with gradients and averages"
        if not self.in_float32(shape.parameters):
            kept = (
                f"left in their dtype: in float32 they would take {needed / 1e9:,.2f} GB with gradients and averages"
            )
        return f"{self.name} trains {budget}, with weights {kept}."

    def trained_memory(self, shape: Shape, work: Workload) -> float:
        """Bytes of what is trained, beside the model."""
        return self.trained_parameters(shape, work) * (
            self.trained_bytes if self.float32 is not False else 3 * work.itemsize
        )

    def in_float32(self, parameters: int) -> bool:
        """Whether so many weights are kept in float32, with their gradients and two averages of these: if not told, where there is memory for it."""
        return self.trained_bytes * parameters < free_memory() if self.float32 is None else self.float32

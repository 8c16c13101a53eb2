"""peft: low-rank adapters on the linear layers of a pruned model, trained in place of its weights and merged into them in the end.

Hu et al., arXiv 2106.09685. What is trained is a few hundredths of the parameters, so it takes little memory beside the model; whole
weights, trained by `distill`, recover more of what was lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from safetensors.torch import load_file

from optimum_prune import Stage, hookimpl, option
from optimum_prune.errors import RecipeError, shown
from optimum_prune.passes.imitating import ImitatingPass
from optimum_prune.training.objectives import Likelihood
from optimum_prune.training.student import Student, masked, write_once

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from optimum_prune import Decoder, Pass, Recovery, Shape, Workload
    from optimum_prune.training.lesson import Lesson, Objective
    from optimum_prune.training.schedule import Schedule

NAME = "optimum_prune"
"""What peft calls the adapter."""
BASE = "base.safetensors"
"""The weights that adapters are merged into, as they were."""


@dataclass(frozen=True, kw_only=True)
class Lora(ImitatingPass):
    """Trains low-rank adapters, by the dense model's predictions or by text, and merges them into the weights (peft)."""

    name: ClassVar[str] = "lora"
    stage = Stage.RECOVER
    requires: ClassVar[Mapping[str, str]] = {"peft": "peft>=0.18"}
    rate: ClassVar[float] = 1e-3
    loss: Literal["distill", "pretrain"] = option(
        "Train towards the dense model's predictions, or to predict the text.", "distill"
    )
    r: int = option("The rank of an adapter.", 16, at_least=1)
    lora_alpha: float | None = option(
        "An adapter counts by this over its rank; twice the rank if not given.", None, above=0
    )
    lora_dropout: float = option(
        "The part of an adapter's inputs that is left out at random.", 0.0, at_least=0, below=1
    )
    use_rslora: bool = option("Divide lora_alpha by the root of the rank instead.", False)
    use_dora: bool = option("Train the magnitudes of weights apart from their directions.", False)
    target_modules: tuple[str, ...] = option("The names of the linear layers that get one; all if not given.", ())
    experts: bool = option("Let experts get some too whose weights are stored in one tensor.", True)
    micro_batch: int = option("Of these, the tokens that run through the model at a time.", 512, at_least=1)
    gradient_checkpointing: bool = option("Compute activations again instead of keeping them.", True)
    float32: bool = option("Train adapters in float32; the model's own weights keep their dtype.", True)

    @property
    def needs_teacher(self) -> bool:  # type: ignore[override]
        """Whether it is trained towards the dense model's predictions."""
        return self.loss == "distill"

    def objective(self, recovery: Recovery, lesson: Lesson, schedule: Schedule) -> Objective:
        """The divergence from the dense model's predictions, or the likelihood of the text."""
        return super().objective(recovery, lesson, schedule) if self.needs_teacher else Likelihood()

    def student(self, decoder: Decoder, lesson: Lesson) -> Student:
        """The adapters."""
        return _Adapted(decoder, self, lesson)

    def look_at(self, model: Decoder) -> None:
        """Refuses names of linear layers that there are not, and adapters that experts cannot have."""
        _adapted(model, self)

    def remark(self, _: Shape) -> str:
        """Nothing: adapters are small."""
        return ""

    def keeps(self, shape: Shape, work: Workload) -> float:
        """The model's own weights too, before adapters are merged into them."""
        return super().keeps(shape, work) + shape.parameters * work.itemsize

    def trained_parameters(self, shape: Shape, work: Workload) -> float:
        """Of the adapters, whose two sides together have at most twice a matrix's parameters over the hidden size, times their rank."""
        return 2 * self.r * sum(layer.parameters for layer in shape.layers) / work.hidden

    def trained_memory(self, shape: Shape, work: Workload) -> float:
        """Of the adapters."""
        return self.trained_parameters(shape, work) * self.trained_bytes


class _Adapted(Student):
    """A model with adapters, which are trained; they are merged when the best are given back, and else only removed."""

    def __init__(self, decoder: Decoder, step: Lora, lesson: Lesson) -> None:
        from peft.tuners.lora import LoraModel

        model, self._layers = decoder.model, decoder.modules
        self._adapted = _adapted(decoder, step)
        zeros = masked({name: value.data for name, value in self._adapted.items()}) if step.keep_zeros else {}
        _check_zeros(step, zeros)
        model.requires_grad_(False)
        with torch.random.fork_rng():
            torch.manual_seed(lesson.seed)
            # of the list of layers and not of the model, whose names for fused experts peft would take for those of others
            self._tuner = LoraModel(self._layers, {NAME: _config(step, self._adapted, model)}, NAME)
        for name, there in zeros.items():
            _mask(self._layers.get_submodule(name.rpartition(".")[0]), there)
        self._merged = False
        trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        super().__init__(model, lesson.folder, float32=step.float32, zeros_stay=False, trained=trained)

    def give_back(self, *, best: bool) -> None:
        """Merges the best adapters into the model, or lets it be as it was."""
        if self._merged:
            self._put_base()
            return
        super().give_back(best=best)
        if best:
            write_once(self.folder / BASE, ((name, value.data) for name, value in self._adapted.items()), {})
            self._tuner.merge_and_unload(progressbar=False)
            self._merged = True
        else:
            self._tuner.unload()

    @torch.no_grad()
    def _put_base(self) -> None:
        for name, value in load_file(self.folder / BASE).items():
            self._layers.get_parameter(name).data.copy_(value)


def _adapted(decoder: Decoder, step: Lora) -> dict[str, nn.Parameter]:
    """The weights that get adapters, by their paths from the list of layers: of linear layers, and of experts, whose tensors have three
    dimensions.
    """
    linear = {path: module.weight for path, module in decoder.modules.named_modules() if _is_linear(module)}
    for name in step.target_modules:
        if not any(path.endswith(name) for path in linear):
            there = ", ".join(sorted({path.rpartition(".")[2] for path in linear}))
            raise RecipeError(
                f"lora is to adapt linear layers called {shown(name)}, and the model's are called {there}. Give names of these."
            )
    found = {
        f"{path}.weight": weight
        for path, weight in linear.items()
        if not step.target_modules or path.endswith(step.target_modules)
    }
    if step.experts and not step.target_modules:
        stored = {name: value for name, value in decoder.modules.named_parameters() if value.ndim == 3}
        if stored:
            _check_experts(step)
        found |= stored
    if not found:
        raise RecipeError("lora found no linear layer to adapt. Recover this model by another pass.")
    return found


def _check_zeros(step: Lora, zeros: Mapping[str, Tensor]) -> None:
    """Refuses masks that adapters would act on."""
    dense = next(iter(zeros), None) if step.use_dora else next((name for name in zeros if zeros[name].ndim > 2), None)
    if dense is not None:
        way = "leave out use_dora" if step.use_dora else "give experts false"
        raise RecipeError(
            f"Many weights of '{dense}' are zero and are to stay so, and an adapter of that kind would change all. Mend it so: {way}, or give "
            f"keep_zeros false."
        )


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (torch.nn.Linear, Conv1D))


def _check_experts(step: Lora) -> None:
    for name, used in (("lora_dropout", step.lora_dropout), ("use_dora", step.use_dora)):
        if used:
            raise RecipeError(
                f"lora has {name}, which peft does not have for experts whose weights are stored in one tensor. Leave it out, or give experts false."
            )


def _config(step: Lora, adapted: Mapping[str, nn.Parameter], model: PreTrainedModel) -> Any:
    """How peft is told."""
    from peft import LoraConfig

    return LoraConfig(
        r=step.r,
        lora_alpha=step.lora_alpha or 2 * step.r,
        lora_dropout=step.lora_dropout,
        use_rslora=step.use_rslora,
        use_dora=step.use_dora,
        fan_in_fan_out=_in_rows(model),
        target_modules=[name.rpartition(".")[0] for name, value in adapted.items() if value.ndim == 2],
        target_parameters=[name for name, value in adapted.items() if value.ndim == 3] or None,
    )


def _in_rows(model: PreTrainedModel) -> bool:
    """Whether linear layers hold their weights as GPT-2's do, a row for each input."""
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(module, Conv1D) for module in model.modules())


def _mask(adapted: Any, there: Tensor) -> None:
    """Lets the adapter of a linear layer act only through these of its weights."""
    whole_delta, in_rows = adapted.get_delta_weight, adapted.fan_in_fan_out

    def delta(name: str) -> Tensor:
        found: Tensor = whole_delta(name) * there
        return found

    def forward(inputs: Tensor) -> Tensor:
        weight = delta(NAME).to(inputs.dtype)
        moved = torch.nn.functional.linear(adapted.lora_dropout[NAME](inputs), weight.T if in_rows else weight)
        outputs: Tensor = adapted.base_layer(inputs)
        return outputs + moved.to(outputs.dtype)

    adapted.get_delta_weight, adapted.forward = delta, forward


@hookimpl
def passes() -> list[type[Pass]]:
    """The pass of this file."""
    return [Lora]

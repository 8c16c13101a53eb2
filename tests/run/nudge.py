"""A pass that recovers, in a module that other processes can import."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from optimum_prune import RecoverPass, option


@dataclass(frozen=True, kw_only=True)
class Nudge(RecoverPass):
    """Moves norms, and the embeddings if asked, by gradient steps towards the teacher's logits; or does what it must not."""

    name: ClassVar[str] = "nudge"
    steps: int = option("Gradient steps.", 4, at_least=1)
    rate: float = option("Of the steps.", 0.02)
    embeddings: bool = option("Whether to move the embeddings too.", False)
    harm: Literal["", "shape", "dtype", "nan", "untie", "evidence"] = option("What to do that is not allowed.", "")
    log: str | None = option("A file that gets a line whenever the pass is carried out.", None)

    def recover(self, recovery) -> Mapping[str, Any]:
        decoder, teacher, calibration = recovery.decoder, recovery.teacher, recovery.calibration
        if self.log is not None:
            with Path(self.log).open("a") as opened:
                opened.write("nudge\n")
        model, tokens = decoder.model.train(), calibration.tokens
        model.requires_grad_(False)
        moved = [value for name, value in model.named_parameters() if self.moves(name)]
        for parameter in moved:
            parameter.requires_grad_(True)
        target = calibration.once("target", lambda: logits_of(teacher.model, tokens))
        distances = []
        for _ in range(self.steps):
            gradients, distance = calibration.once("gradient", lambda: gradients_of(model, tokens, target, moved))
            distances.append(distance)
            with torch.no_grad():
                for parameter, gradient in zip(moved, gradients, strict=True):
                    parameter.sub_(self.rate * gradient)
        self.do_harm(decoder)
        return {
            "distances": distances,
            "teacher_layers": len(teacher),
            **({"no": object()} if self.harm == "evidence" else {}),
        }

    def moves(self, name: str) -> bool:
        return "norm" in name or (self.embeddings and "embed_tokens" in name)

    def do_harm(self, decoder) -> None:
        norm = decoder.model.model.norm
        if self.harm == "shape":
            norm.weight.data = norm.weight.data[:-1].clone()
        if self.harm == "dtype":
            norm.weight.data = norm.weight.data.bfloat16()
        if self.harm == "nan":
            norm.weight.data[3] = torch.nan
        if self.harm == "untie":
            decoder.model.lm_head.weight = nn.Parameter(decoder.model.lm_head.weight.detach().clone())


@torch.no_grad()
def logits_of(model, tokens):
    return model(input_ids=tokens, use_cache=False).logits


def gradients_of(model, tokens, target, parameters):
    distance = nn.functional.mse_loss(model(input_ids=tokens, use_cache=False).logits, target)
    distance.backward()
    gradients = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return gradients, distance.item()


@dataclass(frozen=True, kw_only=True)
class Shrink(RecoverPass):
    """Halves the last norm, and looks at nothing."""

    name: ClassVar[str] = "shrink"
    needs_teacher: ClassVar[bool] = False

    def recover(self, recovery) -> Mapping[str, Any]:
        recovery.decoder.model.model.norm.weight.data.mul_(0.5)
        return {"teacher_layers": len(recovery.teacher)}

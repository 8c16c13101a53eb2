"""The export pass `padded`: a model whose layers differ in shape as a stock checkpoint, for what reads no other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from optimum_prune.anatomy.counts import count_parameters
from optimum_prune.anatomy.decoder import Decoder
from optimum_prune.checkpoint.loading import load_model
from optimum_prune.checkpoint.opening import length_limit
from optimum_prune.checkpoint.saving import save
from optimum_prune.errors import PassError, RecipeError
from optimum_prune.evaluation.runtime import Runtime, open_in_transformers
from optimum_prune.hooks.marker import hookimpl
from optimum_prune.hooks.plugins import load
from optimum_prune.passes.base import Pass, Stage
from optimum_prune.passes.folder import FolderPass, Job
from optimum_prune.selection.goals import SPEEDS
from optimum_prune.selection.mixtures import AXIS as MEMBERS
from optimum_prune.selection.timing import Stopwatch
from optimum_prune.surgery.padding import padded

if TYPE_CHECKING:
    from optimum_prune.anatomy.shape import Shape
    from optimum_prune.passes.checkpoint_spec import CheckpointSpec

CONTEXT = 256
"""Tokens of the prompt that both models are timed on."""
EXAMPLE = '''"""Generates text with the model in this folder: python example.py "Once upon a time"."""

import sys
from pathlib import Path

from transformers import pipeline

prompt = sys.argv[1] if len(sys.argv) > 1 else "Once upon a time"
write = pipeline("text-generation", model=str(Path(__file__).resolve().parent))
print(write(prompt, max_new_tokens=32, do_sample=False)[0]["generated_text"])
'''


@dataclass(frozen=True, kw_only=True)
class Padded(FolderPass):
    """A stock checkpoint that computes the same: narrower layers are filled up with zeros, and what was saved in them is given back."""

    name: ClassVar[str] = "padded"
    stage: ClassVar[Stage] = Stage.EXPORT
    exports_checkpoint: ClassVar[bool] = True
    takes_heterogeneous: ClassVar[bool] = True
    usual_tolerance: ClassVar[float] = 0.05
    """In bfloat16, kernels round sums of more terms otherwise, even where those are zero; in float32 nothing differs."""

    def check(self, spec: CheckpointSpec) -> None:
        """Refuses a model that needs no zeros, and a router that would choose what is made of them."""
        if not spec.heterogeneous:
            raise RecipeError(
                f"{self.name} fills up layers that are smaller than others, and the layers of this model are all alike: it is a stock "
                f"checkpoint already. Leave {self.name} out."
            )
        self._check_members(spec.shape)

    def _check_members(self, shape: Shape) -> None:
        if MEMBERS in shape.searched or len({layer.units(MEMBERS) for layer in shape.layers if layer.routed}) > 1:
            raise RecipeError(
                f"{self.name} fills up layers with zeros, and layers of this mixture have different numbers of experts, or may have: their "
                f"router would choose those of zeros. Keep as many experts in every layer, or leave {self.name} out."
            )

    def convert(self, job: Job) -> Mapping[str, Any]:
        """Fills up the layers, and times the model beside the one that it is made of."""
        model = load_model(job.source, device_map=job.device, trust_remote_code=job.trust_remote_code)
        if not hasattr(model.config, "pruned"):  # a search that might have made layers differ did not
            raise PassError(
                f"All layers of the model are as its stock config says, so {self.name} has nothing to fill up. Leave it out."
            )
        decoder = Decoder.of(model, load().families)
        self._check_members(decoder.shape())
        whole = padded(decoder)
        before, after = (count_parameters(each.model).total for each in (decoder, whole))
        context = min(CONTEXT, length_limit(decoder.config) // 2)
        times = {step: Stopwatch(decoder, step, 1, context).beside(whole)[1] for step in SPEEDS.values()}
        save(whole.model, job.tokenizer(), job.target, job.progress)
        (job.target / "example.py").write_text(EXAMPLE, encoding="utf-8")
        return {"parameters": after, "times_the_parameters": after / before, "times_as_long": times}

    def open(self, folder: Path, device: str) -> Runtime:
        """The folder in stock transformers."""
        return open_in_transformers(folder, device)


@hookimpl
def passes() -> Iterator[type[Pass]]:
    """The pass."""
    yield Padded

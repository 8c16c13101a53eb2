"""Passes from folder to folder: a quantizer or an exporter reads one checkpoint folder and fills another."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from optimum_prune.errors import PluginError
from optimum_prune.options import option
from optimum_prune.passes.base import Pass

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from optimum_prune.evaluation.runtime import Runtime
    from optimum_prune.machine.progress import Progress
    from optimum_prune.passes.checkpoint_spec import CheckpointSpec
    from optimum_prune.text.windows import Windows

TOLERANCES = {2: 1.2, 3: 0.9, 4: 0.6, 8: 0.2}
RENAMED = {"takes_odd": "takes_heterogeneous"}
"""What attributes of a pass were called once, and are called now."""


@dataclass(frozen=True)
class Job:
    """What a pass from folder to folder is to do."""

    source: Path
    """The checkpoint to read."""
    target: Path
    """An empty folder to fill."""
    calibration: Windows
    """The recipe's windows, for passes that choose by text."""
    device: str
    """Where to compute, as torch calls it."""
    progress: Progress
    seed: int = 0
    trust_remote_code: bool = False

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the checkpoint in `source`, read anew."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.source, trust_remote_code=self.trust_remote_code)

    def examples(self) -> Iterator[dict[str, Tensor]]:
        """Each calibration window as a model takes it, without its padding, which a library might count as text."""
        for tokens, mask in zip(self.calibration.tokens, self.calibration.mask, strict=True):
            text = tokens[mask][None]
            yield {"input_ids": text, "attention_mask": text.new_ones(text.shape)}


@dataclass(frozen=True, kw_only=True)
class FolderPass(Pass):
    """A pass that reads one checkpoint folder and writes another: quantizers and exporters.

    What a QUANTIZE pass writes is the checkpoint from there on; what an EXPORT pass writes lies beside it, in a folder with the
    pass's name, with `example.py`, a script that runs it without this package. The tokenizer is put into either where the pass
    wrote none; into a checkpoint, what else lay beside the weights, such as the config of what prepares images, and into its JSON
    files what transformers 4 reads. Then it is opened again, run, and compared with the checkpoint that it was made from.

    With `python`, all of that happens in another interpreter, which needs torch, transformers and what is in `requires`, but
    not this package.
    """

    takes_heterogeneous: ClassVar[bool] = False
    """Whether it can read a checkpoint whose layers differ in shape or lack a block."""
    takes_experts: ClassVar[bool] = True
    """Whether it converts the experts of a mixture too, whose weights transformers keep in one tensor."""

    exports_checkpoint: ClassVar[bool] = False
    """Whether what it exports is a checkpoint as well, with all that belongs beside one."""

    python: str | None = option("Interpreter that runs this pass, if its libraries need another environment.", None)
    tolerance: float | None = option(
        "How far logits may be from those before this pass, relative to their spread; beyond it the run fails.",
        None,
        at_least=0,
    )

    def __init_subclass__(cls, **arguments: Any) -> None:
        """Refuses a pass that was written for an earlier version.

        Raises:
            PluginError: it has an attribute by a name that nothing reads any more.
        """
        super().__init_subclass__(**arguments)
        for old, new in RENAMED.items():
            if old in vars(cls):
                raise PluginError(f"The pass {cls.__name__} says {old}, which is called {new} now: rename it")

    @property
    def usual_tolerance(self) -> float:
        """The tolerance if none is given: about twice what it does to a real model. A class may have it as a plain number."""
        raise NotImplementedError(f"The pass '{self.name}' says no usual_tolerance.")

    @abstractmethod
    def check(self, spec: CheckpointSpec) -> None:
        """Looks at what is known of the checkpoint that it will read, before anything runs.

        Raises:
            RecipeError: it could not convert that, or not with these options; the message has the remedy.
        """

    @abstractmethod
    def convert(self, job: Job) -> Mapping[str, Any]:
        """Reads the checkpoint in `job.source`, fills `job.target`, and returns evidence for the report, as plain data."""

    @abstractmethod
    def open(self, folder: Path, device: str) -> Runtime:
        """What `convert` wrote, read from its folder and ready to run, as its users will run it."""


def tolerance_by_bits(bits: int) -> float:
    """The usual tolerance of a quantizer that rounds weights by text: about twice what it does to the logits of a small real model.

    Args:
        bits: of a weight: 2, 3, 4 or 8. Activations are not rounded.
    """
    return TOLERANCES[bits]

"""The Optimum face: `Pruner.from_pretrained(model).prune(Osscar(ratio=0.1), calibration=..., save_dir=...)`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from optimum_prune.calibration import Calibration, Text
from optimum_prune.compress import compress
from optimum_prune.errors import RecipeError
from optimum_prune.passes import Pass
from optimum_prune.progress import Progress
from optimum_prune.recipe import DType, Recipe, Settings
from optimum_prune.run import Texts
from optimum_prune.subject import Subject, open_subject

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Pruner:
    """Prunes a model and saves it, as Optimum's quantizers and optimizers do."""

    def __init__(self, subject: Subject, settings: Settings) -> None:
        self.subject = subject
        self.settings = settings

    @classmethod
    def from_pretrained(
        cls,
        model_or_path: PreTrainedModel | str | Path,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dtype: DType = "auto",
        device: str = "auto",
        seed: int = 0,
        trust_remote_code: bool = False,
    ) -> Pruner:
        """A pruner for a folder, a Hub id, a `.gguf` file or a model in memory.

        A model in memory is pruned in place, where it is and as it is; its tokenizer is needed to read a text and to be saved
        with it, and found by the model's name if not given.

        Raises:
            OptimumPruneError: the model cannot be opened.
        """
        if isinstance(model_or_path, (str, Path)):
            settings = Settings(
                model=str(model_or_path), seed=seed, dtype=dtype, device=device, trust_remote_code=trust_remote_code
            )
            subject = open_subject(settings, Progress.for_terminal())
            return cls(replace(subject, tokenizer=tokenizer) if tokenizer is not None else subject, settings)
        model = model_or_path
        name = model.name_or_path or type(model).__name__
        here = Settings(model=name, seed=seed, device=str(model.device), trust_remote_code=trust_remote_code)
        return cls(
            Subject(name, name, model.config, tokenizer or _tokenizer(name), lambda _: model.eval(), in_memory=True),
            here,
        )

    def prune(
        self,
        *passes: Pass,
        calibration: Calibration | Text | str | Path | None = None,
        evaluation: Calibration | Text | str | Path | None = None,
        save_dir: str | Path,
        overwrite: bool = False,
        resume: bool = False,
        hooks: Iterable[object] = (),
        progress: Progress | None = None,
    ) -> Path:
        """Carries out passes and saves the model with its report.

        Args:
            calibration: what to choose by: windows of tokens, a text, or the name of a text file; WikiText-2 if not given.
            evaluation: what to report on; if not given, the end of the calibration text, or nothing if that is windows.
            save_dir: the output folder.
            overwrite: replace the output folder if it exists.
            resume: refuse to begin anew where a run that ended early is of another model, text or options.
            hooks: objects with `before_pass` or `pass_finished` marked `@hookimpl`.
            progress: where to show progress; bars if stderr is a terminal, if not given.

        Returns:
            The output folder.

        Raises:
            OptimumPruneError: whatever a user can mend; then there is no output folder.
        """
        texts = None
        if isinstance(calibration, Calibration):
            if evaluation is not None and not isinstance(evaluation, Calibration):
                raise RecipeError(
                    "The calibration is given as windows and the evaluation as a text. Give both as windows."
                )
            texts = Texts(calibration, evaluation)
        elif isinstance(evaluation, Calibration):
            raise RecipeError(
                "The evaluation is given as windows and the calibration as a text. Give both as windows."
            )
        recipe = Recipe(
            passes=passes,
            calibration=Text() if isinstance(calibration, Calibration) else _text(calibration),
            evaluation=Text() if isinstance(evaluation, Calibration) else _text(evaluation),
            settings=self.settings,
        )
        compress(
            recipe,
            save_dir,
            subject=self.subject,
            texts=texts,
            overwrite=overwrite,
            resume=resume,
            hooks=hooks,
            progress=progress or Progress.for_terminal(),
        )
        return Path(save_dir)


def _text(text: Text | str | Path | None) -> Text:
    if isinstance(text, Text):
        return text
    return Text() if text is None else Text(text=str(text))


def _tokenizer(name: str) -> PreTrainedTokenizerBase | None:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception:  # a model that was built in memory has a name that leads nowhere
        return None

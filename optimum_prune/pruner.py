"""The Pruner, as Optimum's users know such: `Pruner.from_pretrained(model).prune(Osscar(ratio=0.1), calibration=..., save_dir=...)`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from optimum_prune.calibration.calibration import Calibration
from optimum_prune.errors import RecipeError
from optimum_prune.machine.progress import Progress
from optimum_prune.passes.base import Pass
from optimum_prune.plan.source import ModelSource, open_source
from optimum_prune.recipe import DType, Recipe, Settings
from optimum_prune.run.compress import compress
from optimum_prune.text.text import Text
from optimum_prune.text.windows import Texts, Windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Given = Calibration | Windows | Text | str | Path | None
"""Windows of tokens, or those of a calibration; a text, or the name of a text file; or nothing."""


class Pruner:
    """Prunes a model and saves it, as Optimum's quantizers and optimizers do."""

    def __init__(self, source: ModelSource, settings: Settings) -> None:
        self.source = source
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
            source = open_source(settings, Progress.for_terminal())
            return cls(replace(source, tokenizer=tokenizer) if tokenizer is not None else source, settings)
        model = model_or_path
        name = model.name_or_path or type(model).__name__
        source = ModelSource.of_model(model, tokenizer or _tokenizer(name))
        settings = Settings(model=name, seed=seed, device=str(model.device), trust_remote_code=trust_remote_code)
        return cls(source, settings)

    def prune(
        self,
        *passes: Pass,
        calibration: Given = None,
        evaluation: Given = None,
        save_dir: str | Path,
        overwrite: bool = False,
        resume: bool = False,
        hooks: Iterable[object] = (),
        progress: Progress | None = None,
    ) -> Path:
        """Carries out passes and saves the model with its report.

        Args:
            calibration: what to choose by: windows of tokens, or a calibration with such, a text, or the name of a text file;
                WikiText-2 if not given.
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
        texts = _texts(calibration, evaluation)
        recipe = Recipe(
            passes=passes, calibration=_text(calibration), evaluation=_text(evaluation), settings=self.settings
        )
        compress(
            recipe,
            save_dir,
            source=self.source,
            texts=texts,
            overwrite=overwrite,
            resume=resume,
            hooks=hooks,
            progress=progress or Progress.for_terminal(),
        )
        return Path(save_dir)


def _texts(calibration: Given, evaluation: Given) -> Texts | None:
    """The windows that are given; None if texts are.

    Raises:
        RecipeError: one of the two is given as windows, and the other as a text.
    """
    chosen, reported = _windows(calibration), _windows(evaluation)
    if chosen is None and reported is None:
        return None
    if chosen is None:
        raise RecipeError("The evaluation is given as windows and the calibration as a text. Give both as windows.")
    if reported is None and evaluation is not None:
        raise RecipeError("The calibration is given as windows and the evaluation as a text. Give both as windows.")
    return Texts(chosen, reported)


def _windows(given: Given) -> Windows | None:
    """The windows, if such are given."""
    if isinstance(given, Calibration):
        return given.windows
    return given if isinstance(given, Windows) else None


def _text(given: Given) -> Text:
    """The text, if such is given; else one that names nothing."""
    if isinstance(given, Text):
        return given
    return Text(text=str(given)) if isinstance(given, (str, Path)) else Text()


def _tokenizer(name: str) -> PreTrainedTokenizerBase | None:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception:  # a model that was built in memory has a name that leads nowhere
        return None

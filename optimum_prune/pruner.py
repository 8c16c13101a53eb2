"""The Pruner, as Optimum's users know such: `Pruner.from_pretrained(model).prune(Osscar(ratio=0.1), calibration=..., save_dir=...)`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from optimum_prune.calibration.calibration import Calibration
from optimum_prune.checkpoint.loading import check_resident
from optimum_prune.checkpoint.opening import length_limit, open_checkpoint
from optimum_prune.checkpoint.taking import taken
from optimum_prune.errors import OptimumPruneError, RecipeError, shown
from optimum_prune.machine.given_files import path_of
from optimum_prune.machine.progress import Progress
from optimum_prune.passes.base import Pass
from optimum_prune.plan.source import ModelSource, open_source
from optimum_prune.recipe import DType, Recipe, Settings
from optimum_prune.run.compress import compress
from optimum_prune.text.text import Text
from optimum_prune.text.training import Training
from optimum_prune.text.windows import Texts, Windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


PROBED = 64
"""Tokens by which a saved model is compared where no text is given."""
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

        A model in memory is pruned in place, where it is and as it is.

        Args:
            tokenizer: to read texts with and to be saved with the model; if not given, the model's own. Without any, windows of tokens
                have to be given, unless no pass chooses by text.

        Raises:
            OptimumPruneError: the model cannot be opened, or is to be what it is not.
        """
        tokenizer, progress = _checked(tokenizer), Progress.for_terminal()
        how: dict[str, Any] = {"seed": seed, "trust_remote_code": trust_remote_code}
        if isinstance(model_or_path, (str, Path)):
            settings = Settings(model=str(model_or_path), dtype=dtype, device=device, **how)
            return cls(open_source(settings, progress, tokenizer=tokenizer, tokenizer_needed=False), settings)
        model = taken(model_or_path)
        check_resident(model, model.name_or_path or type(model).__name__)
        for what, asked, own in (("dtype", dtype, model.dtype), ("device", device, model.device)):
            if asked not in (
                "auto",
                str(own),
                str(own).removeprefix("torch."),
                str(own).partition(":")[0],
            ):
                raise RecipeError(
                    f"A model in memory is pruned as it is, with the {what} {own}, and {asked} is asked for. Load it so, or leave '{what}' out."
                )
        settings = Settings(model=model.name_or_path or type(model).__name__, device=str(model.device), **how)
        own = _own_tokenizer(model, progress, trust_remote_code) if tokenizer is None else tokenizer
        return cls(ModelSource.of_model(model, own, progress), settings)

    def prune(
        self,
        *passes: Pass,
        calibration: Given = None,
        evaluation: Given = None,
        training: Training | Text | str | Path | None = None,
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
            training: what passes that train are trained on, if anything else than that.
            save_dir: the output folder.
            overwrite: replace it if it exists.
            resume: refuse to begin anew where a run that ended early is of another model, text or options.
            hooks: objects with `before_pass` or `pass_finished` marked `@hookimpl`.
            progress: where to show progress; bars if stderr is a terminal, if not given.

        Returns:
            The output folder.

        Raises:
            OptimumPruneError: whatever a user can mend; then there is no output folder.
        """
        texts = _texts(calibration, evaluation, length_limit(self.source.config.get_text_config()))
        named: dict[str, Any] = {"calibration": _text(calibration), "evaluation": _text(evaluation)}
        recipe = Recipe(passes=passes, training=_training(training), settings=self.settings, **named)
        how: dict[str, Any] = {"overwrite": overwrite, "resume": resume, "hooks": hooks}
        how["progress"] = Progress.for_terminal() if progress is None else progress
        compress(recipe, save_dir, source=self.source, texts=texts or self._probing_texts(recipe), **how)
        return path_of(save_dir)

    def _probing_texts(self, recipe: Recipe) -> Texts | None:
        """Random tokens to compare the saved model with the one in memory by, where nothing is given and no pass chooses by text; else None."""
        named = recipe.calibration.named or recipe.evaluation.named or self.source.tokenizer is not None
        if named or any(step.needs_text for step in recipe.passes):
            return None
        half = (
            self.source.config.get_text_config().vocab_size // 2
        )  # tokens that stand for images are in the other one
        generator = torch.Generator().manual_seed(self.settings.seed)
        return Texts(Windows.from_tokens(torch.randint(half, (1, PROBED), generator=generator), "random tokens"), None)


def _texts(calibration: Given, evaluation: Given, longest: int) -> Texts | None:
    """The windows that are given; None if texts are.

    Args:
        longest: how many tokens the model takes at once.

    Raises:
        RecipeError: one of the two is given as windows, and the other as a text.
    """
    chosen, reported = _windows(calibration), _windows(evaluation)
    for windows in (chosen, reported):
        if windows is not None:
            windows.check(longest)
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
    """The text, if such is given; else one that names nothing.

    Raises:
        RecipeError: it is something else.
    """
    if isinstance(given, Text):
        return given
    if isinstance(given, (str, Path)):
        return Text(text=str(given))
    if given is None or _windows(given) is not None:
        return Text()
    raise RecipeError(
        f"A text is given as {shown(given)}, which is none. Give the name of a text file, a Text, or Windows.from_tokens(tokens)."
    )


def _training(given: Training | Text | str | Path | None) -> Training:
    """The text to train on that is given; else one that names nothing."""
    return given if isinstance(given, Training) else Training.of(_text(given))


def _checked(tokenizer: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer that is given, or that of a processor.

    Raises:
        RecipeError: it is something else.
    """
    given = getattr(tokenizer, "tokenizer", None)
    tokenizer = tokenizer if given is None else given
    is_one = callable(tokenizer) and hasattr(tokenizer, "save_pretrained") and not isinstance(tokenizer, type)
    if tokenizer is None or is_one:
        return tokenizer
    raise RecipeError(
        f"The tokenizer is given as {shown(tokenizer)}, which is none. Give one as AutoTokenizer.from_pretrained returns it."
    )


def _own_tokenizer(
    model: PreTrainedModel, progress: Progress, trust_remote_code: bool
) -> PreTrainedTokenizerBase | None:
    """The tokenizer that lies where a model came from; None if it came from nowhere."""
    name = model.name_or_path
    if not name:
        return None
    try:
        return open_checkpoint(name, trust_remote_code, quantized=True).tokenizer()
    except OptimumPruneError as error:
        progress.say(f"{type(model).__name__} is saved without a tokenizer, unless one is given: {error}")
        return None

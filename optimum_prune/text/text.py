"""Which text a recipe means, how many windows of it and how long, and that what chooses and what reports are not the same text."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from optimum_prune.errors import RecipeError, TextError, printable
from optimum_prune.machine import given_files
from optimum_prune.options import check_options, option

MOST = 2**31 - 1
"""More windows, or tokens of one, than any model is given."""
WIKITEXT = "Salesforce/wikitext:wikitext-2-raw-v1"
SAMPLES = 128
LENGTH = 2048


@dataclass(frozen=True, kw_only=True)
class Text:
    """A text, and how many windows of which length are asked of it."""

    text: str | None = option(
        "A text file, .txt, .jsonl (field 'text') or .parquet (column 'text'), or a folder of such.", None
    )
    dataset: str | None = option(
        "A dataset of the Hugging Face Hub, as NAME[:CONFIG[:SPLIT]]; the split is 'train' if not given.", None
    )
    column: str = option("The field or column that holds the text, or conversations as lists of messages.", "text")
    samples: int | None = option(
        f"How many windows; {SAMPLES} if not given, or as many as there are.", None, at_most=MOST
    )
    length: int | None = option(
        f"Tokens of a window; {LENGTH} if not given, or as many as the model can take.", None, at_most=MOST
    )

    def __post_init__(self) -> None:
        check_options(self, "a text")
        if self.text is not None and self.dataset is not None:
            raise RecipeError(f"Both a text ({self.text}) and a dataset ({self.dataset}) are named. Name one of them.")
        if self.dataset is not None and not self.dataset_parts[0]:
            raise RecipeError("A dataset without a name is named. Write NAME[:CONFIG[:SPLIT]], or name a text file.")
        if self.length is not None and self.length < 2:
            raise RecipeError(f"Windows of {self.length} tokens are asked for. A window needs at least 2.")
        if self.samples is not None and self.samples < 0:
            raise RecipeError(
                f"{self.samples} windows are asked for. Give a number of at least 1, or 0 to evaluate nothing."
            )
        if self.file is not None and (flaw := given_files.flaw(self.file)) and not self._holds_files:
            raise TextError(
                f"The text file {self.text or 'without a name'} {flaw}. Name a .txt, .jsonl or .parquet file."
            )

    @property
    def file(self) -> Path | None:
        """The text file, if one is named; option and recipe key call it `text`."""
        return None if self.text is None else given_files.path_of(self.text)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files in the folder that is named, and in those below it, by their names; none of those that are hidden."""
        if not self.is_folder or self.file is None:
            return ()
        return tuple(sorted(given_files.files_below(self.file)))

    @property
    def _holds_files(self) -> bool:
        """Whether a folder is named in which there are files."""
        return self.is_folder and self.file is not None and next(given_files.files_below(self.file), None) is not None

    @property
    def is_folder(self) -> bool:
        """Whether a folder is named, and not by chance: an empty name, and the root of a disk, are no folder of texts."""
        return bool(self.text) and self.file is not None and given_files.is_folder(self.file)

    @property
    def named(self) -> bool:
        """Whether a file or a dataset is named."""
        return self.file is not None or self.dataset is not None

    @property
    def dataset_parts(self) -> tuple[str, str | None, str]:
        """Name, config and split of the dataset."""
        name, *rest = (self.dataset or "").split(":")
        name = str(given_files.path_of(name)) if name.startswith("~") else name
        return name, rest[0] or None if rest else None, ":".join(rest[1:]) or "train"

    def describe(self) -> str:
        """Where the text is from, in one phrase."""
        if self.file is not None:
            return printable(self.file.name)
        name, config, split = self.dataset_parts
        return printable(":".join(part for part in (name, config, split) if part))

    def is_reported_on(self, evaluation: Text) -> bool:
        """Whether it is the text that a model is reported on, or a folder with it, or a file in it."""
        return evaluation.named and evaluation.samples != 0 and self.overlaps(evaluation)

    def overlaps(self, other: Text) -> bool:
        """Whether both name the same text, or one a folder in which the other's is."""
        if self.file is None or other.file is None:
            return self.same_text_as(other)
        mine, its = self.file.resolve(), other.file.resolve()
        return mine == its or mine in its.parents or its in mine.parents

    def same_text_as(self, other: Text) -> bool:
        """Whether both name the same file, or the same split of the same dataset."""
        if self.file is not None and other.file is not None:
            return self.file.resolve() == other.file.resolve()
        return self.file is None and other.file is None and self.dataset_parts == other.dataset_parts


@dataclass(frozen=True)
class Wanted:
    """Number and length of the windows that are asked of a text; a text that is too short has fewer."""

    windows: int
    length: int

    @property
    def tokens(self) -> int:
        """In all windows together."""
        return self.windows * self.length


def windows_wanted(text: Text, length: int, limit: int) -> Wanted:
    """The windows that are asked of a text.

    Args:
        length: tokens of a window, if the text asks for no length.
        limit: tokens that the model takes at once.

    Raises:
        RecipeError: the windows are longer than that.
    """
    length = text.length or length
    if length > limit:
        raise RecipeError(
            f"Windows of {length} tokens are asked for, and the model takes at most {limit}. Ask for shorter ones."
        )
    return Wanted(SAMPLES if text.samples is None else text.samples, length)


def window_counts(calibration: Text, evaluation: Text, limit: int) -> tuple[Wanted, Wanted]:
    """The windows that are asked for to calibrate on and to evaluate on; the latter are as long as the former if not told otherwise.

    Args:
        limit: tokens that the model takes at once.

    Raises:
        RecipeError: windows longer than that.
    """
    chosen = windows_wanted(calibration, min(LENGTH, limit), limit)
    return chosen, windows_wanted(evaluation, chosen.length, limit)


def texts_to_use(calibration: Text, evaluation: Text) -> tuple[Text, Text]:
    """The texts with the field's default filled in: WikiText-2 raw, train to calibrate on, test to report on.

    An evaluation text that still names nothing afterwards means the end of the calibration text.

    Raises:
        RecipeError: both name the same text, or no calibration window is asked for.
    """
    if not calibration.named:
        calibration = replace(calibration, dataset=f"{WIKITEXT}:train")
        if not evaluation.named:
            evaluation = replace(evaluation, dataset=f"{WIKITEXT}:test")
    if calibration.is_reported_on(evaluation):
        raise RecipeError(
            f"Windows and evaluation both name {calibration.describe()}. What a model is chosen by must not be what it is "
            f"reported on: name another text, or none for windows from the end of the same one."
        )
    if calibration.samples == 0:
        raise RecipeError("0 calibration windows are asked for. Ask for at least 1.")
    return calibration, evaluation

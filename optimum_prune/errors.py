"""What a person reads when something cannot be done: what was asked, why not, what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from textwrap import shorten

LONGEST_REASON = 300


class OptimumPruneError(Exception):
    """Base of every error that a user can cause and a user can mend."""


class RecipeError(OptimumPruneError):
    """A recipe, an option or a flag that cannot be carried out."""


class PluginError(OptimumPruneError):
    """A plugin that cannot be loaded, or two that clash."""


class FamilyError(OptimumPruneError):
    """An architecture that is unknown, or does not look as its family says."""


class TextError(OptimumPruneError):
    """Text that is missing, empty, too short, or used twice."""


class CheckpointError(OptimumPruneError):
    """A checkpoint that cannot be read."""


class SurgeryError(OptimumPruneError):
    """A cut that the model or its config cannot take."""


class OutputError(OptimumPruneError):
    """An output folder that cannot be written."""


class VerificationError(OptimumPruneError):
    """A saved model that does not compute what the model in memory does."""


class PassError(OptimumPruneError):
    """A pass whose libraries, or whose interpreter, raise an error."""


class NumericalError(OptimumPruneError):
    """Weights or activations that are not finite."""


def unknown(kind: str, name: str, known: Iterable[str], noun: str = "Known") -> str:
    """The sentence for a name that nobody knows, with the nearest name and the list of all.

    >>> unknown("pass", "oscar", ["osscar", "depth"], "Installed")
    "No pass is called 'oscar'. Did you mean 'osscar'? Installed: depth, osscar."
    """
    names = sorted(known)
    close = get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    return f"No {kind} is called '{name}'.{hint} {noun}: {', '.join(names) or 'none'}."


def reason(error: BaseException) -> str:
    """The first line of an error's text, as a sentence; or the whole, if that line only introduces the others."""
    text = str(error).strip() or type(error).__name__
    line = text.split("\n")[0].strip()
    if line.endswith(":"):
        line = shorten(text, LONGEST_REASON)
    return line if line.endswith((".", "?", "!")) else line + "."

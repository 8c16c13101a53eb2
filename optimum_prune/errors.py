"""What a person reads when something cannot be done: what was asked, why not, what to do."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from difflib import get_close_matches
from textwrap import shorten

LONGEST_REASON, LONGEST_NAME = 300, 100
"""Characters of what a library says, and of a name or a value, that an error repeats."""
NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "Cannot allocate memory")
"""What torch says in a plain RuntimeError, and the system in an OSError."""


class OptimumPruneError(Exception):
    """Base of every error that a user can cause and a user can mend; what it says is one line, whatever names are in it."""

    def __str__(self) -> str:
        return printable(super().__str__())


class RecipeError(OptimumPruneError):
    """A recipe, an option or a flag that cannot be carried out."""


class PluginError(OptimumPruneError):
    """A plugin that cannot be loaded, or two that clash."""


class FamilyError(OptimumPruneError):
    """An architecture that is unknown, or does not look as its family says; below the first line, the plugin that would describe it."""

    def __str__(self) -> str:
        return Exception.__str__(self)


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


class VetoError(OptimumPruneError):
    """What a hook raises before a pass if the run is not to go on."""


def followed(error: OptimumPruneError, sentence: str) -> OptimumPruneError:
    """The same error with a further sentence, or one that says both if its class takes other arguments."""
    text = f"{error} {sentence}"
    try:
        longer = type(error)(text)
    except Exception:  # somebody else's class
        return OptimumPruneError(text)
    return longer if str(longer) == text else OptimumPruneError(text)


def unknown(kind: str, name: object, known: Iterable[str], noun: str = "Known") -> str:
    """The sentence for a name that nobody knows, with the nearest name and the list of all.

    >>> unknown("pass", "oscar", ["osscar", "depth"], "Installed")
    "No pass is called 'oscar'. Did you mean 'osscar'? Installed: depth, osscar."
    """
    names, given = sorted(known), printable(cut(str(name), LONGEST_NAME))
    return f"No {kind} is called '{given}'.{meant(given, names)} {noun}: {', '.join(names) or 'none'}."


def meant(name: str, known: Iterable[str]) -> str:
    """The question whether the nearest of the names that are known was meant, behind a space; empty if none is near."""
    close = get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def reason(error: BaseException) -> str:
    """The first line of an error's text, as a sentence; or the whole, if that line only introduces the others."""
    try:
        text = str(error).strip() or type(error).__name__
    except Exception:  # whatever the error's own code may raise
        text = type(error).__name__
    line = text.split("\n")[0].strip()
    if line.endswith(":"):
        line = shorten(text, LONGEST_REASON)
    line = printable(cut(line, LONGEST_REASON))
    return line if line.endswith((".", "?", "!")) else line + "."


def found_no_memory(error: BaseException) -> bool:
    """Whether an error means that there is no memory left, as Python, torch or the system may say it."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(words in str(error) for words in NO_MEMORY)


# What is repeated of what was given


def printable(text: str) -> str:
    """A text as one line that no terminal takes for a command: what cannot be seen is escaped, such as a newline in a file's name."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def cut(text: str, longest: int) -> str:
    """A text, or its beginning and its end if it is longer than so many characters."""
    half = (longest - 3) // 2
    return text if len(text) <= longest else f"{text[:half]}...{text[-half:]}"


def shown(value: object) -> str:
    """A value as Python writes it, or the beginning and the end of that if it is long."""
    try:
        return printable(_SHORT.repr(value))
    except Exception:  # whatever the value's own code may raise
        return f"a {type(value).__name__} that cannot be shown"


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxlong, _SHORT.maxother = 3, LONGEST_NAME, LONGEST_NAME, LONGEST_NAME

"""What is said, and with which code the program ends, when a command cannot be carried out: one sentence that names the culprit."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from optimum_prune.errors import FamilyError, OptimumPruneError, cut, found_no_memory, printable, reason
from optimum_prune.hooks.plugins import Plugins
from optimum_prune.machine import interrupts, processes
from optimum_prune.machine.streams import NotPrintedError

FAILED = 1
LONGEST = 2000
"""Characters of a sentence."""
PACKAGE = "optimum_prune"
VARIABLE = "OPTIMUM_PRUNE_DEBUG"


def debugging(arguments: Sequence[str]) -> bool:
    """Whether the traceback of an error is to be shown."""
    return "--debug" in arguments or os.environ.get(VARIABLE, "0") not in ("", "0")


@dataclass
class Ending:
    """How a program says that it failed."""

    program: str
    debug: bool
    plugins: Plugins | None = None
    """Once they are loaded."""
    told: bool = False
    """Whether something was said: what goes wrong afterwards follows from that."""

    def of(self, error: BaseException) -> int:
        """Says what went wrong, and returns the exit code."""
        if isinstance(error, NotPrintedError) and error.nobody_reads:
            return FAILED
        if self.told or not processes.speaks():
            return interrupts.CODE if _interrupted(error) else FAILED
        self.told = True
        if self.debug:
            traceback.print_exception(error)
        if _interrupted(error):
            kept = str(error) if isinstance(error, KeyboardInterrupt) else ""
            print(f"{self.program}: interrupted; {printable(kept) or interrupts.NOTHING}", file=sys.stderr)
            return interrupts.CODE
        print(f"{self.program}: error: {self._sentence(error)}", file=sys.stderr)
        return FAILED

    def _sentence(self, error: BaseException) -> str:
        """What went wrong in one line; of an architecture that no family describes, also the lines of the plugin that would."""
        if isinstance(error, FamilyError):
            sentence, introduces, lines = str(error).partition(":\n")
            return "\n".join([printable(sentence) + introduces.strip(), *map(printable, lines.splitlines())])
        return cut(printable(self._words(error)), LONGEST)

    def _words(self, error: BaseException) -> str:
        if isinstance(error, (OptimumPruneError, NotPrintedError)):
            return str(error)
        if found_no_memory(error):
            return "There is no memory left. Leave the weights on disk with --offload, give --memory less, or ask for fewer or shorter windows."
        where = self._where(error)
        if isinstance(error, SystemExit):
            return f"{where} ended the program with sys.exit({error.code!r}), which only the program itself may. Please report it."
        if isinstance(error, OSError) and error.strerror:
            file = f"{error.filename}: " if error.filename is not None else ""
            return f"{file}{error.strerror}, in {where}. Look whether that file and its disk are as they should be."
        return (
            f"Something went wrong that should not: {type(error).__name__}: {reason(error)} It was in {where}. Please report it, with what "
            f"--debug prints."
        )

    def _where(self, error: BaseException) -> str:
        """The line of a plugin, or of ours, that an error passed last."""
        tops = {PACKAGE: "", **self._plugins()}
        found = "a library"
        for frame, line in traceback.walk_tb(error.__traceback__):
            top = str(frame.f_globals.get("__name__", "")).partition(".")[0]
            left = isinstance(error, SystemExit) and not top.startswith(
                "_"
            )  # a plugin that is not loaded yet may end the program
            if top in tops or left:
                file = Path(frame.f_code.co_filename)
                name = "/".join(file.parts[file.parts.index(PACKAGE) :]) if PACKAGE in file.parts else file.name
                found = f"{tops.get(top, '')}{name}, line {line}"
        return found

    def _plugins(self) -> dict[str, str]:
        """The modules of plugins, each with what it is called."""
        if self.plugins is None:
            return {}
        named = ((self.plugins.manager.get_name(each), each) for each in self.plugins.manager.get_plugins())
        found = {
            getattr(each, "__name__", type(each).__module__).partition(".")[0]: f"the plugin {name}, "
            for name, each in named
        }
        return {module: words for module, words in found.items() if module != PACKAGE}


def _interrupted(error: BaseException) -> bool:
    """Whether an error is what became of a signal to stop; also where that broke an import, and what imports was blamed for it."""
    if isinstance(error, KeyboardInterrupt) or not interrupts.came():
        return isinstance(error, KeyboardInterrupt)
    return not isinstance(error, OptimumPruneError) or isinstance(error.__cause__, ImportError)

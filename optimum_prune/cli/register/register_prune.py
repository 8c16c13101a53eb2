"""Registers `optimum-cli prune` and `optimum-cli compress`.

optimum-cli imports this module at every start, so it imports nothing of ours. Which flags a command has depends on the plugins
that are installed; both commands therefore take whatever follows as it is, and hand it over when they run.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class _HandedOver(BaseOptimumCLICommand):  # type: ignore[misc]  # optimum is not annotated throughout
    """A command whose arguments are parsed by optimum_prune.cli when it runs."""

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        parser.prefix_chars = "\0"  # no argument is a flag here, --help included
        parser.add_argument("arguments", nargs=argparse.REMAINDER)

    def run(self) -> None:
        try:
            os.getcwd()  # noqa: PTH109 - asks only whether there is one
        except OSError:
            sys.exit("optimum-cli: error: The current folder is not there any more. Go to another.")
        from optimum_prune.cli.main import main
        from optimum_prune.machine.interrupts import end_at_once
        from optimum_prune.machine.streams import open_closed

        open_closed()
        end_at_once("optimum-cli")
        sys.exit(main([self.COMMAND.name, *self.args.arguments]))


class PruneCommand(_HandedOver):
    """`optimum-cli prune`."""

    COMMAND = CommandInfo(name="prune", help="Prune a language model with one method.")


class CompressCommand(_HandedOver):
    """`optimum-cli compress`."""

    COMMAND = CommandInfo(name="compress", help="Run, plan and evaluate compression recipes for language models.")


REGISTER_COMMANDS = [PruneCommand, CompressCommand]


def _end(number: int, frame: Any) -> None:
    """Ends the program that is told to stop while it imports its libraries, which takes seconds."""
    os.write(2, b"optimum-cli: interrupted; nothing was written.\n")
    os._exit(130)


if sys.argv[1:2] and sys.argv[1] in {command.COMMAND.name for command in REGISTER_COMMANDS}:
    for _number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(_number) is not signal.SIG_IGN:
            signal.signal(_number, _end)

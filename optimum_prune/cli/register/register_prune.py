"""Registers `optimum-cli prune` and `optimum-cli compress`.

optimum-cli imports this module at every start, so it imports nothing of ours. Which flags a command has depends on the plugins
that are installed; both commands therefore take whatever follows as it is, and hand it over when they run.
"""

from __future__ import annotations

import argparse
import sys

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class _HandedOver(BaseOptimumCLICommand):  # type: ignore[misc]  # optimum is not annotated throughout
    """A command whose arguments are parsed by optimum_prune.cli when it runs."""

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        parser.prefix_chars = "\0"  # no argument is a flag here, --help included
        parser.add_argument("arguments", nargs=argparse.REMAINDER)

    def run(self) -> None:
        from optimum_prune.cli.main import main

        sys.exit(main([self.COMMAND.name, *self.args.arguments]))


class PruneCommand(_HandedOver):
    """`optimum-cli prune`."""

    COMMAND = CommandInfo(name="prune", help="Prune a language model with one method.")


class CompressCommand(_HandedOver):
    """`optimum-cli compress`."""

    COMMAND = CommandInfo(name="compress", help="Run, plan and evaluate compression recipes for language models.")


REGISTER_COMMANDS = [PruneCommand, CompressCommand]

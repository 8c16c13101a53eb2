"""Parses a command line, runs the command, and turns what goes wrong into one sentence."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any, NoReturn

from optimum_prune.cli import commands
from optimum_prune.cli.flags import add_common, add_evaluation, add_output
from optimum_prune.errors import OptimumPruneError, PluginError, unknown
from optimum_prune.hooks.plugins import Plugins, load
from optimum_prune.machine import processes
from optimum_prune.options import options_of
from optimum_prune.passes.base import Stage

FAILED, INTERRUPTED = 1, 130


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message[:1].upper()}{message[1:].rstrip('.')}. See {self.prog} --help.\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        if processes.first():
            super()._print_message(message, file)


def main(arguments: Sequence[str], program: str = "optimum-cli") -> int:
    """Runs a command, together with other processes if there are; returns its exit code: 0, or 1 after one sentence on stderr."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        if sentence := processes.lacking():
            print(sentence, file=sys.stderr)
        with processes.started():
            return _main(arguments, program)
    except processes.ProcessError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return FAILED


def _main(arguments: Sequence[str], program: str) -> int:
    try:
        plugins = load()
        _check_method(arguments, plugins)
        parsed = _parser(program, plugins).parse_args(arguments)
        if processes.first() or parsed.together:
            parsed.run(parsed, plugins)
    except OptimumPruneError as error:
        if processes.speaks():
            print(f"{program}: error: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt as error:
        if processes.speaks():
            print(f"{program}: interrupted; {error or 'nothing was written.'}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        sys.stderr.close()
        return FAILED
    return 0


def _check_method(arguments: Sequence[str], plugins: Plugins) -> None:
    """Refuses a method that nobody provides, naming the nearest, which argparse does not."""
    methods = [name for name, step in plugins.passes.items() if step.stage is Stage.PRUNE]
    if (
        arguments[:1] == ["prune"]
        and arguments[1:]
        and not arguments[1].startswith("-")
        and arguments[1] not in methods
    ):
        raise PluginError(unknown("method", arguments[1], methods, "Installed"))


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _parser(program: str, plugins: Plugins) -> argparse.ArgumentParser:
    parser = _Parser(prog=program)
    top = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_prune(top.add_parser("prune", help="Prune a model with one method."), plugins)
    _add_compress(top.add_parser("compress", help="Run, plan and evaluate recipes."))
    return parser


def _add_prune(parser: argparse.ArgumentParser, plugins: Plugins) -> None:
    parser.description = "Prune a language model with one method."
    methods = parser.add_subparsers(required=True, metavar="METHOD", title="methods", parser_class=_Parser)
    for name, step in sorted(plugins.passes.items()):
        if step.stage is not Stage.PRUNE:
            continue
        method = methods.add_parser(name, help=step.summary(), description=step.__doc__)
        options = method.add_argument_group(f"options of {name}")
        for option in options_of(step).values():
            option.add_flag(options)
        add_output(method)
        add_common(method, model_required=True)
        method.set_defaults(run=commands.prune, pass_class=step, together=True)


def _add_compress(parser: argparse.ArgumentParser) -> None:
    parser.description = "Run, plan and evaluate compression recipes."
    actions = parser.add_subparsers(required=True, metavar="ACTION", title="actions", parser_class=_Parser)

    run = actions.add_parser("run", help="Carry out a recipe.")
    run.add_argument("recipe", metavar="RECIPE.yaml", help="The recipe.")
    add_output(run)
    add_common(run)
    run.set_defaults(run=commands.run, together=True)

    plan = actions.add_parser("plan", help="Say what a recipe would do; reads no weights.")
    plan.add_argument("recipe", metavar="RECIPE.yaml", help="The recipe.")
    plan.add_argument("--json", action="store_true", help="Print every figure as JSON.")
    add_common(plan)
    plan.set_defaults(run=commands.plan, together=False)

    evaluate = actions.add_parser("evaluate", help="Measure the perplexity of any checkpoint.")
    evaluate.add_argument("model", metavar="MODEL", help="A folder, a Hub id, or a .gguf file.")
    add_evaluation(evaluate)
    evaluate.set_defaults(run=commands.evaluate, together=True)

    passes = actions.add_parser("passes", help="List every pass that is installed.")
    passes.set_defaults(run=commands.passes, together=False)
    families = actions.add_parser("families", help="List every architecture that can be pruned.")
    families.set_defaults(run=commands.families, together=False)

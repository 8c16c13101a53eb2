"""Parses a command line, runs the command, and turns what goes wrong into one sentence."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TextIO

from optimum_prune.cli.endings import Ending, debugging
from optimum_prune.cli.parsing import METHODS, methods_of, not_to_be_used, parser_for
from optimum_prune.errors import PluginError, printable, unknown
from optimum_prune.hooks.plugins import Plugins, extras, load
from optimum_prune.machine import interrupts, processes, streams


def main(arguments: Sequence[str], program: str = "optimum-cli") -> int:
    """Runs a command, together with other processes if there are; returns its exit code: 0, or another after one sentence on stderr."""
    ending = Ending(program, debugging(arguments))
    try:
        with interrupts.raised(), streams.for_results(asks=ending.debug) as out:
            if sentence := processes.lacking():
                print(sentence, file=sys.stderr)
            with processes.started():
                return _main(arguments, out, ending)
    except BaseException as error:  # before the processes found each other, or when they had parted
        return ending.of(error)


def _main(arguments: Sequence[str], out: TextIO, ending: Ending) -> int:
    try:
        ending.plugins = plugins = load()
        left_out = not_to_be_used(plugins, out)
        _check_method(arguments, plugins, left_out)
        for sentence in left_out.values() if processes.first() else ():
            print(f"{ending.program}: {printable(sentence)}", file=sys.stderr)
        parser = parser_for(ending.program, plugins, out, left_out)
        try:
            parsed = parser.parse_args(arguments)
        except SystemExit as exit:  # after help, or a mistake
            streams.flush(out)
            return int(exit.code or 0)
        parsed.out = out
        if processes.first() or parsed.together:
            parsed.run(parsed, plugins)
    except BaseException as error:  # whatever it is, it becomes a sentence
        return ending.of(error)
    return 0


def _check_method(arguments: Sequence[str], plugins: Plugins, left_out: Mapping[str, str]) -> None:
    """Refuses a method that nobody provides, naming the nearest, which argparse does not; and one that cannot be used."""
    for command, stage in METHODS.items():
        if tuple(arguments[: len(command)]) != command or len(arguments) == len(command):
            continue
        method = arguments[len(command)]
        if method in left_out:
            raise PluginError(left_out[method])
        methods = methods_of(plugins, stage)
        if method.startswith("-") or method in methods:
            continue
        if method in extras():
            plugins.pass_named(method)  # or the sentence that says what brings it
        if method in plugins.passes:
            commands = {each: " ".join(words) for words, each in METHODS.items()}
            other = commands.get(plugins.passes[method].stage, "a recipe, with compress run")
            raise PluginError(f"'{method}' is no method of {commands[stage]}. Use {other}.")
        raise PluginError(unknown("method", method, methods, "Installed"))

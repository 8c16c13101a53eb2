"""The command line's parser: commands, and the flags of each from the options of passes, settings and texts."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn, TextIO

from optimum_prune.cli import commands
from optimum_prune.cli.arguments import add_flag, attributes, check_flags, flags_of
from optimum_prune.cli.flags import add_common, add_debug, add_evaluation, add_output
from optimum_prune.errors import PluginError, cut, meant, printable
from optimum_prune.hooks.plugins import Plugins
from optimum_prune.machine import processes
from optimum_prune.passes.base import Pass, Stage

LONGEST = 1000
"""Characters of an error."""
METHODS = {("prune",): Stage.PRUNE, ("compress", "quantize"): Stage.QUANTIZE, ("compress", "export"): Stage.EXPORT}
"""The commands that carry out one pass, and the stage of those that each does."""
DESCRIBED = {
    Stage.PRUNE: "Prune a language model with one method.",
    Stage.QUANTIZE: "Quantize a checkpoint, pruned or not, with one method.",
    Stage.EXPORT: "Write a checkpoint, pruned or not, in the form that a runtime reads.",
}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence, and whose flags are those that are written out.

    Args:
        out: where help goes.
    """

    def __init__(self, out: TextIO, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        self._out = out
        self._branches = False

    def add_subparsers(self, **options: Any) -> Any:
        """Commands below this one, parsed alike."""
        self._branches = True
        below: Any = partial(Parser, self._out)
        return super().add_subparsers(parser_class=below, required=True, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuses the first flag that there is not, before anything that is missing, for which it may stand."""
        for argument in args or ():
            if argument == "--" or (self._branches and not argument.startswith("-")):
                break  # what follows is no flag, or for a command below
            flag = argument.partition("=")[0]
            if flag.startswith("--") and " " not in flag and flag not in self._option_string_actions:
                self.error(f"No flag is called '{flag}'.{meant(flag, self._option_string_actions)}")
        return super().parse_known_args(args, namespace)

    def print_help(self, file: Any = None) -> None:
        """Puts help where results go."""
        super().print_help(file or self._out)

    def error(self, message: str) -> NoReturn:
        """Ends with one sentence."""
        text = cut(printable(message), LONGEST).rstrip(".")
        text += "" if text.endswith("?") else "."
        self.exit(2, f"{self.prog}: error: {text[:1].upper()}{text[1:]} See {self.prog} --help.\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        if processes.first():
            super()._print_message(message, file)


def parser_for(program: str, plugins: Plugins, out: TextIO, left_out: Mapping[str, str]) -> Parser:
    """The parser of all commands.

    Args:
        left_out: the passes that cannot be methods.
    """
    parser = Parser(out, prog=program)
    top = parser.add_subparsers(metavar="COMMAND")
    below = {
        "prune": top.add_parser("prune", help="Prune a model with one method."),
        "compress": top.add_parser("compress", help="Run, plan and evaluate recipes; quantize and export."),
    }
    actions, taken = _add_compress(below["compress"]), _taken(out)
    for command, stage in METHODS.items():
        methods = {name: step for name, step in methods_of(plugins, stage).items() if name not in left_out}
        last = command[-1]
        _add_methods(below.get(last) or actions.add_parser(last, help=DESCRIBED[stage]), stage, methods, taken)
    return parser


def methods_of(plugins: Plugins, stage: Stage) -> dict[str, type[Pass]]:
    """The passes that the command of a stage carries out."""
    return {name: step for name, step in sorted(plugins.passes.items()) if step.stage is stage}


def not_to_be_used(plugins: Plugins, out: TextIO) -> dict[str, str]:
    """The passes whose options cannot be given, with a sentence that says why; the others go on working."""
    taken = _taken(out)
    found = {}
    for name, step in plugins.passes.items():
        try:
            check_flags(step, taken if step.stage is Stage.PRUNE else ())
        except PluginError as error:
            found[name] = f"The pass '{name}' of {plugins.providers[name].distribution} is left out. {error}"
    return found


def _taken(out: TextIO) -> set[str]:
    """What every command that carries out one pass has flags or values for."""
    with_all_flags = Parser(out)
    add_output(with_all_flags)
    add_common(with_all_flags)
    with_all_flags.set_defaults(run=None, pass_class=None, flags=None, together=None, out=None)
    return attributes(with_all_flags)


def _add_methods(parser: Any, stage: Stage, methods: Mapping[str, type[Pass]], taken: Collection[str]) -> None:
    """A command below this one for each method.

    Args:
        taken: what the flags are called that all of them have.
    """
    parser.description = DESCRIBED[stage]
    below = parser.add_subparsers(metavar="METHOD", title="methods")
    for name, step in methods.items():
        described = step.__doc__ or ""
        if "%(prog)" in described:  # of which argparse makes the name of the program, and of each %% one
            described = described.replace("%", "%%")
        method = below.add_parser(name, help=step.summary().replace("%", "%%"), description=described)
        options = method.add_argument_group(f"options of {name}")
        flags = flags_of(step, taken)
        for flag, option in flags.items():
            add_flag(replace(option, name=flag), options, once=True)
        add_output(method)
        add_common(method, model_required=True)
        names = {flag: option.name for flag, option in flags.items()}
        method.set_defaults(run=commands.one_pass, pass_class=step, flags=names, together=True)


def _add_compress(parser: Any) -> Any:
    """Those of its commands that take a recipe, or nothing; returns where others can be added."""
    parser.description = "Run, plan and evaluate compression recipes; quantize and export."
    actions = parser.add_subparsers(metavar="ACTION", title="actions")

    run = actions.add_parser("run", help="Carry out a recipe.")
    run.add_argument("recipe", metavar="RECIPE.yaml", help="The recipe.")
    run.add_argument(
        "--allow-interpreters",
        action="store_true",
        help="Run passes in the interpreters that the recipe names as their option 'python'. Look at them first: they are programs.",
    )
    add_output(run)
    add_common(run)
    run.set_defaults(run=commands.run, together=True)

    plan = actions.add_parser("plan", help="Say what a recipe would do; reads no weights, and runs nothing.")
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
    for parser in (passes, families):
        add_debug(parser)
    return actions

"""Everything that a person types or writes: it is meant as it is written, or one sentence says why it cannot be."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from optimum_prune import Depth, Recipe, Settings
from optimum_prune.cli.endings import Ending
from optimum_prune.cli.main import main
from optimum_prune.errors import CheckpointError, OptimumPruneError, RecipeError
from optimum_prune.machine import interrupts

PASSES = "passes: [depth: {layers: 1}]\n"
MODULE = [sys.executable, "-m", "optimum_prune"]


@pytest.fixture
def said(capsys):
    """Runs a command in this process, which must refuse it, and returns the sentence."""

    def said(*arguments):
        code = main([str(argument) for argument in arguments])
        out, error = capsys.readouterr()
        assert code in (1, 2)
        assert out == ""
        assert error.count("\n") == 1, error
        assert error.rstrip("\n").isprintable()
        assert "Traceback" not in error
        return error

    return said


@pytest.fixture
def common(llama, text_file):
    texts = ["--text", text_file, "--samples", 6, "--length", 32, "--eval-samples", 2]
    return ["--model", llama, "--device", "cpu", *texts]


@pytest.fixture
def done(capsys):
    """Runs a command in this process, which must carry it out, and returns what it prints on stdout and stderr."""

    def done(*arguments):
        code = main([str(argument) for argument in arguments])
        out, error = capsys.readouterr()
        assert code == 0, error
        return out, error

    return done


# Recipes


@pytest.fixture
def recipe(tmp_path, plugins):
    """Text -> the recipe that it is."""

    def recipe(text, **allowed):
        file = tmp_path / "recipe.yaml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return Recipe.from_yaml(file, plugins, **allowed)

    return recipe


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (PASSES + "seed: 1\nseed: 2", "line 3, column 1: here is the key seed for the second time"),
        ("passes: [depth: {layers: 1, layers: 2}]", "the key layers for the second time"),
        ("passes: [depth: {layers: 010}]", "here is 010, which some read in base 8"),
        (PASSES + "seed: 1:30", "'1:30', which is not a whole number"),
        (PASSES + "seed: 1_000", "'1_000', which is not a whole number"),
        ("passes: [depth: {layers: 1, heal: no}]", "'no', which is not true or false"),
        (PASSES + "trust_remote_code: yes", "'yes', which is not true or false"),
        (PASSES + "seed: -1", "seed -1. Give a whole number of at least 0 and at most 4294967295"),
        (PASSES + "seed: 4294967296", "seed 4294967296"),
        (PASSES + "memory: 8", "8 bytes, which hold nothing. Did you mean 8GiB"),
        (PASSES + "memory: 4000", "Did you mean 4000MiB"),
        (PASSES + "memory: -8", "is no size"),
        (PASSES + "memory: " + "9" * 300 + "GB", "more than any machine has"),
        (PASSES + "~: 1", "No part of a recipe is called 'None'"),
        (PASSES + "calibration: {text: ''}", "is a folder"),
        (PASSES + 'model: "a\\0b"', "it holds a NUL character"),
        (PASSES + "calibration: {samples: 99999999999}", "at most 2147483647"),
        (b"\x00\xff\x00", "no UTF-8 text"),
        (PASSES.encode("utf-16"), "no UTF-8 text"),
        (PASSES + "#" * 2**18, "longer than"),
        ("passes: &a [*a]", "an alias of what it lies in itself"),
        ("passes: [" * 5000, "lie in one another"),
        ("passes: [[[[[[depth]]]]]]", r"this is neither: \[\[\["),
    ],
    ids=lambda value: repr(value[:40]),
)
def test_a_recipe_that_is_not_what_it_seems_is_refused(text, why, recipe):
    with pytest.raises(OptimumPruneError, match=why.replace("(", r"\(")) as caught:
        recipe(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


def test_a_recipe_means_what_is_written(recipe):
    read = recipe(
        PASSES + "model: 0o10\nmemory: 1000000\nseed: 0x10\nevaluation: {column: 'yes'}".replace("0o10", "'0o10'")
    )
    assert read.settings == Settings(model="0o10", memory="1000000", seed=16)
    assert read.evaluation.column == "yes"
    assert recipe(read.to_yaml()) == read
    assert yaml.safe_load(read.to_yaml()) == read.to_dict()


@pytest.mark.parametrize("mark", [b"\xef\xbb\xbf", b""])
def test_a_recipe_may_be_written_on_windows(mark, recipe):
    assert recipe(mark + b"passes:\r\n  - depth: {layers: 1}\r\n").passes


def pipe(file):
    os.mkfifo(file)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (Path.mkdir, "it is a folder"),
        (pipe, "it is no file but a pipe"),
        (lambda file: file.symlink_to("nothing"), "it is a link that leads nowhere"),
        (lambda file: file.symlink_to(file), "it cannot be reached"),
        (lambda file: None, "it does not exist"),
    ],
)
def test_a_recipe_that_is_no_file_is_said_to_be_what_it_is(make, why, tmp_path, plugins):
    make(tmp_path / "recipe.yaml")
    with pytest.raises(RecipeError, match=rf"recipe\.yaml cannot be read: {why}"):
        Recipe.from_yaml(tmp_path / "recipe.yaml", plugins)


def test_a_recipe_may_come_from_the_shell_and_lie_in_the_home_folder(plugins, tmp_path, monkeypatch):
    reading, writing = os.pipe()
    os.write(writing, PASSES.encode())
    os.close(writing)
    assert Recipe.from_yaml(f"/dev/fd/{reading}", plugins).passes
    os.close(reading)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text(PASSES)
    assert Recipe.from_yaml("~/mine.yaml", plugins).passes


def test_a_recipe_does_not_trust_by_itself(recipe, said, done, common, tmp_path):
    text = PASSES + "trust_remote_code: true"
    with pytest.raises(RecipeError, match="If you trust that checkpoint, add --trust-remote-code"):
        recipe(text)
    assert recipe(text, trust_remote_code=True).settings == Settings(trust_remote_code=True)
    Recipe(passes=(Depth(layers=1),), settings=Settings(trust_remote_code=True))  # Python may
    for command in (["plan"], ["run", "--output", tmp_path / "out"]):
        assert "add --trust-remote-code" in said(
            "compress", command[0], tmp_path / "recipe.yaml", *command[1:], *common
        )
    done("compress", "plan", tmp_path / "recipe.yaml", *common, "--no-trust-remote-code")


# Values


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"dtype": "float8"}, "Did you mean 'float32'"),
        ({"seed": 1.5}, "not a whole number"),
        ({"seed": 2**32}, "at most 4294967295"),
        ({"device": None}, "not a text"),
        ({"offload": "no"}, "not true or false"),
        ({"memory": 1.5}, "which hold nothing"),
        ({"memory": "1.5"}, "which hold nothing"),
        ({"memory": "999999"}, "Did you mean 999999MiB"),
        ({"memory": "1kB"}, None),
        ({"memory": 0}, None),
        ({"memory": 10**6}, None),
        ({"memory": "8B"}, None),
    ],
    ids=str,
)
def test_settings_are_checked_in_python_too(options, why):
    if why is None:
        Settings(**options)
        return
    with pytest.raises(RecipeError, match=why):
        Settings(**options)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--seed", "-1"], "seed -1"),
        (["--seed", "99999999999999999999"], "out of all bounds"),
        (["--samples", "1_0"], "'1_0' is not a whole number"),
        (["--length", "2147483648"], "at most 2147483647"),
        (["--memory", "8"], "Did you mean 8GiB"),
        (["--output", ""], "no name of a folder"),
        (["--output", "a\udcffb"], "its name is no UTF-8"),
        (["--text", "no\nwhere.txt"], r"The text file no\nwhere.txt does not exist"),
        (["--text", "no\x1b[2Jwhere.txt"], r"The text file no\x1b[2Jwhere.txt does not exist"),
        (["--text", "~nobody_of_this_name/a.txt"], "does not exist"),
        (["--dataset", ":::"], "Name one of them"),
        (["--device", "a\nb"], r"The device 'a\nb'"),
        (["--layers", "2", "--layers", "3"], "is given twice, as 2 and as 3"),
        (["--heal", "--no-heal"], "both with and without 'no'"),
        (["--strange\nflag"], r"No flag is called '--strange\nflag'"),
    ],
    ids=lambda value: repr(value) if isinstance(value, list) else "",
)
def test_what_is_typed_is_refused_before_anything_runs(arguments, why, said, common, tmp_path):
    first = [] if "--layers" in arguments else ["--layers", 1]
    assert why in said("prune", "depth", *first, "--output", tmp_path / "out", *common, *arguments)
    assert not (tmp_path / "out").exists()


def test_a_flag_for_several_values_may_be_repeated_and_home_is_home(done, common, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    out, error = done("prune", "depth", "--drop", 0, "--drop", 5, "--output", "~/out", *common)
    assert error == ""
    assert f"Saved to {tmp_path}/out" in out
    cuts = json.loads((tmp_path / "out" / "compression" / "cuts.json").read_text())
    assert cuts == [{"pass": "depth", "layers": "1-4"}]


def test_names_that_a_terminal_would_obey_are_escaped(done, common, text_file, tmp_path):
    text = tmp_path / "a\x1b[31m\nb.txt"
    text.write_bytes(text_file.read_bytes())
    out, error = done("prune", "depth", "--drop", 0, "--output", tmp_path / "o\x1but", *common, "--text", text)
    assert error == ""
    assert all(line.isprintable() for line in out.splitlines())
    assert r"a\x1b[31m\nb.txt" in out
    assert rf"Saved to {tmp_path}/o\x1but" in out


@pytest.mark.parametrize(
    ("variables", "why"),
    [
        ({"RANK": "x"}, "RANK is 'x', and should be a number from 0"),
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE is 'x'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0', and should be a number from 1"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE is '-2'"),
        ({"WORLD_SIZE": "9" * 50}, "WORLD_SIZE is"),
        ({"OMPI_COMM_WORLD_SIZE": "1.5"}, "OMPI_COMM_WORLD_SIZE is '1.5'"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is '2', and should be a number from 0 to 1"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "do not find each other"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "x"}, "do not find each other"),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "99999999"},
            "do not find each other",
        ),
    ],
    ids=str,
)
def test_process_variables_that_are_none_are_named(variables, why, said, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert why in said("compress", "families")


def test_process_variables_that_are_empty_are_none(done, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "")
    monkeypatch.setenv("RANK", "")
    done("compress", "families")


# Plugins


PLUGIN = """
import os, sys
from dataclasses import dataclass
from typing import ClassVar, Literal
from optimum_prune import Cuts, Decision, PrunePass, hookimpl, option
{first}
@dataclass(frozen=True, kw_only=True)
class First(PrunePass):
    \"\"\"Leaves out the first layer: 50% of %(prog)s.\"\"\"

    name: ClassVar[str] = "first"
    {option}

    def foresee(self, shape):
        {foresee}
        return shape.keep(range(1, len(shape.layers)))

    def decide(self, decoder, calibration):
        {decide}
        yield Decision(Cuts(layers=tuple(range(1, len(decoder)))), evidence={{}})

@hookimpl
def passes():
    yield First
"""


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """Installs a plugin with the pass `first`."""

    def install(first="", option="", foresee="", decide=""):
        site = tmp_path / "site"
        about = site / "stranger-0.3.dist-info"
        about.mkdir(parents=True)
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 0.3\n")
        (about / "entry_points.txt").write_text("[optimum_prune]\nstranger = stranger_plugin\n")
        source = PLUGIN.format(first=first, option=option, foresee=foresee, decide=decide)
        (site / "stranger_plugin.py").write_text(source)
        monkeypatch.syspath_prepend(site)
        monkeypatch.delitem(sys.modules, "stranger_plugin", raising=False)

    yield install
    sys.modules.pop("stranger_plugin", None)


@pytest.mark.parametrize(
    ("option", "why"),
    [
        (
            "odd: dict[str, int] | None = option('Odd.', None)",
            "The option 'odd' of First has the type dict[str, int] | None",
        ),
        ("odd: 'Nowhere' = option('Odd.', None)", "The types of the options of First cannot be read"),
        ("seed: int = option('Odd.', 0)", "option 'seed' is called like another flag"),
        ("run: int = option('Odd.', 0)", "option 'run' is called like another flag"),
        ("help: int = option('Odd.', 0)", "option 'help' is called like another flag"),
        (
            "on: bool = option('On.', True); no_on: bool = option('Off.', True)",
            "option 'no_on' is called like another",
        ),
    ],
)
def test_a_pass_that_cannot_have_flags_is_named_and_the_others_go_on_working(
    option, why, stranger, said, done, common, tmp_path
):
    stranger(option=option)
    assert why in said("prune", "first", "--output", tmp_path / "out", *common)
    _, error = done("compress", "passes")
    assert f"The pass 'first' of stranger is left out. {why[:30]}" in error.replace("Its o", "o").replace(
        "left out. o", "left out. o"
    )
    assert error.count("\n") == 1
    helped, error = done("prune", "depth", "--help")
    assert "--layers" in helped
    assert error.count("\n") == 1


def test_help_shows_what_a_plugin_says_of_itself(stranger, done):
    stranger(option="bits: Literal[4, 8] = option('100% of bits.', 4)")
    helped, _ = done("prune", "--help")
    assert "50% of %(prog)s" in helped
    helped, _ = done("prune", "first", "--help")
    assert "{4,8}" in helped
    assert "100% of bits." in helped


@pytest.mark.parametrize(
    ("where", "code", "why"),
    [
        (
            "foresee",
            "raise KeyError('a\\nb')",
            "The pass 'first' failed: KeyError: 'a\\nb'. It was in stranger_plugin.py, line 15. Please report it",
        ),
        ("foresee", "sys.exit(0)", "The pass 'first' asked the program to end, by sys.exit(0)"),
        ("foresee", "input('? ')", "EOFError"),
        ("foresee", "raise MemoryError", "The pass 'first' found no memory left"),
        ("foresee", "open('/no/where')", "No such file or directory: '/no/where'. It was in stranger_plugin.py"),
        (
            "decide",
            "raise KeyError('a\\nb')",
            "The pass 'first' failed: KeyError: 'a\\nb'. It was in stranger_plugin.py",
        ),
        ("decide", "sys.exit(0)", "The pass 'first' asked the program to end, by sys.exit(0)"),
        ("decide", "yield 7", "The pass 'first' yields 7, which is no Decision"),
        ("decide", "yield Decision(evidence={'why': {1, 2}})", "gives as evidence, at 'why', a set"),
        (
            "first",
            "sys.exit(0)",
            "The plugin stranger (stranger) cannot be imported: it ends the program with sys.exit(0)",
        ),
    ],
)
def test_what_a_plugin_does_wrong_names_it(where, code, why, stranger, common, capsys, tmp_path):
    stranger(**{where: code})
    assert main([*map(str, ["prune", "first", "--output", tmp_path / "out", *common])]) == 1
    out, error = capsys.readouterr()
    assert out == ""
    assert why in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_results_stay_json_whatever_a_plugin_prints(stranger, llama, text_file, tmp_path):
    noise = "print('noise', flush=True); os.write(1, b'noise\\n'); os.system('echo noise')"
    stranger(first=noise, foresee=noise)
    (tmp_path / "recipe.yaml").write_text("passes: [first]")
    place = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [*MODULE, "compress", "plan", tmp_path / "recipe.yaml", "--model", llama, "--text", text_file, "--json"]
    ran = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=place, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["steps"]
    assert set(ran.stderr.split()) == {"noise"}


# The end of a program


def test_a_traceback_is_shown_to_whoever_asks(said, common, capsys, tmp_path, monkeypatch):
    wrong = ["prune", "depth", "--drop", "9", "--output", str(tmp_path / "out"), *map(str, common)]
    assert "only 0 to 5" in said(*wrong)
    for arguments, variable in (([*wrong, "--debug"], "0"), (wrong, "1")):
        monkeypatch.setenv("OPTIMUM_PRUNE_DEBUG", variable)
        assert main(arguments) == 1
        lines = capsys.readouterr().err.splitlines()
        assert lines[0] == "Traceback (most recent call last):"
        assert "only 0 to 5" in lines[-1]


@pytest.mark.parametrize(("shell", "lines"), [("> /dev/full", 1), (">&-", 1), ("2>&-", 0), ("<&- >&- 2>&-", 0)])
def test_a_finished_run_is_not_lost_with_its_last_lines(shell, lines, common, tmp_path):
    command = [*MODULE, "prune", "depth", "--drop", 0, "--output", tmp_path / "out", *common]
    ran = subprocess.run(
        ["bash", "-c", f"{' '.join(map(str, command))} {shell}"], capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "out" / "config.json").is_file()
    assert ran.stderr.count("\n") == lines
    assert lines == 0 or f"Saved to {tmp_path}/out. Standard output takes nothing" in ran.stderr


def test_a_result_that_cannot_be_printed_is_a_failure():
    for command in ("compress families", "prune depth --help"):
        ran = subprocess.run(
            ["bash", "-c", f"{' '.join(MODULE)} {command} > /dev/full"], capture_output=True, text=True, timeout=120
        )
        assert (ran.returncode, ran.stderr.count("\n")) == (1, 1)
        assert "Standard output takes nothing: No space left on device." in ran.stderr


def test_what_lies_in_the_current_folder_is_nobodys_library(tmp_path):
    here = tmp_path / "here"
    here.mkdir()
    for name in ("json", "yaml", "torch", "stranger_plugin"):
        (here / f"{name}.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')")
    about = here / "stranger-0.3.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 0.3\n")
    (about / "entry_points.txt").write_text("[optimum_prune]\nstranger = stranger_plugin\n")
    ran = subprocess.run([*MODULE, "compress", "families"], capture_output=True, text=True, cwd=here, timeout=120)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert not (tmp_path / "mark").exists()


def listens(process):
    """Whether a process has begun to listen for SIGTERM, which Python does not by itself."""
    status = Path(f"/proc/{process.pid}/status")
    if not status.exists():  # no Linux
        time.sleep(2)
        return True
    caught = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) & 1 << signal.SIGTERM - 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("after", [0.0, 0.1, 1.0])
def test_an_interrupt_is_said_from_the_first_moment_on(number, after, common, tmp_path):
    command = [*MODULE, "prune", "depth", "--drop", 0, "--output", tmp_path / "out", *common]
    began = time.monotonic()
    with subprocess.Popen([str(part) for part in command], stdout=-1, stderr=-1, text=True) as process:
        while not listens(process):
            assert process.poll() is None
            assert time.monotonic() - began < 30
            time.sleep(0.005)
        time.sleep(after)
        process.send_signal(number)
        out, error = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert error == "python -m optimum_prune: interrupted; nothing was written.\n"


def test_an_import_that_an_interrupt_broke_is_told_as_an_interrupt(capsys):
    error = CheckpointError("The config describes no model that can be made. Mend it.")
    error.__cause__ = ImportError("initialization failed")
    assert Ending("optimum-cli", debug=False).of(error) == 1
    with interrupts.raised():
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert Ending("optimum-cli", debug=False).of(error) == interrupts.CODE
    assert capsys.readouterr().err.splitlines()[1:] == ["optimum-cli: interrupted; nothing was written."]

"""Runs a pass from folder to folder in another interpreter, whose environment has its libraries.

The other environment needs torch, transformers and what the pass requires, but nothing of ours: a copy of this package and of the
plugin's module is put on its path.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file

from optimum_prune import conversion, errors
from optimum_prune.calibration import Calibration
from optimum_prune.errors import OptimumPruneError, PassError, RecipeError
from optimum_prune.options import as_plain, build
from optimum_prune.passes import FolderPass, Job, Pass
from optimum_prune.progress import Progress
from optimum_prune.runtime import Expected

if TYPE_CHECKING:
    from optimum_prune.conversion import Conversion

NEEDED = {"torch": "torch", "transformers": "transformers"}
OLDEST = (3, 10)
LINES = 12
"""How much of what the other interpreter printed last an error repeats, where it is not shown anyway."""
LOOK = """
import importlib.util, json, sys
def there(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
print(json.dumps({"version": sys.version_info[:2], "missing": [name for name in sys.argv[1:] if not there(name)]}))
"""
SERVE = "import sys; sys.path.append(sys.argv[2]); from optimum_prune.elsewhere import serve; serve(sys.argv[1])"


# Which interpreter


def interpreter_of(step: Pass) -> str | None:
    """The interpreter that a pass is to run in; none if it is this one.

    It is the one that the pass names; where this one lacks its libraries, the one that `OPTIMUM_PRUNE_PYTHON_<PASS>` names in the
    environment, or that of a folder `.venv-<pass>` here.
    """
    if not isinstance(step, FolderPass):
        return None
    if step.python is not None:
        return step.python
    if not step.missing():
        return None
    named = os.environ.get(f"OPTIMUM_PRUNE_PYTHON_{re.sub('[^A-Z0-9]', '_', step.name.upper())}")
    beside = Path(f".venv-{step.name}") / "bin" / "python"
    return named or (str(beside.absolute()) if beside.exists() else None)


def check_libraries(step: Pass) -> None:
    """Refuses a pass whose libraries are installed neither here nor where it is to run.

    Raises:
        RecipeError: with the command that installs them, or with what is wrong with the interpreter.
    """
    interpreter = interpreter_of(step)
    if interpreter is not None:
        requires = {**NEEDED, **step.requires}
        missing = _missing_there(interpreter, tuple(requires), step.name)
        pip = f"{interpreter} -m pip install"
    else:
        requires, missing, pip = dict(step.requires), step.missing(), "pip install"
    if not missing:
        return
    wanted = " ".join(f"'{requires[name]}'" for name in missing)
    where = f"in the environment of {interpreter}" if interpreter else "here"
    other = (
        ""
        if interpreter or not isinstance(step, FolderPass)
        else ", or name another interpreter as its option 'python'"
    )
    raise RecipeError(
        f"'{step.name}' needs {', '.join(missing)}, which is not installed {where}. Run: {pip} {wanted}{other}"
    )


@functools.cache
def _missing_there(interpreter: str, modules: tuple[str, ...], name: str) -> tuple[str, ...]:
    found = shutil.which(interpreter)
    if found is None:
        raise RecipeError(
            f"'{name}' is to run with the interpreter {interpreter}, which does not exist or cannot be executed. Name a Python, such as "
            f"path/to/environment/bin/python."
        )
    try:
        looked = subprocess.run([found, "-c", LOOK, *modules], capture_output=True, text=True, check=True, timeout=120)
        answer = json.loads(looked.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise RecipeError(
            f"'{name}' is to run with the interpreter {interpreter}, which does not answer as a Python does. Name a Python."
        ) from error
    if tuple(answer["version"]) < OLDEST:
        raise RecipeError(
            f"'{name}' is to run with the interpreter {interpreter}, which is Python {'.'.join(map(str, answer['version']))}. Name one of at "
            f"least {'.'.join(map(str, OLDEST))}."
        )
    return tuple(answer["missing"])


def versions(step: Pass) -> dict[str, str]:
    """Of Python, torch, transformers and what a pass requires, in the interpreter that asks."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for requirement in {**NEEDED, **step.requires}.values():
        name = re.split(r"[^A-Za-z0-9._-]", requirement)[0]
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # not installed by pip
            continue
    return found


# On this side


def carry_out(
    interpreter: str, step: FolderPass, job: Job, expected: Expected, evaluation: Calibration | None, room: Path
) -> tuple[Conversion, dict[str, str]]:
    """`conversion.carry_out` in another interpreter, and the versions there.

    Args:
        room: an empty folder for what the two interpreters tell each other.

    Raises:
        OptimumPruneError: what `conversion.carry_out` raises there.
        PassError: the interpreter ends in another way.
    """
    _bring_code(type(step), room / "code")
    _write_job(step, job, expected, evaluation, room)
    environment = {**os.environ, "PYTHONPATH": str(room / "code")}
    last = _run([interpreter, "-c", SERVE, str(room), str(room / "fallback")], environment, job.progress.output)
    answer = room / "answer.json"
    if not answer.is_file():
        raise PassError(
            f"The pass '{step.name}' ended with its interpreter {interpreter}, which said last: {' / '.join(last) or 'nothing'}"
        )
    plain = json.loads(answer.read_text(encoding="utf-8"))
    if "error" in plain:
        kind = getattr(errors, plain["error"], PassError)
        raise kind(plain["message"])
    return conversion.from_plain(plain["conversion"]), plain["versions"]


def _bring_code(kind: type[FolderPass], folder: Path) -> None:
    """Copies this package and the module of a pass to a folder for the path of another interpreter, and pluggy to one behind it."""
    import pluggy

    top = kind.__module__.partition(".")[0]
    module = sys.modules[top]
    file = getattr(module, "__file__", None)
    if file is None or top == "__main__":
        raise RecipeError(
            f"The pass '{kind.name}' is defined in {top}, which another interpreter cannot import. Move it into a module of its own."
        )
    _copy_module(Path(__file__).parent, folder)
    if top != "optimum_prune":
        _copy_module(Path(file).parent if hasattr(module, "__path__") else Path(file), folder)
    _copy_module(Path(pluggy.__file__).parent, folder.parent / "fallback")


def _copy_module(source: Path, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, folder)


def _write_job(step: FolderPass, job: Job, expected: Expected, evaluation: Calibration | None, room: Path) -> None:
    tensors = {f"expected.{name}": value for name, value in vars(expected).items()}
    windows = {"calibration": job.calibration} | ({"evaluation": evaluation} if evaluation else {})
    for name, text in windows.items():
        tensors |= {f"{name}.tokens": text.tokens, f"{name}.mask": text.mask}
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, room / "job.safetensors")
    plain = {
        "module": type(step).__module__,
        "class": type(step).__qualname__,
        "options": as_plain(step),
        "texts": {name: {"source": text.source, "bos": text.bos} for name, text in windows.items()},
        "source": str(job.source.absolute()),
        "target": str(job.target.absolute()),
        "device": job.device,
        "seed": job.seed,
        "trust_remote_code": job.trust_remote_code,
        "output": job.progress.output,
    }
    (room / "job.json").write_text(json.dumps(plain), encoding="utf-8")


def _run(command: list[str], environment: Mapping[str, str], shown: bool) -> list[str]:
    """Runs a command, shows what it prints on stderr, and returns its last lines."""
    last: deque[str] = deque(maxlen=LINES)
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if shown:
                    sys.stderr.write(line)
                if line.strip():
                    last.append(line.strip())
        except BaseException:
            process.kill()
            raise
    return list(last)


# On the other side


def serve(room: str) -> None:
    """What the other interpreter does: the job that lies in a folder."""
    folder = Path(room)
    plain = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    try:
        answer = _served(plain, load_file(folder / "job.safetensors"))
    except OptimumPruneError as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    partial = folder / "answer.partial"
    partial.write_text(json.dumps(answer), encoding="utf-8")
    partial.rename(folder / "answer.json")


def _served(plain: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    kind: Any = functools.reduce(getattr, plain["class"].split("."), importlib.import_module(plain["module"]))
    step: Any = build(kind, plain["options"], f"pass '{kind.name}'")
    texts = {
        name: Calibration(tensors[f"{name}.tokens"], tensors[f"{name}.mask"], **about)
        for name, about in plain["texts"].items()
    }
    job = Job(
        source=Path(plain["source"]),
        target=Path(plain["target"]),
        calibration=texts["calibration"],
        device=plain["device"],
        progress=Progress(output=plain["output"]),
        seed=plain["seed"],
        trust_remote_code=plain["trust_remote_code"],
    )
    expected = Expected(*(tensors[f"expected.{name}"] for name in ("tokens", "logits", "generated")))
    done = conversion.carry_out(step, job, expected, texts.get("evaluation"))
    return {"conversion": asdict(done), "versions": versions(step)}

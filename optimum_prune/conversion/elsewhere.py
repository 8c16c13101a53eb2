"""Carries out a pass from folder to folder in another interpreter, whose environment has its libraries.

The other environment needs torch, transformers and what the pass requires, but nothing of ours: a copy of this package and of the
plugin's module is put on its path. The two interpreters tell each other by files: a job and its tensors one way, an answer the other.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file

from optimum_prune import errors
from optimum_prune.conversion import conversion
from optimum_prune.conversion.interpreter import ISOLATED, isolated_environment, program_of
from optimum_prune.errors import OptimumPruneError, PassError, RecipeError, printable, reason
from optimum_prune.evaluation.comparison import ReferenceOutputs
from optimum_prune.machine.progress import Progress
from optimum_prune.machine.whole_files import whole
from optimum_prune.options import as_plain, build
from optimum_prune.passes.folder import FolderPass, Job
from optimum_prune.text.windows import Windows

if TYPE_CHECKING:
    from optimum_prune.conversion.conversion import Conversion

LINES = 12
"""How much of what the other interpreter printed last an error repeats, where it is not shown anyway."""
SERVE = f"{ISOLATED}; sys.path.append(sys.argv[3]); from optimum_prune.conversion.elsewhere import serve; serve(sys.argv[2], sys.argv[4])"
DEBUGS = "OPTIMUM_PRUNE_DEBUG"
"""The environment's variable that asks for the traceback of an error."""
PATIENCE = 5.0
"""Seconds that the other interpreter has to end when it is told to."""
WATCHED = 0.1
"""Seconds after which it is looked whether it has ended."""


# On this side


def convert_remotely(
    interpreter: str, step: FolderPass, job: Job, expected: ReferenceOutputs, evaluation: Windows | None, room: Path
) -> Conversion:
    """What `conversion.convert_and_judge` returns in another interpreter.

    Args:
        interpreter: a Python, as the shell calls it.
        room: an empty folder for what the two interpreters tell each other.

    Raises:
        OptimumPruneError: what `conversion.convert_and_judge` raises there.
        PassError: the interpreter ends in another way.
    """
    _bring_code(type(step), room / "code")
    _write_job(step, job, expected, evaluation, room)
    command = [program_of(interpreter) or interpreter, "-c", SERVE, os.getcwd(), str(room), str(room / "fallback")]  # noqa: PTH109
    last = _run(command, isolated_environment(str(room / "code")), job.progress.output)
    try:
        plain = json.loads((room / "answer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PassError(
            f"The pass '{step.name}' ended with its interpreter {interpreter}, which said last: {' / '.join(last) or 'nothing'}"
        ) from error
    if "error" in plain:
        kind = getattr(errors, plain["error"], PassError)
        raise kind(plain["message"])
    return conversion.from_plain(plain["conversion"])


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
    _copy_module(Path(__file__).parent.parent, folder)
    if top != "optimum_prune":
        _copy_module(Path(file).parent if hasattr(module, "__path__") else Path(file), folder)
    _copy_module(Path(pluggy.__file__).parent, folder.parent / "fallback")


def _copy_module(source: Path, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, folder)


def _write_job(step: FolderPass, job: Job, expected: ReferenceOutputs, evaluation: Windows | None, room: Path) -> None:
    tensors = {f"expected.{name}": value for name, value in vars(expected).items()}
    windows = {"calibration": job.calibration} | ({"evaluation": evaluation} if evaluation else {})
    for name, text in windows.items():
        tensors |= {f"{name}.tokens": text.tokens, f"{name}.mask": text.mask}
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, room / "job.safetensors")
    plain = {
        "module": type(step).__module__,
        "class": type(step).__qualname__,
        "name": step.name,
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
    """Runs a command with one further argument, shows what it prints on stderr, and returns its last lines.

    That argument is the number of a pipe that closes when this process is no more, however it ended. Whatever the command started ends
    with it.

    Raises:
        PassError: it cannot be run.
    """
    last: deque[str] = deque(maxlen=LINES)
    theirs, ours = os.pipe()
    try:
        process = subprocess.Popen(
            [*command, str(theirs)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            pass_fds=(theirs,),
            start_new_session=True,
        )
    except OSError as error:
        os.close(ours)
        raise PassError(f"The interpreter {command[0]} cannot be run: {error.strerror}. Name a Python.") from error
    finally:
        os.close(theirs)
    with process:
        reader = threading.Thread(target=_read, args=(process.stdout, last, shown), daemon=True)
        reader.start()
        try:
            _wait(process)
        finally:
            _end(process)
            reader.join(PATIENCE)
            os.close(ours)
    return list(last)


def _read(lines: IO[str], last: deque[str], shown: bool) -> None:
    for line in lines:
        if shown:
            sys.stderr.write(line)
        if line.strip():
            last.append(printable(line.strip()))


def _wait(process: subprocess.Popen[str]) -> None:
    """Returns when a process has ended; not asleep for long, so that an interrupt is heard wherever it arrives."""
    while True:
        with suppress(subprocess.TimeoutExpired):
            process.wait(WATCHED)
            return


def _end(process: subprocess.Popen[str]) -> None:
    """Ends a process that is told to, or else is made to, and whatever it left behind that it had started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)


# On the other side


def serve(room: str, lifeline: str) -> None:
    """Carries out the job that lies in a folder, and leaves the answer there; the other interpreter runs this.

    Args:
        lifeline: the number of a pipe that closes when the run that asked for this is no more.
    """
    threading.Thread(target=_end_with, args=(int(lifeline),), daemon=True).start()
    folder = Path(room)
    plain = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    try:
        answer = _served(plain, load_file(folder / "job.safetensors"))
    except OptimumPruneError as error:
        _print_for_debugging()
        answer = {"error": type(error).__name__, "message": str(error)}
    except (Exception, SystemExit) as error:
        _print_for_debugging()
        what = f"The pass '{plain['name']}' failed in its interpreter: {type(error).__name__}: {reason(error)}"
        answer = {"error": PassError.__name__, "message": what}
    with whole(folder / "answer.json") as partial:
        partial.write_text(json.dumps(answer), encoding="utf-8")


def _print_for_debugging() -> None:
    if os.environ.get(DEBUGS, "0") not in ("", "0"):
        traceback.print_exc()


def _end_with(lifeline: int) -> None:
    """Ends this process and all that it started when the run that asked for this is no more."""
    os.read(lifeline, 1)
    os.killpg(0, signal.SIGKILL)


def _served(plain: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    kind: Any = functools.reduce(getattr, plain["class"].split("."), importlib.import_module(plain["module"]))
    step: Any = build(kind, plain["options"], f"pass '{kind.name}'")
    texts = {
        name: Windows(tensors[f"{name}.tokens"], tensors[f"{name}.mask"], **about)
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
    expected = ReferenceOutputs(*(tensors[f"expected.{name}"] for name in ("tokens", "logits", "generated")))
    done = conversion.convert_and_judge(step, job, expected, texts.get("evaluation"))
    return {"conversion": asdict(done)}

"""What comes before everything else where a program is ours: `python -m optimum_prune`, which imports this package first.

What that imports takes seconds, in which the program may be told to stop; and the current folder, where Python would look for modules
first, is left out: a `json.py` that lies there is nobody's library.
"""

import os
import sys
from pathlib import Path

from optimum_prune.machine.interrupts import end_at_once
from optimum_prune.machine.streams import open_closed

PROGRAM = "python -m optimum_prune"


def check_folder(program: str) -> None:
    """Ends the program if the current folder is not there any more: torch ends without a word that would say so."""
    try:
        os.getcwd()  # noqa: PTH109 - asks only whether there is one
    except OSError:
        sys.exit(f"{program}: error: The current folder is not there any more. Go to another.")


if sys.argv[:1] == ["-m"] and {"optimum_prune", "-moptimum_prune"} & set(sys.orig_argv):
    open_closed()
    end_at_once(PROGRAM)
    check_folder(PROGRAM)
    # Python puts the current folder in front; it stays if this package itself lies there.
    if not getattr(sys.flags, "safe_path", False) and Path(__file__).parent.parent.parent != Path(sys.path[0]):
        del sys.path[0]

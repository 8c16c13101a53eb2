"""Memory that is given back: a collector of garbage that looks at what is new only."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref

from optimum_prune.machine.memory import give_back, passing_over_what_is_there

FRESH = """
import gc
from optimum_prune.machine.memory import passing_over_what_is_there

with passing_over_what_is_there():
    assert gc.get_freeze_count()
assert not gc.get_freeze_count()
"""


class Knot:
    def __init__(self):
        self.self = self


def test_garbage_that_is_new_is_collected():
    with passing_over_what_is_there():
        knot = weakref.ref(Knot())
        give_back()
        assert knot() is None


def test_what_somebody_else_froze_stays_frozen():
    frozen, later = Knot(), []  # by whom it is counted is no matter: others that are frozen may go meanwhile
    gc.freeze()
    with passing_over_what_is_there():
        later.append(Knot())
    seen = {id(each) for each in gc.get_objects()}
    assert id(later[0]) in seen
    assert id(frozen) not in seen


def test_nothing_is_passed_over_afterwards():
    subprocess.run([sys.executable, "-c", FRESH], check=True)

"""The mark on a function of a plugin by which it is found."""

from __future__ import annotations

import pluggy

PROJECT = "optimum_prune"
"""Name of the pluggy project and of the entry-point group."""
hookimpl = pluggy.HookimplMarker(PROJECT)

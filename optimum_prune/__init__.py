"""Structured pruning of large language models, as an extension of Hugging Face Optimum."""

from optimum_prune.anatomy import Experts, Family, FeedForward, Heads
from optimum_prune.calibration import Calibration, Source, Text
from optimum_prune.checkpoint import load_model
from optimum_prune.compress import compress
from optimum_prune.cuts import Cuts, Decision
from optimum_prune.errors import OptimumPruneError
from optimum_prune.hookspecs import hookimpl
from optimum_prune.methods.depth import Depth
from optimum_prune.methods.osscar import Osscar
from optimum_prune.options import option
from optimum_prune.passes import FolderPass, Job, Outcome, Pass, PrunePass, Stage
from optimum_prune.progress import Progress
from optimum_prune.prospect import Prospect
from optimum_prune.pruner import Pruner
from optimum_prune.recipe import Recipe, Settings
from optimum_prune.registration import register_when_imported
from optimum_prune.report import Report
from optimum_prune.runtime import Runtime, TransformersRuntime, open_in_transformers
from optimum_prune.shape import LayerShape, Shape

__all__ = [
    "Calibration",
    "Cuts",
    "Decision",
    "Depth",
    "Experts",
    "Family",
    "FeedForward",
    "FolderPass",
    "Heads",
    "Job",
    "LayerShape",
    "OptimumPruneError",
    "Osscar",
    "Outcome",
    "Pass",
    "Progress",
    "Prospect",
    "PrunePass",
    "Pruner",
    "Recipe",
    "Report",
    "Runtime",
    "Settings",
    "Shape",
    "Source",
    "Stage",
    "Text",
    "TransformersRuntime",
    "compress",
    "hookimpl",
    "load_model",
    "open_in_transformers",
    "option",
]

register_when_imported()

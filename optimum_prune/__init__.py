"""Structured pruning of large language models, as an extension of Hugging Face Optimum."""

import optimum_prune.cli.early  # noqa: F401  # isort: skip - comes before what takes seconds to import

from optimum_prune.anatomy.axis import Axis, AxisKind, Member
from optimum_prune.anatomy.decoder import Decoder, DecoderLayer
from optimum_prune.anatomy.family import Experts, Family, FeedForward, Heads
from optimum_prune.anatomy.shape import AxisShape, LayerShape, Shape
from optimum_prune.anatomy.workload import Cost, Workload
from optimum_prune.builtin.prune.depth import Depth
from optimum_prune.builtin.prune.osscar import Osscar
from optimum_prune.calibration.calibration import Calibration
from optimum_prune.checkpoint.loading import load_model
from optimum_prune.errors import OptimumPruneError, VetoError
from optimum_prune.evaluation.runtime import Runtime, TransformersRuntime, open_in_transformers
from optimum_prune.hooks.marker import hookimpl
from optimum_prune.machine import processes as distributed
from optimum_prune.machine.progress import Progress
from optimum_prune.options import option
from optimum_prune.passes.base import Pass, Stage
from optimum_prune.passes.checkpoint_spec import CheckpointSpec
from optimum_prune.passes.folder import FolderPass, Job
from optimum_prune.passes.outcome import Outcome
from optimum_prune.passes.prune import PrunePass
from optimum_prune.passes.recover import RecoverPass, Recovery
from optimum_prune.pruner import Pruner
from optimum_prune.recipe import Recipe, Settings
from optimum_prune.report.report import Report
from optimum_prune.run.compress import compress
from optimum_prune.surgery.cuts import Cuts, Decision
from optimum_prune.surgery.registration import register_when_imported
from optimum_prune.text.source import Source
from optimum_prune.text.text import Text
from optimum_prune.text.training import DomainText, Training
from optimum_prune.text.windows import Windows

Prospect = CheckpointSpec
"""What `CheckpointSpec` was called at first."""

__all__ = [
    "Axis",
    "AxisKind",
    "AxisShape",
    "Calibration",
    "CheckpointSpec",
    "Cost",
    "Cuts",
    "Decision",
    "Decoder",
    "DecoderLayer",
    "Depth",
    "DomainText",
    "Experts",
    "Family",
    "FeedForward",
    "FolderPass",
    "Heads",
    "Job",
    "LayerShape",
    "Member",
    "OptimumPruneError",
    "Osscar",
    "Outcome",
    "Pass",
    "Progress",
    "Prospect",
    "PrunePass",
    "Pruner",
    "Recipe",
    "RecoverPass",
    "Recovery",
    "Report",
    "Runtime",
    "Settings",
    "Shape",
    "Source",
    "Stage",
    "Text",
    "Training",
    "TransformersRuntime",
    "VetoError",
    "Windows",
    "Workload",
    "compress",
    "distributed",
    "hookimpl",
    "load_model",
    "open_in_transformers",
    "option",
]

register_when_imported()

"""What every family, pass and exporter must satisfy, as functions that a plugin's tests may call.

`check_family`, `check_pass` and `check_conversion` are whole checks; the others are what they are made of.
"""

from optimum_prune.testing.conversions import check_conversion
from optimum_prune.testing.cutting import (
    at_random,
    cut,
    cuts_to,
    first,
    with_blocks_silenced,
    with_layers_skipped,
    with_masked,
)
from optimum_prune.testing.families import check_family, layers_are_numbered
from optimum_prune.testing.models import (
    decoded_logits,
    generates_as_it_scores,
    inputs_of,
    logits,
    random_windows,
    reloads_exactly,
    stays_tied,
)
from optimum_prune.testing.passes import check_pass, pruned

__all__ = [
    "at_random",
    "check_conversion",
    "check_family",
    "check_pass",
    "cut",
    "cuts_to",
    "decoded_logits",
    "first",
    "generates_as_it_scores",
    "inputs_of",
    "layers_are_numbered",
    "logits",
    "pruned",
    "random_windows",
    "reloads_exactly",
    "stays_tied",
    "with_blocks_silenced",
    "with_layers_skipped",
    "with_masked",
]

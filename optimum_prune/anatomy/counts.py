"""The number of parameters of a model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Counts:
    """How many parameters a model has; tied ones count once."""

    total: int
    non_embedding: int
    """Without the embeddings and the output head."""


def count_parameters(model: nn.Module) -> Counts:
    """The parameters of a model in memory, counted."""
    total = sum(parameter.numel() for parameter in model.parameters())
    tables = [getattr(model, name)() for name in ("get_input_embeddings", "get_output_embeddings")]
    embedding = {id(table.weight): table.weight.numel() for table in tables if table is not None}
    return Counts(total, total - sum(embedding.values()))

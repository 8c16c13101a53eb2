"""Exports through `transformers.exporters`: one graph that reads prompts and single tokens with a cache, and the loop around it.

Such a graph takes tokens, their positions and the cache of the tokens before them, of which there may be none. It puts out the logits
of all of them, and the cache with them in it. Layers without attention have no cache, so the graph has no inputs for them.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import shutil
import warnings
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optimum_prune.checkpoint import load_model
from optimum_prune.errors import PassError
from optimum_prune.modeling_pruned import FILE
from optimum_prune.runtime import Runtime

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from transformers import PreTrainedModel

    from optimum_prune.passes import Job

BEFORE = 7
"""Tokens of the prompt that a graph is traced behind; two more are traced, since one alone would freeze that axis."""


@dataclass(frozen=True)
class Limits:
    """The largest sizes that a graph must take, for runtimes that plan their memory beforehand; None for any size."""

    windows: int | None = None
    tokens: int | None = None
    """At a time."""
    before: int | None = None
    """In the cache."""


@dataclass(frozen=True)
class Trace:
    """What an exporter traces."""

    model: PreTrainedModel
    inputs: dict[str, Any]
    shapes: dict[str, Any]
    """For each input, which axes may have which sizes, as `torch.export` takes it."""


def open_to_export(job: Job, dtype: str = "float32") -> PreTrainedModel:
    """The checkpoint that a job reads, on the CPU, where exporters trace."""
    with job.progress.libraries():
        return load_model(job.source, dtype=dtype, device_map="cpu", trust_remote_code=job.trust_remote_code)


def trace(model: PreTrainedModel, *, masked: bool = True, limits: Limits | None = None) -> Trace:
    """Two tokens of two prompts behind a cache, with every axis open that may have another size.

    Args:
        masked: whether the graph takes an attention mask, so that prompts of a batch may differ in length; else no token is
            padding.
        limits: where the windows are limited to one, that axis is fixed.

    Raises:
        PassError: the model generates without such a cache.
    """
    from transformers import Cache, GenerationConfig
    from transformers.exporters.exporter_dynamo import register_cache_pytrees_for_model
    from transformers.exporters.utils import decompose_for_generation

    limits = limits or Limits()
    windows = 1 if limits.windows == 1 else 2
    tokens = torch.arange(windows * BEFORE).reshape(windows, BEFORE) % min(
        100, model.config.get_text_config().vocab_size
    )
    mask = torch.ones_like(tokens)
    if masked:  # a mask of ones would be left out
        mask[0, 0] = 0
    greedy = GenerationConfig(do_sample=False, use_cache=True, pad_token_id=0)
    prompt = {"input_ids": tokens, "attention_mask": mask}
    component, inputs = decompose_for_generation(model, prompt, greedy, multi_token_decode=True)["decode"]
    cache = inputs.get("past_key_values")
    if not isinstance(cache, Cache):
        raise PassError(
            f"{type(model).__name__} generates without a cache of keys and values, which an exported graph needs. Leave the export "
            f"out, or choose another architecture."
        )
    register_cache_pytrees_for_model(model)
    any_windows = torch.export.Dim.STATIC if windows == 1 else _up_to(limits.windows)
    shapes = {
        name: {0: any_windows, 1: _up_to(None if name == "attention_mask" else limits.tokens)}
        for name, value in inputs.items()
        if isinstance(value, Tensor)
    }
    shapes["past_key_values"] = [
        {0: any_windows, 2: _up_to(limits.before)} if leaf.ndim == 4 else {}
        for leaf in torch.utils._pytree.tree_leaves(cache)
    ]
    return Trace(component, inputs, {name: shapes[name] for name in inputs if name in shapes})


def _up_to(most: int | None) -> Any:
    return torch.export.Dim.AUTO if most is None else torch.export.Dim.AUTO(max=most)


def export(exporter: Any, traced: Trace, config: Any, target: Path) -> None:
    """Exports and saves a graph, without what the libraries print meanwhile.

    Args:
        exporter: of `transformers.exporters`.
        config: its config; the shapes go in here.
    """
    config.dynamic, config.dynamic_shapes = True, traced.shapes
    with quietly():
        exporter.export(traced.model, traced.inputs, config).save_pretrained(target)


def first_inputs(traced: Trace, tokens: Int[Tensor, "w t"]) -> dict[str, Any]:
    """What a graph takes to read tokens that nothing is before, by the names of the model's arguments."""
    windows, length = tokens.shape
    cache = copy.deepcopy(traced.inputs["past_key_values"])
    for layer in cache.layers:
        if layer.is_initialized:
            layer.keys, layer.values = (
                each[:1, :, :0].repeat(windows, 1, 1, 1) for each in (layer.keys, layer.values)
            )
    inputs = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "position_ids": torch.arange(length).repeat(windows, 1),
        "past_key_values": cache,
    }
    return {name: inputs[name] for name in traced.inputs if name in inputs}


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keeps libraries from warning and printing that they are experimental, and what they are at."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def add_companions(job: Job, example: str) -> None:
    """Puts beside a graph the tokenizer, how to generate, what reads its config, and `example.py`."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(job.source, trust_remote_code=job.trust_remote_code).save_pretrained(job.target)
    for name in ("generation_config.json", f"{FILE}.py"):
        if (job.source / name).is_file():
            shutil.copy(job.source / name, job.target)
    (job.target / "example.py").write_text(example, encoding="utf-8")


class CachedRuntime(Runtime):
    """A graph with a cache, in whatever runs it: the loop around it."""

    dtype = "float32"
    limits = Limits()
    """Of what it takes at a time; more is read in several steps."""

    @abstractmethod
    def start(self, windows: int) -> Any:
        """The cache of no tokens."""

    @abstractmethod
    def step(self, tokens: Int[Tensor, "w t"], before: int, cache: Any) -> tuple[Float[Tensor, "w t v"], Any]:
        """Logits of the tokens behind a cache of `before` tokens, and the cache with them in it."""

    def logits(self, tokens: Int[Tensor, "w t"]) -> Float[Tensor, "w t v"]:
        return torch.cat([self._read(part)[0] for part in tokens.split(self.limits.windows or len(tokens))])

    def generate(self, tokens: Int[Tensor, " t"], count: int) -> list[int]:
        logits, cache = self._read(tokens[None])
        found = [int(logits[0, -1].argmax())]
        while len(found) < count:
            logits, cache = self.step(torch.tensor([found[-1:]]), len(tokens) + len(found) - 1, cache)
            found.append(int(logits[0, -1].argmax()))
        return found[:count]

    def _read(self, tokens: Int[Tensor, "w t"]) -> tuple[Float[Tensor, "w t v"], Any]:
        cache, found, before = self.start(len(tokens)), [], 0
        for part in tokens.split(self.limits.tokens or tokens.shape[1], dim=1):
            logits, cache = self.step(part, before, cache)
            found.append(logits)
            before += part.shape[1]
        return torch.cat(found, dim=1), cache

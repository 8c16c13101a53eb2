"""What exporters through `transformers.exporters` share: one graph that reads prompts and single tokens with a cache, and its loop.

Such a graph takes tokens, their positions and the cache of the tokens before them, of which there may be none. It puts out the logits
of all of them, and the cache with them in it. Layers without attention have no cache, so the graph has no inputs for them.
"""

from __future__ import annotations

import copy
import json
import shutil
from abc import abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from optimum_prune.checkpoint.caches import NAMES, name_among
from optimum_prune.checkpoint.loading import load_model
from optimum_prune.errors import PassError
from optimum_prune.evaluation.runtime import Runtime
from optimum_prune.machine.isolation import isolated

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from transformers import Cache, PreTrainedModel

    from optimum_prune.passes.folder import Job

INPUTS = ("input_ids", "attention_mask", "position_ids", *NAMES)
"""The inputs of a graph, in this order; the last is the cache."""
GENERATION = "generation_config.json"
"""The file that says which token ends a text."""
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

    @property
    def cache(self) -> str:
        """The name of the input that is the cache."""
        return name_among(self.inputs)


def open_to_export(job: Job, dtype: str = "float32") -> PreTrainedModel:
    """The checkpoint that a job reads, on the CPU, where exporters trace; weights that are packed are unpacked."""
    with job.progress.libraries():
        model = load_model(job.source, dtype=dtype, device_map="cpu", trust_remote_code=job.trust_remote_code)
    _unpack(model)
    return model


def _unpack(model: PreTrainedModel) -> None:
    """Puts plain tensors in the place of packed weights, with the values that are computed with."""
    if getattr(model.config, "quantization_config", None) is None:
        return
    del model.config.quantization_config
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if type(weight) is not nn.Parameter:
                setattr(module, name, nn.Parameter(weight.dequantize().to(model.dtype), requires_grad=False))


def trace(model: PreTrainedModel, *, masked: bool = True, limits: Limits | None = None) -> Trace:
    """Two tokens of two prompts behind a cache, with every axis open that may have another size.

    Args:
        masked: whether the graph takes an attention mask, so that prompts of a batch may differ in length; else no token is
            padding.
        limits: where the windows are limited to one, that axis is fixed.

    Raises:
        PassError: the model generates without such a cache.
    """
    from transformers.exporters.exporter_dynamo import register_cache_pytrees_for_model

    limits = limits or Limits()
    component, given = _decoding_step(model, masked, 1 if limits.windows == 1 else 2)
    taken = INPUTS if masked else [name for name in INPUTS if name != "attention_mask"]
    inputs = {name: given[name] for name in taken if name in given}
    _unfold(inputs[name_among(inputs)])
    register_cache_pytrees_for_model(model)
    flags = {name: True for name in ("use_cache", "return_dict") if name in given}
    return Trace(component, inputs | flags, _open_axes(inputs, limits))


def _decoding_step(model: PreTrainedModel, masked: bool, windows: int) -> tuple[PreTrainedModel, dict[str, Any]]:
    """What `generate` runs to read two tokens behind a cache, and what it gives that."""
    from transformers import Cache, GenerationConfig
    from transformers.exporters.utils import decompose_for_generation

    vocabulary = model.config.get_text_config().vocab_size
    tokens = torch.arange(windows * BEFORE).reshape(windows, BEFORE) % vocabulary
    mask = torch.ones_like(tokens)
    if masked:  # a mask of ones would be left out
        mask[0, 0] = 0
    greedy = GenerationConfig(do_sample=False, use_cache=True, pad_token_id=0)
    prompt = {"input_ids": tokens, "attention_mask": mask}
    with isolated(silent=True):
        component, given = decompose_for_generation(model, prompt, greedy, multi_token_decode=True)["decode"]
    if not isinstance(given.get(name_among(given)), Cache):
        raise PassError(
            f"{type(model).__name__} generates without a cache of keys and values, which an exported graph needs. Leave the export "
            f"out, or choose another architecture."
        )
    return component, given


def _open_axes(inputs: dict[str, Any], limits: Limits) -> dict[str, Any]:
    """For each input, the axes whose size is not fixed, and the most that each may be."""
    windows = torch.export.Dim.STATIC if limits.windows == 1 else _up_to(limits.windows)
    shapes: dict[str, Any] = {
        name: {0: windows, 1: _up_to(None if name == "attention_mask" else limits.tokens)}
        for name, value in inputs.items()
        if isinstance(value, Tensor)
    }
    name = name_among(inputs)
    leaves = torch.utils._pytree.tree_leaves(inputs[name])
    return shapes | {name: [{0: windows, 2: _up_to(limits.before)} for _ in leaves]}


def _unfold(cache: Cache) -> None:
    """Makes layers that keep a window of tokens keep them all, in place, as exporters trace them; their mask sees to the window."""
    from transformers.cache_utils import DynamicLayer

    for index, layer in enumerate(cache.layers):
        if layer.is_sliding and layer.is_initialized:
            cache.layers[index] = whole = DynamicLayer()
            whole.update(
                *(each.new_zeros(*each.shape[:2], BEFORE, each.shape[3]) for each in (layer.keys, layer.values))
            )


def _up_to(most: int | None) -> Any:
    return torch.export.Dim.AUTO if most is None else torch.export.Dim.AUTO(max=most)


def export(exporter: Any, traced: Trace, config: Any) -> Any:
    """Exports a graph, without what the libraries print meanwhile.

    Args:
        exporter: of `transformers.exporters`.
        config: its config; the shapes go in here.

    Returns:
        The `ExportedModel`, to be saved with `save_pretrained`.
    """
    config.dynamic, config.dynamic_shapes = True, traced.shapes
    with isolated(silent=True):
        return exporter.export(traced.model, traced.inputs, config)


def first_inputs(traced: Trace, tokens: Int[Tensor, "w t"]) -> dict[str, Any]:
    """What a graph takes to read tokens that nothing is before, by the names of the model's arguments."""
    windows, length = tokens.shape
    cache = copy.deepcopy(traced.inputs[traced.cache])
    for layer in cache.layers:
        if layer.is_initialized:
            layer.keys, layer.values = (
                each[:1, :, :0].repeat(windows, 1, 1, 1) for each in (layer.keys, layer.values)
            )
    inputs = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "position_ids": torch.arange(length).repeat(windows, 1),
        traced.cache: cache,
    }
    return {name: inputs[name] for name in traced.inputs if name in inputs}


def arrays(tokens: Int[Tensor, "w t"], before: int, names: Collection[str]) -> dict[str, Any]:
    """What a graph takes beside its cache of `before` tokens, as numpy arrays, if it has inputs of these names."""
    windows, length = tokens.shape
    inputs = {
        "input_ids": tokens,
        "attention_mask": torch.ones(windows, before + length, dtype=torch.long),
        "position_ids": torch.arange(before, before + length).repeat(windows, 1),
    }
    return {name: tensor.numpy() for name, tensor in inputs.items() if name in names}


def add_companions(job: Job, example: str) -> None:
    """Puts beside a graph where generation ends, the code that reads its config, and `example.py`."""
    from optimum_prune.surgery.configuration_pruned import FILES  # transformers takes long to import

    for name in (GENERATION, *(f"{file}.py" for file in FILES)):
        if (job.source / name).is_file():
            shutil.copy(job.source / name, job.target)
    file = job.target / GENERATION
    plain = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if plain.get("eos_token_id") is None:
        plain["eos_token_id"] = job.tokenizer().eos_token_id
        file.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
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
        """Each window from the start, as many at a time as it takes."""
        return torch.cat([self._read(part)[0] for part in torch.split(tokens, self.limits.windows or len(tokens))])

    def generate(self, tokens: Int[Tensor, " t"], count: int) -> list[int]:
        """The prompt as much as it takes at a time, then one token at a time."""
        logits, cache = self._read(tokens[None])
        found = [int(logits[0, -1].argmax())]
        while len(found) < count:
            logits, cache = self.step(torch.tensor([found[-1:]]), len(tokens) + len(found) - 1, cache)
            found.append(int(logits[0, -1].argmax()))
        return found[:count]

    def _read(self, tokens: Int[Tensor, "w t"]) -> tuple[Float[Tensor, "w t v"], Any]:
        cache, found, before = self.start(len(tokens)), [], 0
        for part in torch.split(tokens, self.limits.tokens or tokens.shape[1], dim=1):
            logits, cache = self.step(part, before, cache)
            found.append(logits)
            before += part.shape[1]
        return torch.cat(found, dim=1), cache

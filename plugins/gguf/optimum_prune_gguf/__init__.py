"""Writes GGUF files, for llama.cpp and what is built on it.

The file is written from the model in memory, tensor by tensor. Types beyond f32, f16 and bf16 are then made by llama.cpp's own
quantizer: it keeps embeddings and output finer than the rest, and takes another type where blocks of 256 weights do not divide a
width. After writing, llama.cpp must find the tokens that the checkpoint's own tokenizer finds.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from optimum_prune import CheckpointSpec, FolderPass, Job, Runtime, Stage, hookimpl, load_model, option
from optimum_prune.errors import PassError, VerificationError

if TYPE_CHECKING:
    from jaxtyping import Float, Int

PLAIN = ("f32", "f16", "bf16")
TOLERANCES = {"f32": 0.05, "f16": 0.05, "bf16": 0.05, "q8_0": 0.1, "q6_k": 0.2}
"""By outtype; those with fewer bits share the next. Plain types leave room for a checkpoint that was run in bfloat16."""
COARSE = 0.6
TEXTS = 4
"""Windows of the run's own text that tokenizers are compared on."""
EXAMPLE = '''"""Generates text with the model in this folder: python example.py "Once upon a time"."""

import sys
from pathlib import Path

from llama_cpp import Llama

prompt = sys.argv[1] if len(sys.argv) > 1 else "Once upon a time"
file = next(Path(__file__).resolve().parent.glob("*.gguf"))
llama = Llama(str(file), n_ctx={context}, verbose=False)
print(prompt + llama(prompt, max_tokens=32, temperature=0.0)["choices"][0]["text"])
'''


@dataclass(frozen=True, kw_only=True)
class Gguf(FolderPass):
    """A GGUF file for llama.cpp, plain or quantized."""

    name: ClassVar[str] = "gguf"
    stage: ClassVar[Stage] = Stage.EXPORT
    requires: ClassVar[Mapping[str, str]] = {"gguf": "gguf>=0.17", "llama_cpp": "llama-cpp-python>=0.3.36"}
    takes_heterogeneous: ClassVar[bool] = True

    outtype: Literal["f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_0", "q4_k_m", "q4_k_s", "q4_0"] = option(
        "Type of the weights, as llama.cpp calls it.", "f16"
    )

    @property
    def usual_tolerance(self) -> float:
        """About twice what the type does to a real model."""
        return TOLERANCES.get(self.outtype, COARSE)

    def check(self, spec: CheckpointSpec) -> None:
        """Refuses what llama.cpp cannot compute, or not exactly."""
        from optimum_prune_gguf.form import form_of

        form_of(spec.config, spec.heterogeneous)

    def convert(self, job: Job) -> Mapping[str, Any]:
        """Writes the file, what reads its tokenizer, and an example."""
        from optimum_prune.surgery.configuration_pruned import FILES
        from optimum_prune_gguf.form import context_length, form_of
        from optimum_prune_gguf.model import write
        from optimum_prune_gguf.vocabulary import find_vocabulary

        tokenizer = job.tokenizer()
        model = load_model(job.source, trust_remote_code=job.trust_remote_code)
        config = model.config
        form = form_of(config, hasattr(config, "pruned"))
        texts = [tokenizer.decode(window) for window in job.calibration.tokens[:TEXTS]]
        vocabulary, compared = find_vocabulary(tokenizer, len(model.get_input_embeddings().weight), texts)
        file = job.target / f"model-{self.outtype}.gguf"
        if self.outtype in PLAIN:
            write(model, form, vocabulary, self.outtype, file)
        else:
            between = job.target / "unquantized.gguf"
            exact = {torch.float16: "f16", torch.bfloat16: "bf16"}.get(model.dtype, "f32")
            write(model, form, vocabulary, exact, between)
            del model
            _quantize(between, file, self.outtype)
            between.unlink()
        for name in ("config.json", *(f"{file}.py" for file in FILES)):  # which readers of the tokenizer look for
            if (job.source / name).is_file():
                shutil.copy(job.source / name, job.target)
        context = context_length(config, form)
        (job.target / "example.py").write_text(EXAMPLE.format(context=min(context, 2048)), encoding="utf-8")
        return {
            "architecture": form.architecture,
            "context_length": context,
            "splitter": vocabulary.splitter,
            "texts_with_the_same_tokens": compared,
            "tensors": _types(file),
        }

    def open(self, folder: Path, device: str) -> LlamaCpp:
        """The file in llama.cpp."""
        file = folder / f"model-{self.outtype}.gguf"
        return LlamaCpp(file, device, {"f32": "float32", "f16": "float16"}.get(self.outtype, self.outtype))


def _quantize(source: Path, target: Path, outtype: str) -> None:
    import llama_cpp

    from optimum_prune_gguf.vocabulary import quiet

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{outtype.upper()}")
    parameters.nthread = torch.get_num_threads()
    with quiet():
        failed = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), parameters)
    if failed:
        raise PassError(f"llama.cpp could not quantize to {outtype}. Give gguf another outtype, such as q8_0.")


def _types(file: Path) -> dict[str, int]:
    """How many tensors of each type a file has."""
    from gguf import GGUFReader

    return dict(Counter(tensor.tensor_type.name for tensor in GGUFReader(file).tensors))


@contextmanager
def _plain_buffers() -> Iterator[None]:
    """Keeps llama.cpp from packing weights for AMX, which some virtual machines announce, and which ends the process there."""
    from llama_cpp import llama_cpp

    defaults = llama_cpp.llama_model_default_params

    def plain() -> Any:
        parameters = defaults()
        parameters.use_extra_bufts = False
        return parameters

    llama_cpp.llama_model_default_params = plain
    try:
        yield
    finally:
        llama_cpp.llama_model_default_params = defaults


class LlamaCpp(Runtime):
    """A GGUF file in llama.cpp."""

    def __init__(self, file: Path, device: str, dtype: str) -> None:
        self.dtype = dtype
        self._file, self._layers_on_gpu = file, 0 if device == "cpu" else -1
        self._open(512)

    def _open(self, length: int) -> None:
        from llama_cpp import Llama

        from optimum_prune_gguf.vocabulary import quiet

        threads = torch.get_num_threads()
        with quiet(), _plain_buffers():
            self._llama = Llama(
                str(self._file),
                n_ctx=length,
                n_gpu_layers=self._layers_on_gpu,
                n_threads=threads,
                n_threads_batch=threads,
                logits_all=True,
                verbose=False,
            )

    def _reserve(self, length: int) -> None:
        """Makes room in the context, which llama.cpp fixes when it opens a file."""
        known = int(self._llama.metadata[f"{self._llama.metadata['general.architecture']}.context_length"])
        if length > known:
            raise VerificationError(
                f"llama.cpp computes this model for {known} tokens at most, and {length} were given. Give shorter windows."
            )
        if length > self._llama.n_ctx():
            self._llama.close()
            self._open(length)

    def logits(self, tokens: Int[Tensor, "w t"]) -> Float[Tensor, "w t v"]:
        """Window by window; each begins with an empty cache."""
        length = tokens.shape[1]
        self._reserve(length)
        found = []
        for window in tokens.tolist():
            self._llama.reset()
            self._llama.eval(window)
            found.append(torch.from_numpy(self._llama.scores[:length].copy()))
        return torch.stack(found)

    def generate(self, tokens: Int[Tensor, " t"], count: int) -> list[int]:
        """One token at a time behind what is in the cache."""
        self._reserve(len(tokens) + count)
        self._llama.reset()
        ahead, found = tokens.tolist(), []
        for _ in range(count):
            self._llama.eval(ahead)
            ahead = [int(self._llama.scores[self._llama.n_tokens - 1].argmax())]
            found += ahead
        return found


@hookimpl
def passes() -> Iterator[type[FolderPass]]:
    """What this plugin adds."""
    yield Gguf

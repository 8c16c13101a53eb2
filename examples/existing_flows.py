"""Takes a pruned checkpoint through flows that existed before: Optimum's exports to ONNX and to OpenVINO, as they are released.

optimum-onnx and optimum-intel want older versions of transformers than this package does, so each has an environment of its own;
neither needs optimum-prune:

    pip install optimum-onnx onnxruntime torch
    pip install optimum-intel[openvino] torch

Then, from the environment that the checkpoint was pruned in:

    python examples/existing_flows.py OUT --onnx-python ENV1/bin/python --openvino-python ENV2/bin/python

For each environment it loads the checkpoint there in torch, exports it with `optimum-cli`, runs what comes out in onnxruntime or
openvino alone, and compares the logits with those of the checkpoint here, in float32: in one piece, and in two with the cache. The last
column tells whether the tokenizer gives the same tokens there. Layers that differ in shape are none of what these flows know.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

TEXT = """The ferry left the harbour an hour before sunrise. On deck, two engineers compared their notes about the bridge, which had
been closed since the flood of 1987; neither of them believed that it would ever carry a train again."""
TOKENS = 48
FLOWS = ("onnx", "openvino")
TOLERANCE = 1e-3
"""Of the standard deviation of the difference relative to that of the logits."""
MAIN = "from optimum.commands.optimum_cli import main; main()"


def main() -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="Folder of the pruned checkpoint.")
    parser.add_argument(
        "--onnx-python", metavar="PYTHON", help="Interpreter of an environment with optimum-onnx and onnxruntime."
    )
    parser.add_argument(
        "--openvino-python", metavar="PYTHON", help="Interpreter of one with optimum-intel and openvino."
    )
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="Where to leave what is exported; nowhere if not given."
    )
    arguments = parser.parse_args()
    pythons = {flow: getattr(arguments, f"{flow}_python") for flow in FLOWS}
    if not any(pythons.values()):
        parser.error("name an interpreter with --onnx-python or --openvino-python")
    if not (arguments.checkpoint / "config.json").is_file():
        parser.error(f"{arguments.checkpoint} is no checkpoint: it has no config.json")
    with tempfile.TemporaryDirectory() as scratch:
        room = Path(scratch)
        reference = _reference(arguments.checkpoint, room)
        print(f"{'':36} {'seconds':>8} {'MB':>8} {'difference':>11} {'with cache':>11}  tokens")
        kept = arguments.keep or room
        rows = [
            row
            for flow, python in pythons.items()
            if python
            for row in _rows(flow, python, arguments.checkpoint, kept / flow, room, reference)
        ]
    return 0 if all(rows) else 1


def _reference(checkpoint: Path, room: Path) -> dict[str, np.ndarray]:
    """Writes what this interpreter computes, and the tokens it does so for, to `here.npz`."""
    _in_torch(checkpoint, room / "none.npz", room / "here.npz")
    with np.load(room / "here.npz") as found:
        return dict(found)


def _rows(
    flow: str, python: str, checkpoint: Path, artefact: Path, room: Path, reference: dict[str, np.ndarray]
) -> Iterator[bool]:
    """Prints a row for torch in another environment and one for what is exported there; yields whether each is right."""
    yield _compared("torch", python, checkpoint, room, reference, seconds=None)
    shutil.rmtree(artefact, ignore_errors=True)
    command = [python, "-c", MAIN, "export", flow, "--task", "text-generation-with-past"]
    if flow == "openvino":
        command += ["--weight-format", "fp32"]
    start = time.monotonic()
    error = _run([*command, "--model", str(checkpoint.absolute()), str(artefact.absolute())])
    if error:
        print(f"{flow + ' export':36} {error}")
        yield False
        return
    yield _compared(flow, python, artefact, room, reference, seconds=time.monotonic() - start)


def _compared(
    kind: str, python: str, folder: Path, room: Path, reference: dict[str, np.ndarray], seconds: float | None
) -> bool:
    answer = room / f"{kind}.npz"
    answer.unlink(missing_ok=True)
    error = _run(
        [
            python,
            str(Path(__file__).absolute()),
            "--there",
            kind,
            str(folder.absolute()),
            str(room / "here.npz"),
            str(answer),
        ]
    )
    if error:
        print(f"{kind:36} {error}")
        return False
    with np.load(answer) as found:
        difference, with_cache = (_difference(found[name], reference["logits"]) for name in ("logits", "cached"))
        same = np.array_equal(found["tokens"], reference["tokens"])
        label = str(found["label"])
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file()) / 1e6
    taken = "" if seconds is None else f"{seconds:.0f}"
    print(
        f"{label:36} {taken:>8} {size:8.1f} {difference:11.1e} {with_cache:11.1e}  {'same' if same else 'DIFFERENT'}"
    )
    return difference < TOLERANCE and with_cache < TOLERANCE and same


def _difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float((found - expected).std() / expected.std())


def _run(command: list[str]) -> str:
    """Runs a command; returns the last line of what went wrong, or nothing."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    return (
        "" if done.returncode == 0 else (done.stderr.strip().split("\n")[-1][:200] or f"ended with {done.returncode}")
    )


# In the other environments; nothing but what they have may be imported


def _there(kind: str, folder: str, reference: str, answer: str) -> None:
    KINDS[kind](Path(folder), Path(reference), Path(answer))


def _tokens(folder: Path) -> np.ndarray:
    from transformers import AutoTokenizer

    return np.array([AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"][:TOKENS]])


def _in_torch(folder: Path, reference: Path, answer: Path) -> None:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = _tokens(folder)
    asked = torch.tensor(_given(reference, tokens))
    half = asked.shape[1] // 2
    with torch.no_grad():
        logits = model(input_ids=asked, use_cache=False).logits
        first = model(input_ids=asked[:, :half], use_cache=True)
        second = model(input_ids=asked[:, half:], past_key_values=first.past_key_values, use_cache=True)
    cached = torch.cat([first.logits, second.logits], dim=1)
    label = f"torch, transformers {transformers.__version__}"
    np.savez(answer, tokens=tokens, logits=logits.numpy(), cached=cached.numpy(), label=label)


def _given(reference: Path, tokens: np.ndarray) -> np.ndarray:
    """The tokens of the environment that asks, so that a tokenizer gone wrong is one fault and not two."""
    if not reference.is_file():
        return tokens
    with np.load(reference) as found:
        return found["tokens"]


def _in_pieces(run: Callable[[np.ndarray, int], np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """The logits of two halves; `run(piece, past)` gives those of a piece behind `past` tokens, and keeps the cache."""
    half = tokens.shape[1] // 2
    return np.concatenate([run(tokens[:, :half], 0), run(tokens[:, half:], half)], axis=1)


def _inputs(piece: np.ndarray, past: int) -> dict[str, np.ndarray]:
    rows, length = piece.shape
    return {
        "input_ids": piece.astype(np.int64),
        "attention_mask": np.ones((rows, past + length), np.int64),
        "position_ids": np.tile(np.arange(past, past + length, dtype=np.int64), (rows, 1)),
    }


def _in_onnxruntime(folder: Path, reference: Path, answer: Path) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    wanted = {each.name: each for each in session.get_inputs()}
    caches = [name for name in wanted if name.startswith("past_key_values")]
    outputs = [each.name for each in session.get_outputs()]
    cache: dict[str, np.ndarray] = {}

    def run(piece: np.ndarray, past: int) -> np.ndarray:
        if past == 0:
            for name in caches:
                axes = [piece.shape[0], *wanted[name].shape[1:]]
                cache[name] = np.zeros([size if isinstance(size, int) else 0 for size in axes], np.float32)
        inputs = {name: value for name, value in _inputs(piece, past).items() if name in wanted}
        found = dict(zip(outputs, session.run(None, {**inputs, **cache}), strict=True))
        cache.update({name: found[name.replace("past_key_values", "present")] for name in caches})
        return found["logits"].astype(np.float32)

    tokens = _given(reference, _tokens(folder))
    label = f"onnx, onnxruntime {onnxruntime.__version__}"
    np.savez(answer, tokens=_tokens(folder), logits=run(tokens, 0), cached=_in_pieces(run, tokens), label=label)


def _in_openvino(folder: Path, reference: Path, answer: Path) -> None:
    import openvino

    precise = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    compiled = openvino.Core().compile_model(folder / "openvino_model.xml", "CPU", precise)
    request = compiled.create_infer_request()
    wanted = {name for each in compiled.inputs for name in each.get_names()}

    def run(piece: np.ndarray, past: int) -> np.ndarray:
        if past == 0:
            request.reset_state()
        inputs = {**_inputs(piece, past), "beam_idx": np.arange(piece.shape[0], dtype=np.int32)}
        request.infer({name: value for name, value in inputs.items() if name in wanted})
        return request.get_tensor("logits").data.astype(np.float32)

    tokens = _given(reference, _tokens(folder))
    label = f"openvino {openvino.__version__.split('-')[0]}"
    np.savez(answer, tokens=_tokens(folder), logits=run(tokens, 0), cached=_in_pieces(run, tokens), label=label)


KINDS = {"torch": _in_torch, "onnx": _in_onnxruntime, "openvino": _in_openvino}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--there"]:
        _there(*sys.argv[2:])
    else:
        sys.exit(main())

"""A tokenizer as GGUF files hold it, chosen so that llama.cpp finds the same tokens.

A GGUF file does not hold how text is split before merges apply, but a name that llama.cpp looks up, `tokenizer.ggml.pre`. A wrong
name makes no error, only other tokens and a worse model. So nothing is guessed here: each name is tried on hard text, and the first
with which llama.cpp finds the very tokens that the tokenizer itself finds is taken.
"""

from __future__ import annotations

import json
import os
import tempfile
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum_prune.errors import RecipeError

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase

# fmt: off
SPLITTERS = (
    "smollm", "qwen2", "gpt-2", "llama-bpe", "starcoder", "tekken", "gpt-4o", "deepseek-v3", "deepseek-llm", "deepseek-coder",
    "default", "falcon", "stablelm2", "dbrx", "qwen35", "command-r", "bloom", "poro-chat", "viking", "exaone", "exaone-moe", "glm4",
    "chatglm-bpe", "superbpe", "bailingmoe", "seed-coder", "hunyuan", "kimi-k2", "jais", "chameleon", "trillion",
)
# fmt: on
"""What llama.cpp calls its ways to split text before byte-level merges. The more finely splitting ones come first."""
PROBES = (
    "The quick brown fox didn't jump over 13 lazy dogs in 1984 -- they'd've paid $1,234,567.89!",
    "  Leading spaces,   runs   of them,\ttabs\t\tand\n\nblank lines\n\n\n   with indents   \n ",
    "I'M sure YOU'LL say we've, he'd, CAN'T; l'été 'quoted' \"twice\" (a)[b]{c}...",
    "def f(x):\n    return x[0] + 3 * (y_1 // 2)  # comment\r\n\r\n\tpass\n",
    "Größe, naïve café, Łódź, Ελλάδα, Привет мир, שלום, नमस्ते, สวัสดี, 你好世界。日本語のテキスト、한국어 텍스트",
    "🚀 emoji 👩‍👩‍👧 ½ ² ① ٣٤٥ ?!?! >>> === /* */ http://example.org/a?b=c&d=%20 e\u0301 \u00a0 \u3000 \u200b",
    "camelCaseWord ALLCAPS MixedCASE 3.14e-10 0x1F 1000000 12345 1234 123 12 1 v2.0 a1b22c333",
)
"""Text on which splitters differ."""
SPECIAL_PROBES = 4
UNMERGED = -1e6
"""Score of a piece that no merge makes: llama.cpp makes it last."""


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as a GGUF file holds it."""

    kind: str
    """llama.cpp's word: "gpt2" for byte-level merges, "llama" for SentencePiece's."""
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    scores: tuple[float, ...]
    ids: dict[str, int]
    """Of the special tokens, such as "bos"."""
    adds: dict[str, bool]
    """Whether `bos` and `eos` are put around a text."""
    strips: bool
    """Whether some special tokens take the space behind them."""
    template: str | None
    splitter: str = "default"
    space_in_front: bool = False
    name: str = "model"
    """What the file calls the model: if that is "phi-3", llama.cpp drops the space behind special tokens."""

    def write(self, writer: GGUFWriter) -> None:
        """Adds its fields to a file."""
        writer.add_tokenizer_model(self.kind)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.merges:
            writer.add_token_merges(self.merges)
        if self.scores:
            writer.add_token_scores(self.scores)
        for role, index in self.ids.items():
            getattr(writer, f"add_{role}_token_id")(index)
        writer.add_add_bos_token(self.adds["bos"])
        writer.add_add_eos_token(self.adds["eos"])
        if self.template:
            writer.add_chat_template(self.template)
        for key, value in self.reading().items():
            (writer.add_bool if isinstance(value, bool) else writer.add_string)(key, value)

    def reading(self) -> dict[str, Any]:
        """The fields by which llama.cpp decides how to split text."""
        return {
            "general.name": self.name,
            "tokenizer.ggml.pre": self.splitter,
            "tokenizer.ggml.add_space_prefix": self.space_in_front,
        }

    def variants(self) -> Iterator[Vocabulary]:
        """The ways in which llama.cpp might read it, the likely ones first."""
        for name in ("model", "phi-3"):
            if self.kind == "gpt2":
                yield from (replace(self, splitter=splitter, name=name) for splitter in SPLITTERS)
            else:
                yield from (replace(self, space_in_front=space, name=name) for space in (True, False))
            if not self.strips:
                return


def find_vocabulary(tokenizer: PreTrainedTokenizerBase, size: int, texts: Sequence[str]) -> tuple[Vocabulary, int]:
    """The vocabulary with which llama.cpp finds the tokenizer's own tokens, and on how many texts that was seen.

    Args:
        size: rows of the model's embedding.
        texts: to try it on, beyond those that are hard.

    Raises:
        RecipeError: the tokenizer is of a kind that llama.cpp lacks, or every way to read it finds other tokens.
    """
    plain = _read(tokenizer, size)
    probes = [unicodedata.normalize("NFC", text) for text in (*PROBES, *_with_special(tokenizer), *texts)]
    wanted = [list(tokenizer(text, verbose=False)["input_ids"]) for text in probes]
    closest: tuple[int, str, str] = (-1, "", "")
    with tempfile.TemporaryDirectory() as folder, quiet():
        file = _write_alone(plain, Path(folder) / "vocabulary.gguf")
        for variant in plain.variants():
            found = _tokenize(file, variant, probes)
            wrong = [text for text, ours, theirs in zip(probes, found, wanted, strict=True) if ours != theirs]
            if not wrong:
                return variant, len(probes)
            closest = max(closest, (len(probes) - len(wrong), variant.splitter, wrong[0]), key=lambda entry: entry[0])
    raise RecipeError(
        f"The tokenizer cannot be written as GGUF: llama.cpp has no way to split text that finds the same tokens, and with others the "
        f"model would silently be worse. The closest, '{closest[1]}', is right on {closest[0]} of {len(probes)} texts and wrong on "
        f"{closest[2][:80]!r}. Export to another runtime, such as ONNX."
    )


def _with_special(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Text with special tokens in it: between words, and as a chat has them."""
    texts = [f"one{token}two" for token in tokenizer.all_special_tokens[:SPECIAL_PROBES]]
    if isinstance(tokenizer.chat_template, str):
        chat = [
            {"role": "user", "content": "Who was Ada?"},
            {"role": "assistant", "content": "A mathematician.\nSee [1]."},
        ]
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        texts.append(text.removeprefix(tokenizer.bos_token or ""))  # tokenizing puts another in front
    return texts


def _read(tokenizer: PreTrainedTokenizerBase, size: int) -> Vocabulary:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    plain: dict[str, Any] = {} if backend is None else json.loads(backend.to_str())
    model = plain.get("model", {})
    bytewise = "ByteLevel" in json.dumps(plain.get("pre_tokenizer"))
    if model.get("type") != "BPE" or not (bytewise or model.get("byte_fallback")):
        raise RecipeError(
            f"The tokenizer is of the kind '{model.get('type', type(tokenizer).__name__)}', and the pass 'gguf' can write byte-level BPE and "
            f"SentencePiece's BPE with bytes to fall back on. Export to another runtime, such as ONNX."
        )
    ids = tokenizer.get_vocab()
    if max(ids.values()) >= size:
        raise RecipeError(
            f"The tokenizer has tokens up to number {max(ids.values())}, and the model has embeddings for {size}. Give the model its own "
            f"tokenizer."
        )
    names = {index: token for token, index in ids.items()}
    tokens = tuple(names.get(index, f"[PAD{index}]") for index in range(size))
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    roles = {role: getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "unk", "pad")}
    around = tokenizer("a", verbose=False)["input_ids"]
    return Vocabulary(
        kind="gpt2" if bytewise else "llama",
        tokens=tokens,
        types=_types(tokenizer, tokens, set(names), model.get("unk_token"), bytewise),
        merges=tuple(" ".join(pair) for pair in pairs) if bytewise else (),
        scores=() if bytewise else _scores(tokens, pairs),
        ids={role: index for role, index in roles.items() if index is not None},
        adds={"bos": around[0] == roles["bos"], "eos": around[-1] == roles["eos"]},
        strips=any(token.rstrip for token in tokenizer.added_tokens_decoder.values()),
        template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
    )


def _types(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str], known: set[int], unknown: str | None, bytewise: bool
) -> tuple[int, ...]:
    from gguf import TokenType

    added = tokenizer.added_tokens_decoder

    def kind(index: int, token: str) -> TokenType:
        if index not in known:
            return TokenType.UNUSED
        if not bytewise and token == unknown:
            return TokenType.UNKNOWN
        if index in added:
            return TokenType.CONTROL if added[index].special else TokenType.USER_DEFINED
        if not bytewise and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return TokenType.BYTE
        return TokenType.NORMAL

    return tuple(int(kind(index, token)) for index, token in enumerate(tokens))


def _scores(tokens: Sequence[str], pairs: Sequence[tuple[str, ...]]) -> tuple[float, ...]:
    """The piece that the earliest merge makes scores highest, since llama.cpp merges by score where the tokenizer goes by rank."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(pairs):
        ranks.setdefault("".join(pair), rank)
    return tuple(-float(ranks[token]) if token in ranks else UNMERGED if len(token) > 1 else 0.0 for token in tokens)


# What llama.cpp makes of it


def _write_alone(vocabulary: Vocabulary, file: Path) -> Path:
    from gguf import GGUFWriter

    writer = GGUFWriter(file, "llama")
    vocabulary.write(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return file


def _tokenize(file: Path, vocabulary: Vocabulary, texts: Sequence[str]) -> list[list[int]]:
    """The tokens that llama.cpp finds with a vocabulary's way to split; none where it does not know that way."""
    from llama_cpp import Llama

    try:
        llama = Llama(str(file), vocab_only=True, kv_overrides=vocabulary.reading(), verbose=False)
    except ValueError:
        return [[] for _ in texts]
    found = [llama.tokenize(text.encode(), add_bos=True, special=True) for text in texts]
    llama.close()
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps llama.cpp from writing to the terminal; its binding prints even warnings as errors."""
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):  # noqa: PTH123 - no path of a file
        yield

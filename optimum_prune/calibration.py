"""Text to token windows.

The documents are joined, tokenized once and cut into windows that do not overlap; each window begins with the
beginning-of-sequence token exactly where the tokenizer adds one. Windows for calibration are drawn with a seed. Choosing and
reporting never share text: windows for evaluation come from another text, or from the end of the same one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optimum_prune.errors import RecipeError, TextError, reason, unknown
from optimum_prune.hookspecs import hookimpl
from optimum_prune.options import option

if TYPE_CHECKING:
    from jaxtyping import Bool, Int
    from transformers import PreTrainedTokenizerBase

    from optimum_prune.offload import Shelf

logger = logging.getLogger(__name__)

WIKITEXT = "Salesforce/wikitext:wikitext-2-raw-v1"
SAMPLES = 128
LENGTH = 2048
CHARACTERS = 32 * 1024**2
"""No more of a text is read than this, or than the windows may need at `CHARACTERS_PER_TOKEN`."""
CHARACTERS_PER_TOKEN = 16
PIECE = 2**20
"""Characters that are tokenized at a time."""
OVERLAP = 2**12
"""Characters that a piece shares with the next, to find where both are cut into the same tokens."""
ALIKE = 32
"""As many tokens have to be alike there, and as many places are looked at."""
STREAMED_FROM = 1024**3
"""A dataset whose download is this large, in bytes, is streamed."""


@dataclass(frozen=True)
class Source:
    """A way to get text, added by a plugin's `calibration_sources` hook.

    With `suffixes`, `--text` files that end so are read by it; without, `--dataset NAME:CONFIG:SPLIT` is, where NAME is its name.
    """

    name: str
    read: Callable[[Text], Iterable[str]]
    """The documents of a text, in order."""
    suffixes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Text:
    """Which text, and how much of it."""

    text: str | None = option("A text file: .txt, .jsonl (field 'text') or .parquet (column 'text').", None)
    dataset: str | None = option(
        "A dataset of the Hugging Face Hub, as NAME[:CONFIG[:SPLIT]]; the split is 'train' if not given.", None
    )
    column: str = option("The field or column that holds the text.", "text")
    samples: int | None = option(f"How many windows; {SAMPLES} if not given, or as many as there are.", None)
    length: int | None = option(f"Tokens of a window; {LENGTH} if not given, or as many as the model can take.", None)

    def __post_init__(self) -> None:
        if self.text is not None and self.dataset is not None:
            raise RecipeError(f"Both a text ({self.text}) and a dataset ({self.dataset}) are named. Name one of them.")
        if self.length is not None and self.length < 2:
            raise RecipeError(f"Windows of {self.length} tokens are asked for. A window needs at least 2.")
        if self.samples is not None and self.samples < 0:
            raise RecipeError(
                f"{self.samples} windows are asked for. Give a number of at least 1, or 0 to evaluate nothing."
            )
        if self.text is not None and not Path(self.text).is_file():
            what = "is a folder" if Path(self.text).is_dir() else "does not exist"
            raise TextError(f"The text file {self.text} {what}. Name a .txt, .jsonl or .parquet file.")

    @property
    def named(self) -> bool:
        """Whether it says which text."""
        return self.text is not None or self.dataset is not None

    @property
    def dataset_parts(self) -> tuple[str, str | None, str]:
        """Name, config and split of the dataset."""
        name, *rest = (self.dataset or "").split(":")
        return name, rest[0] or None if rest else None, ":".join(rest[1:]) or "train"

    def describe(self) -> str:
        """Where the text is from, in one phrase."""
        if self.text is not None:
            return Path(self.text).name
        name, config, split = self.dataset_parts
        return ":".join(part for part in (name, config, split) if part)

    def same_text_as(self, other: Text) -> bool:
        """Whether both name the same file, or the same split of the same dataset."""
        if self.text is not None and other.text is not None:
            return Path(self.text).resolve() == Path(other.text).resolve()
        return self.text is None and other.text is None and self.dataset_parts == other.dataset_parts


@dataclass(frozen=True)
class Calibration:
    """Token windows of one length."""

    tokens: Int[Tensor, "windows length"]
    mask: Bool[Tensor, "windows length"]
    """False where a token is padding, which no statistic and no loss counts."""
    source: str
    """Where the text is from."""
    bos: bool = False
    """Whether each window begins with the beginning-of-sequence token."""
    shelf: Shelf | None = None
    """Where a model's activations on these windows are kept; in memory if not given."""

    def keep(self, activations: Tensor) -> Tensor:
        """Activations for later, in memory or on the shelf."""
        return activations if self.shelf is None else self.shelf.keep(activations)

    def put_back(self, *activations: Tensor) -> None:
        """Gives back the memory of activations on the shelf, until they are used again."""
        if self.shelf is not None:
            self.shelf.put_back(*activations)

    @classmethod
    def from_tokens(
        cls, tokens: Int[Tensor, "windows length"], source: str = "given tokens", bos: bool = False
    ) -> Calibration:
        """Windows without padding."""
        return cls(tokens, torch.ones_like(tokens, dtype=torch.bool), source, bos)

    def batches(self, size: int) -> list[tuple[Int[Tensor, "w length"], Bool[Tensor, "w length"]]]:
        """Tokens and masks of as many windows at a time as have about `size` tokens; at least one."""
        windows = max(1, size // self.tokens.shape[1])
        starts = range(0, len(self.tokens), windows)
        return [(self.tokens[start : start + windows], self.mask[start : start + windows]) for start in starts]


def texts_to_use(calibration: Text, evaluation: Text) -> tuple[Text, Text]:
    """The texts with the field's default filled in: WikiText-2 raw, train to calibrate on, test to report on.

    An evaluation text that still names nothing afterwards means the end of the calibration text.

    Raises:
        RecipeError: both name the same text.
    """
    if not calibration.named:
        calibration = replace(calibration, dataset=f"{WIKITEXT}:train")
        if not evaluation.named:
            evaluation = replace(evaluation, dataset=f"{WIKITEXT}:test")
    if evaluation.named and evaluation.samples != 0 and calibration.same_text_as(evaluation):
        raise RecipeError(
            f"Calibration and evaluation both name {calibration.describe()}. What a model is chosen by must not be what it is "
            f"reported on: name another text, or none for windows from the end of the same one."
        )
    if calibration.samples == 0:
        raise RecipeError("0 calibration windows are asked for. Ask for at least 1.")
    return calibration, evaluation


def draw(
    calibration: Text,
    evaluation: Text,
    tokenizer: PreTrainedTokenizerBase,
    sources: Mapping[str, Source],
    *,
    seed: int,
    limit: int,
) -> tuple[Calibration, Calibration | None]:
    """The windows to calibrate on and the windows to report on; None for the latter if none are asked for.

    Args:
        limit: tokens that the model can take at once.

    Raises:
        TextError: a text that cannot be read, is empty, or is too short for one window.
        RecipeError: windows longer than the model can take.
    """
    calibration, evaluation = texts_to_use(calibration, evaluation)
    calibration = _with_length(calibration, min(LENGTH, limit), limit)
    evaluation = _with_length(evaluation, calibration.length or LENGTH, limit)
    joined = _read(calibration, sources, extra=0 if evaluation.named else _tokens_wanted(evaluation))
    tokens = _tokenize(joined, tokenizer)
    if evaluation.samples == 0:
        return _draw_at_random(tokens, calibration, tokenizer, seed), None
    if not evaluation.named:
        tokens, reported = _keep_end_back(tokens, calibration, evaluation, tokenizer)
        return _draw_at_random(tokens, calibration, tokenizer, seed), reported
    other = _read(evaluation, sources)
    if other == joined:
        raise TextError(
            f"{calibration.describe()} and {evaluation.describe()} hold the same text. What a model is chosen by must not be what "
            f"it is reported on: name another text, or none for windows from the end of the same one."
        )
    return _draw_at_random(tokens, calibration, tokenizer, seed), _first_windows(
        _tokenize(other, tokenizer), evaluation, tokenizer
    )


def evaluation_windows(
    evaluation: Text, tokenizer: PreTrainedTokenizerBase, sources: Mapping[str, Source], limit: int
) -> Calibration:
    """The first windows of a text, to report on; WikiText-2's test split if none is named."""
    if not evaluation.named:
        evaluation = replace(evaluation, dataset=f"{WIKITEXT}:test")
    evaluation = _with_length(evaluation, min(LENGTH, limit), limit)
    return _first_windows(_tokenize(_read(evaluation, sources), tokenizer), evaluation, tokenizer)


def _with_length(text: Text, default: int, limit: int) -> Text:
    length = text.length or default
    if length > limit:
        raise RecipeError(
            f"Windows of {length} tokens are asked for, and the model takes at most {limit}. Ask for shorter ones."
        )
    return replace(text, length=length)


def _tokens_wanted(text: Text) -> int:
    samples = SAMPLES if text.samples is None else text.samples
    return samples * (text.length or LENGTH)


# Reading


def _read(text: Text, sources: Mapping[str, Source], extra: int = 0) -> str:
    """The documents of a text, joined; `extra` tokens more than its own windows need."""
    limit = max(CHARACTERS, CHARACTERS_PER_TOKEN * (_tokens_wanted(text) + extra))
    documents, size = [], 0
    for document in _source(text, sources).read(text):
        documents.append(document)
        size += len(document)
        if size > limit:
            break
    joined = "\n\n".join(documents)[:limit]
    if not joined.strip():
        raise TextError(
            f"The text {text.describe()} is empty. Name one with enough text for a window of {text.length} tokens."
        )
    return joined


def _source(text: Text, sources: Mapping[str, Source]) -> Source:
    if text.text is None:
        named = sources.get(text.dataset_parts[0])
        return named if named is not None and not named.suffixes else sources["hub"]
    suffixes = {suffix: source for source in sources.values() for suffix in source.suffixes}
    suffix = Path(text.text).suffix.lower()
    if suffix not in suffixes:
        raise TextError(unknown("kind of text file", suffix, suffixes) + f" Convert {text.text} to one of these.")
    return suffixes[suffix]


def _read_txt(text: Text) -> Iterator[str]:
    path = Path(text.text or "")
    try:
        yield path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TextError(
            f"The text file {path} is not UTF-8 at byte {error.start}. Convert it, or name another."
        ) from error


def _read_jsonl(text: Text) -> Iterator[str]:
    path = Path(text.text or "")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                document = json.loads(line)[text.column]
            except (ValueError, KeyError, TypeError, IndexError) as error:
                document = error
            if not isinstance(document, str):
                raise TextError(
                    f"Line {number} of {path} is not a JSON object with a text in '{text.column}'. Mend it, or name another 'column'."
                )
            yield document


def _read_parquet(text: Text) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    path = Path(text.text or "")
    try:
        table = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise TextError(f"{path} is not a Parquet file that can be read ({reason(error)}). Name another.") from error
    _check_column(text.column, table.schema_arrow.names, text)
    for batch in table.iter_batches(columns=[text.column]):
        yield from (document for document in batch.column(0).to_pylist() if document)


def _read_hub(text: Text) -> Iterator[str]:
    import datasets

    name, config, split = text.dataset_parts
    try:
        builder = datasets.load_dataset_builder(name, config)
        size = builder.info.download_size
        streaming = size is None or size >= STREAMED_FROM
        rows = datasets.load_dataset(name, config, split=split, streaming=streaming)
    except Exception as error:  # whatever the Hub, the network or a dataset's own code may raise
        raise TextError(
            f"The dataset {text.describe()} cannot be loaded: {reason(error)} Check its name, config and split and the "
            f"network, or name a text file."
        ) from error
    names = rows.column_names
    if names is not None:
        _check_column(text.column, names, text)
    for row in rows:
        yield row[text.column]


def _check_column(column: str, columns: Iterable[str], text: Text) -> None:
    if column not in columns:
        raise TextError(
            unknown("column", column, columns, f"Columns of {text.describe()}")
            + " Name one as 'column' in the recipe."
        )


@hookimpl
def calibration_sources() -> Iterator[Source]:
    yield Source("txt", _read_txt, (".txt", ".text", ".md"))
    yield Source("jsonl", _read_jsonl, (".jsonl", ".ndjson"))
    yield Source("parquet", _read_parquet, (".parquet",))
    yield Source("hub", _read_hub)


# Cutting


def _tokenize(text: str, tokenizer: PreTrainedTokenizerBase) -> Int[Tensor, " tokens"]:
    """The tokens of a text, of a long one piece by piece: a tokenizer takes more than 100 bytes of memory for each character."""
    if len(text) <= PIECE or not tokenizer.is_fast:
        return _encoded(text, tokenizer)[0]
    (tokens, begins), pieces = _encoded(text[:PIECE], tokenizer), []
    for start in range(PIECE - OVERLAP, len(text) - OVERLAP, PIECE - OVERLAP):
        more, later = _encoded(text[start : start + PIECE], tokenizer)
        later += start
        meeting = _meeting(tokens, begins, more, later)
        if meeting is None:
            return _encoded(text, tokenizer)[0]
        pieces.append(tokens[: meeting[0]])
        tokens, begins = more[meeting[1] :], later[meeting[1] :]
    return torch.cat([*pieces, tokens])


def _encoded(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[Int[Tensor, " tokens"], Int[Tensor, " tokens"]]:
    """The tokens of a text, and at which of its characters each begins, if the tokenizer can tell."""
    encoded = tokenizer(
        text,
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=tokenizer.is_fast,
        verbose=False,
    )
    begins = [begin for begin, _ in encoded.get("offset_mapping", ())]
    return torch.tensor(encoded["input_ids"], dtype=torch.long), torch.tensor(begins, dtype=torch.long)


def _meeting(
    tokens: Int[Tensor, " a"], begins: Int[Tensor, " a"], more: Int[Tensor, " b"], later: Int[Tensor, " b"]
) -> tuple[int, int] | None:
    """Where, in each of two pieces of a text that overlap, the same `ALIKE` tokens begin at the same characters, if anywhere."""
    middle = int(later[0]) + OVERLAP // 2
    first = int(torch.searchsorted(begins, middle))
    for left in range(first, min(first + ALIKE, len(begins) - ALIKE + 1)):
        right = int(torch.searchsorted(later, begins[left]))
        same, other = slice(left, left + ALIKE), slice(right, right + ALIKE)
        if torch.equal(tokens[same], more[other]) and torch.equal(begins[same], later[other]):
            return left, right
    return None


def _bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that the tokenizer puts in front of a text, if it does."""
    first = tokenizer("a")["input_ids"][:1]
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id] else None


def _cut(
    tokens: Int[Tensor, " tokens"], text: Text, tokenizer: PreTrainedTokenizerBase
) -> Int[Tensor, "windows length"]:
    """All the windows of a text, in order."""
    bos, length = _bos(tokenizer), text.length or LENGTH
    body = length - (bos is not None)
    windows = tokens[: len(tokens) // body * body].view(-1, body)
    if not len(windows):
        raise TextError(
            f"The text {text.describe()} has {len(tokens)} tokens, too few for one window of {length}. Name a longer text, or ask for "
            f"shorter windows."
        )
    if bos is None:
        return windows
    return torch.cat([torch.full((len(windows), 1), bos), windows], dim=1)


def _samples(text: Text, windows: Tensor) -> int:
    """How many windows to take: as many as are asked for, or as there are; the latter is said if a number was asked for."""
    if text.samples is not None and text.samples > len(windows):
        logger.warning(
            "%d windows of %s are asked for, and its text has %d: all of them are used.",
            text.samples,
            text.describe(),
            len(windows),
        )
    return min(len(windows), SAMPLES if text.samples is None else text.samples)


def _draw_at_random(tokens: Tensor, text: Text, tokenizer: PreTrainedTokenizerBase, seed: int) -> Calibration:
    windows = _cut(tokens, text, tokenizer)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    chosen = windows[order[: _samples(text, windows)]]
    return Calibration.from_tokens(chosen, text.describe(), _bos(tokenizer) is not None)


def _first_windows(tokens: Tensor, text: Text, tokenizer: PreTrainedTokenizerBase) -> Calibration:
    windows = _cut(tokens, text, tokenizer)
    windows = windows[: _samples(text, windows)]
    return Calibration.from_tokens(windows, text.describe(), _bos(tokenizer) is not None)


def _keep_end_back(
    tokens: Tensor, calibration: Text, evaluation: Text, tokenizer: PreTrainedTokenizerBase
) -> tuple[Tensor, Calibration]:
    """The tokens to calibrate on, and evaluation windows from behind them: at most half of the text unless more are asked for."""
    body = (evaluation.length or LENGTH) - (_bos(tokenizer) is not None)
    smallest = (calibration.length or LENGTH) - (_bos(tokenizer) is not None)
    wanted = evaluation.samples
    if wanted is None:
        wanted = max(1, min(SAMPLES, len(tokens) // 2 // body))
    if len(tokens) < wanted * body + smallest:
        raise TextError(
            f"The text {calibration.describe()} has {len(tokens)} tokens, too few to calibrate on one window of {calibration.length} and "
            f"to evaluate on {wanted} of {evaluation.length} behind it. Name a longer text or an evaluation text, or ask for fewer or "
            f"shorter windows."
        )
    start = len(tokens) - wanted * body
    end = replace(evaluation, text=calibration.text, dataset=calibration.dataset, samples=wanted)
    reported = _first_windows(tokens[start:], end, tokenizer)
    return tokens[:start], replace(reported, source=f"the end of {calibration.describe()}")

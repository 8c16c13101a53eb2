from __future__ import annotations

import pyarrow
import pyarrow.parquet
import pytest
import tiny
import torch
from texts import DOCUMENTS, LENGTH, LIMIT, windows_of, write

from optimum_prune import Source, Text
from optimum_prune.builtin.sources.files import PIECE
from optimum_prune.errors import RecipeError, TextError
from optimum_prune.text.drawing import Reader, draw


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_every_kind_of_file_gives_the_same_windows(suffix, tmp_path, tokenizer, sources):
    windows, reported = windows_of(write(tmp_path, suffix), tokenizer, sources, samples=1000)
    expected, _ = windows_of(write(tmp_path, ".md"), tokenizer, sources, samples=1000)
    assert torch.equal(windows.tokens, expected.tokens)
    assert len(windows.tokens) > 20
    assert windows.source == f"corpus{suffix}"
    assert reported is None


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_another_column_can_hold_the_text(suffix, tmp_path, plain, sources):
    named, _ = windows_of(write(tmp_path, suffix, column="body"), plain, sources, column="body")
    usual, _ = windows_of(write(tmp_path, suffix), plain, sources)
    assert torch.equal(named.tokens, usual.tokens)


@pytest.mark.parametrize(
    ("content", "suffix", "why"),
    [
        ("", ".txt", "is empty"),
        (" \n\n ", ".txt", "is empty"),
        ("", ".jsonl", "is empty"),
        ("Gou fanfan.", ".txt", r"has \d+ tokens, too few for one window of 16"),
        ("[1, 2]", ".jsonl", "Line 1 .* is not a JSON object with a text in 'text'"),
        ('{"text": "a"}\n\n{"body": "b"}', ".jsonl", "Line 3 "),
        ('{"text": 7}', ".jsonl", "Line 1 "),
        ("{", ".jsonl", "Line 1 "),
        ('{"text": ["a"]}', ".jsonl", r"Line 1 .* has a list in 'text', \['a'\], where a text should be"),
        ('{"text": true}', ".jsonl", "Line 1 .* has true or false in 'text'"),
        ('{"text": "a"}\n{"text": 7.5}', ".jsonl", "Line 2 .* has a number in 'text', 7.5"),
        ('{"text": null}\n{"text": null}', ".jsonl", "is empty"),
        ('{"text": "a\\ud83d b"}', ".jsonl", "Line 1 .* has half of a character in 'text'"),
        ('{"text": ' + "[" * 100_000, ".jsonl", "Line 1 "),
        ('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}", ".jsonl", "Line 1 "),
        ('{"text": ' + "9" * 5000 + "}", ".jsonl", "Line 1 "),
        ('[\n{"text": "a"}\n]', ".jsonl", "Line 1 "),
        ("\ufeff", ".txt", "is empty"),
        ("not parquet", ".parquet", "is not a Parquet file"),
        ("a,b", ".csv", r"No kind of text file is called '\.csv'"),
    ],
    ids=lambda value: repr(value[:30]),
)
def test_texts_that_cannot_be_used_are_refused(content, suffix, why, tmp_path, plain, sources):
    file = tmp_path / f"broken{suffix}"
    file.write_text(content)
    with pytest.raises(TextError, match=why) as caught:
        windows_of(file, plain, sources)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b"tr\xe8s bien " * 100, 2),
        (b"a" * (PIECE - 1) + "ü".encode() + b"bc\xff", PIECE + 3),
        (b"a" * PIECE + b"\xc3", PIECE),
        ("abc".encode("utf-16"), 0),
    ],
    ids=["latin", "in a later piece", "cut short", "utf-16"],
)
def test_a_text_that_is_not_utf8_is_refused_with_the_place(content, place, tmp_path, plain, sources):
    file = tmp_path / "text.txt"
    file.write_bytes(content)
    with pytest.raises(TextError, match=f"not UTF-8 at byte {place}\\."):
        windows_of(file, plain, sources)


@pytest.mark.parametrize("size", [0, 1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 7])
def test_a_text_is_read_as_python_reads_it_however_long_its_lines_are(size, tmp_path, plain, sources):
    file = tmp_path / "text.txt"
    file.write_bytes(("\r\nü\r x\n" + "ab" * size)[: size + 12].encode())
    read = Reader(plain, sources, LIMIT).read(Text(text=str(file)), 2**30)
    assert read == file.read_text(encoding="utf-8")


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path, plain, sources):
    for suffix in (".txt", ".jsonl"):
        bare, marked = write(tmp_path, suffix, name="bare"), tmp_path / f"marked{suffix}"
        marked.write_bytes(b"\xef\xbb\xbf" + bare.read_bytes())
        reader = Reader(plain, sources, LIMIT)
        assert reader.read(Text(text=str(marked)), 2**20) == reader.read(Text(text=str(bare)), 2**20)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rows_that_are_null_are_skipped(suffix, tmp_path, plain, sources):
    with_nulls = write(tmp_path, suffix, [None, DOCUMENTS[0], None, *DOCUMENTS[1:], None], name="nulls")
    windows, _ = windows_of(with_nulls, plain, sources)
    expected, _ = windows_of(write(tmp_path, suffix), plain, sources)
    assert torch.equal(windows.tokens, expected.tokens)


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        ([1, 2], "int64"),
        ([b"a", b"b"], "binary"),
        ([["a"], ["b"]], "list<"),
        ([{"a": "b"}], "struct<"),
        ([True], "bool"),
    ],
    ids=str,
)
def test_a_column_of_parquet_that_holds_no_text_is_named(column, kind, tmp_path, plain, sources):
    file = tmp_path / "other.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), file)
    with pytest.raises(TextError, match=rf"The column 'text' of .*other\.parquet holds {kind}.* 'column'"):
        windows_of(file, plain, sources)


@pytest.mark.parametrize("kind", ["large_string", "string_view", "dictionary"])
def test_texts_of_every_kind_of_parquet_are_read(kind, tmp_path, plain, sources):
    if kind == "string_view" and not hasattr(pyarrow, kind):
        pytest.skip("there are string views since pyarrow 16")
    column = pyarrow.array(DOCUMENTS)
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(getattr(pyarrow, kind)())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "other.parquet")
    windows, _ = windows_of(tmp_path / "other.parquet", plain, sources)
    assert torch.equal(windows.tokens, windows_of(write(tmp_path, ".parquet"), plain, sources)[0].tokens)


def test_a_parquet_file_that_is_damaged_inside_is_refused(tmp_path, plain, sources):
    file = write(tmp_path, ".parquet", [tiny.text(300, seed) for seed in range(40)])
    content = bytearray(file.read_bytes())
    content[1000:5000] = bytes(4000)
    file.write_bytes(content)
    with pytest.raises(TextError, match="is not a Parquet file that can be read"):
        windows_of(file, plain, sources)


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        (["a", 7], "Row 2 of any:train has a number in 'text', 7"),
        ([None, b"a"], "Row 2 of any:train has bytes"),
        (["\ud800"], "Row 1 of any:train has half of a character"),
        ([object()], "Row 1 of any:train has a value of type object"),
        (iter([]), "is empty"),
        (7, "cannot be read by 'any': TypeError"),
        ((1 / 0 for _ in range(2)), r"cannot be read by 'any': ZeroDivisionError: division by zero\. Mend it"),
    ],
    ids=["number", "bytes", "surrogate", "object", "nothing", "no texts", "fault"],
)
def test_a_source_that_does_not_give_texts_is_named(rows, why, plain):
    source = Source("any", lambda _: rows)
    with pytest.raises(TextError, match=why):
        Reader(plain, {"any": source}, LIMIT).read(Text(dataset="any"), 100)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_a_column_that_is_not_there_is_named(suffix, tmp_path, plain, sources):
    with pytest.raises(TextError, match=r"'txt'"):
        windows_of(write(tmp_path, suffix), plain, sources, column="txt")


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "dataset"
    folder.mkdir()
    write(folder, ".jsonl", DOCUMENTS[:3], name="train")
    write(folder, ".jsonl", [DOCUMENTS[3]], name="test")
    return folder


@pytest.mark.parametrize("named", ["{}", "{}:default", "{}:default:train", "{}::train"])
def test_a_dataset_is_named_by_name_config_and_split(named, dataset, tmp_path, plain, sources):
    text = Text(dataset=named.format(dataset), length=LENGTH, samples=1000)
    windows = draw(text, Text(samples=0), Reader(plain, sources, LIMIT), seed=0).calibration
    expected, _ = windows_of(write(tmp_path, ".txt", DOCUMENTS[:3]), plain, sources, samples=1000)
    assert torch.equal(windows.tokens, expected.tokens)
    assert windows.source.startswith(str(dataset))
    assert windows.source.endswith(":train")


def test_one_split_to_choose_by_and_one_to_report_on(dataset, plain, sources):
    calibration = Text(dataset=str(dataset), length=LENGTH)
    reported = draw(calibration, Text(dataset=f"{dataset}::test"), Reader(plain, sources, LIMIT), seed=0).evaluation
    assert plain.decode(reported.tokens[0]) == DOCUMENTS[3][: len(plain.decode(reported.tokens[0]))]
    with pytest.raises(RecipeError, match="must not be what"):
        draw(calibration, Text(dataset=f"{dataset}::train"), Reader(plain, sources, LIMIT), seed=0)


@pytest.mark.parametrize(
    ("named", "column", "why"),
    [
        ("{}:nothing", "text", "cannot be loaded"),
        ("{}:default:nothing", "text", "cannot be loaded"),
        ("{}/nowhere", "text", "cannot be loaded"),
        ("{}", "txt", "No column is called 'txt'. Did you mean 'text'?"),
    ],
)
def test_datasets_that_cannot_be_read_are_refused_in_one_line(named, column, why, dataset, plain, sources):
    with pytest.raises(TextError, match=why) as caught:
        draw(Text(dataset=named.format(dataset), column=column), Text(), Reader(plain, sources, LIMIT), seed=0)
    assert "\n" not in str(caught.value)


def test_a_plugin_can_bring_a_dataset_and_a_kind_of_file(tmp_path, plain, sources):
    asked = []

    def invent(text):
        asked.append(text.dataset_parts)
        yield tiny.text(100)

    shout = Source("shout", lambda text: [tiny.text(100).upper()], (".up",))
    mine = {**sources, "invented": Source("invented", invent), "shout": shout}
    (tmp_path / "a.up").write_text("whatever")
    windows = draw(
        Text(dataset="invented:a:b", length=LENGTH), Text(samples=0), Reader(plain, mine, LIMIT), seed=0
    ).calibration
    assert asked == [("invented", "a", "b")]
    assert len(windows.tokens) > 5
    windows, _ = windows_of(tmp_path / "a.up", plain, mine)
    assert plain.decode(windows.tokens[0]).isupper()

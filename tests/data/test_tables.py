"""Rows of files: every format gives the same rows, and what is wrong with a file is named with its line."""

import csv
import gzip
import io
import json

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow.parquet import write_table

from bert_fast.data.tables import WRONG_NUMBER_OF_COLUMNS, open_table, read_lines

ROWS = [{"text": "first", "label": "a"}, {"text": "größer, 東京", "label": "b"}]


def write(tmp_path, name, content):
    path = tmp_path / name
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


def rows(path, *args, **kwargs):
    return [dict(row) for _, row in open_table(path, *args, **kwargs).rows]


def encoded(name):
    if name.startswith("csv"):
        return 'text,label\nfirst,a\n"größer, 東京",b\n'
    if name.startswith("tsv"):
        return "text\tlabel\nfirst\ta\ngrößer, 東京\tb\n"
    if name.startswith(("jsonl", "ndjson")):
        return "".join(json.dumps(row) + "\n" for row in ROWS)
    return json.dumps(ROWS if name == "json" else {"version": 1, "data": ROWS})


@pytest.mark.parametrize("name", ["csv", "tsv", "jsonl", "ndjson", "json", "json.gz", "csv.gz", "tsv.gz", "jsonl.gz"])
@pytest.mark.parametrize("change", ["plain", "bom", "crlf"])
def test_every_format_gives_the_same_rows(tmp_path, name, change):
    text = encoded(name)
    text = {"plain": text, "bom": "\ufeff" + text, "crlf": text.replace("\n", "\r\n")}[change]
    table = open_table(write(tmp_path, f"rows.{name}", text))
    assert table.columns == ("text", "label")
    assert [dict(row) for _, row in table.rows] == ROWS


def test_parquet(tmp_path):
    path = tmp_path / "rows.parquet"
    write_table(pyarrow.table({"text": ["first", None], "tags": [[1, 2], []]}), path)
    table = open_table(path)
    assert (table.columns, table.where(2)) == (("text", "tags"), f"{path}, row 2")
    assert [dict(row) for _, row in table.rows] == [{"text": "first", "tags": [1, 2]}, {"text": None, "tags": []}]


def test_a_parquet_file_with_a_broken_page(tmp_path):
    path = tmp_path / "rows.parquet"
    write_table(pyarrow.table({"text": [f"text {number}" for number in range(999)]}), path)
    data = bytearray(path.read_bytes())
    data[4:200] = bytes(196)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"rows.parquet cannot be read"):
        rows(path)


def test_rows_have_the_number_of_their_first_line(tmp_path):
    path = write(tmp_path, "a.csv", 'text,label\n"two\nlines",a\n\nthird,b\n')
    assert [number for number, _ in open_table(path).rows] == [2, 5]
    path = write(tmp_path, "a.tsv", "text\tlabel\n\nx\ty\n")
    assert [number for number, _ in open_table(path).rows] == [3]
    path = write(tmp_path, "a.jsonl", '\n{"a": 1}\n \n{"a": 2}\n')
    assert [number for number, _ in open_table(path).rows] == [2, 4]


def test_a_tsv_has_no_quotes(tmp_path):
    path = write(tmp_path, "a.tsv", 'text\tlabel\n"He said\tno\n')
    assert rows(path) == [{"text": '"He said', "label": "no"}]


def test_a_long_text(tmp_path):
    text = "word " * 100_000
    assert rows(write(tmp_path, "a.csv", f"text\n{text}\n")) == [{"text": text}]


def test_ragged_rows_can_be_counted(tmp_path):
    table = open_table(write(tmp_path, "a.tsv", "a\tb\n1\t2\n3\n4\t5\t6\n7\t8\n"), skip_ragged=True)
    assert [dict(row)["a"] for _, row in table.rows] == ["1", "7"]
    assert table.skipped == {WRONG_NUMBER_OF_COLUMNS: 2}


BROKEN = {
    "ragged.tsv": ("a\tb\n1\t2\n3\n", "line 3 has 1 columns, expected 2: a, b"),
    "ragged.csv": ('a,b\n"x\ny",2\n3,4,5\n', "line 4 has 3 columns, expected 2: a, b"),
    "empty.csv": ("", "is empty"),
    "empty.tsv": ("\n", "is empty"),
    "empty.jsonl": ("\n\n", "is empty"),
    "empty.json": ("[]", "is empty"),
    "blank.json": (" ", "is empty"),
    "twice.csv": ("a,a\n1,2\n", "has two columns 'a'"),
    "latin.csv": (b"a\nfine\ncaf\xe9\n", "line 3 is not UTF-8"),
    "latin.json": (b'[\n{"a": "caf\xe9"}]', "line 2 is not UTF-8"),
    "utf16.tsv": ("a\tb\n".encode("utf-16"), "line 1 is not UTF-8"),
    "quote.csv": ('a,b\n1,2\n"never closed,3\n4,5\n', "line 3 is not csv: unexpected end of data"),
    "after.csv": ('a,b\n"x" y,2\n', "line 2 is not csv"),
    "half.jsonl": ('{"a": 1}\n{"a": \n', "line 2 is not JSON"),
    "number.jsonl": ('{"a": 1}\n3\n', "line 2 is a JSON int, expected an object"),
    "list.json": ("[1]", "record 1 is a JSON int, expected an object"),
    "object.json": ('{"a": 1}', 'holds a dict, expected a list of objects or {"data": [...]}'),
    "deep.json": ("[" * 100_000, "is not JSON"),
    "a.parquet": ("PAR1", "is not a Parquet file"),
    "a.xlsx": ("", "ends in none of .csv, .tsv, .jsonl, .json, .parquet"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_with_the_line(tmp_path, name):
    content, message = BROKEN[name]
    path = write(tmp_path, name, content)
    with pytest.raises(ValueError, match=r".") as error:
        rows(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)


def test_a_broken_gzip_file(tmp_path):
    whole = gzip.compress(b"a\tb\n" * 1000)
    for data in (b"a\tb\n", whole[:-9], whole[:20]):
        path = tmp_path / "a.tsv.gz"
        path.write_bytes(data)
        with pytest.raises(ValueError, match="is not a whole gzip file"):
            list(read_lines(path))


def test_no_file_and_a_folder(tmp_path):
    for name in ("none.csv", "none.parquet"):
        with pytest.raises(FileNotFoundError):
            open_table(tmp_path / name)
    (tmp_path / "folder.tsv").mkdir()
    with pytest.raises(IsADirectoryError):
        open_table(tmp_path / "folder.tsv")


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=20)
tables = st.lists(st.tuples(texts, texts), min_size=1, max_size=5)


@settings(deadline=None)
@given(tables)
def test_csv_of_the_standard_library(tmp_path_factory, written):
    out = io.StringIO()
    csv.writer(out).writerows([("a", "b"), *written])
    path = write(tmp_path_factory.mktemp("csv"), "a.csv", out.getvalue())
    assert rows(path) == [{"a": a, "b": b} for a, b in written]


@settings(deadline=None)
@given(tables)
def test_jsonl_of_the_standard_library(tmp_path_factory, written):
    content = "".join(json.dumps({"a": a, "b": b}, ensure_ascii=False) + "\n" for a, b in written)
    path = write(tmp_path_factory.mktemp("jsonl"), "a.jsonl", content)
    assert rows(path) == [{"a": a, "b": b} for a, b in written]


lines = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00\t\r\n"), min_size=1, max_size=20)


@settings(deadline=None)
@given(st.lists(st.tuples(lines, lines), min_size=1, max_size=5))
def test_tsv_of_the_standard_library(tmp_path_factory, written):
    out = io.StringIO()
    csv.writer(out, delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None).writerows([("a", "b"), *written])
    path = write(tmp_path_factory.mktemp("tsv"), "a.tsv", out.getvalue())
    assert rows(path) == [{"a": a, "b": b} for a, b in written]


def test_names_in_capitals(tmp_path):
    path = tmp_path / "ROWS.TSV.GZ"
    path.write_bytes(gzip.compress(b"text\tlabel\nfirst\ta\n"))
    assert rows(path) == ROWS[:1]


def test_parquet_files_that_are_refused(tmp_path):
    path = tmp_path / "rows.parquet"
    write_table(pyarrow.table([["a"], ["b"], ["c"]], names=["text", "label", "label"]), path)
    with pytest.raises(ValueError, match=r"rows.parquet has two columns 'label'"):
        open_table(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-8] + b"\x05\0\0\0PAR1")  # the footer is said to be shorter than it is
    with pytest.raises(ValueError, match=r"rows.parquet is not a Parquet file"):
        open_table(path)

"""Files and folders of text to documents: formats, encodings, what is empty, what is wrong."""

import bz2
import gzip
import json
import lzma

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bert_fast.data.text import find_files, read_documents, read_sentences


def documents(path, **options):
    return list(read_documents([path], **options))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"one\ntwo\n\nthree", [["one", "two"], ["three"]]),
        (b"\n\n one \r\n\ttwo\r\n \r\n\n\nthree\n\n\n", [["one", "two"], ["three"]]),  # CRLF, spaces, many blank lines
        (b"\xef\xbb\xbfone", [["one"]]),  # a byte order mark
        (b"", [[]]),
        (b"\n \n", [[]]),
        ("ein Wört\n你好".encode(), [["ein Wört", "你好"]]),
        (b"a\x0bb\x0cc\xe2\x80\xa8d\n", [["a\x0bb\x0cc\u2028d"]]),  # only LF ends a line
    ],
)
def test_plain_text(tmp_path, content, expected):
    (tmp_path / "a.txt").write_bytes(content)
    assert documents(tmp_path / "a.txt") == expected


def test_json_lines(tmp_path):
    rows = [{"text": "one\n\ntwo\r\n"}, {"text": " "}, {"text": "three \ud800!", "id": 7}]
    lines = "\ufeff" + "\n\n".join(map(json.dumps, rows))
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    assert documents(tmp_path / "a.jsonl") == [["one", "two"], [], ["three \ufffd!"]]
    (tmp_path / "b").write_text('{"body": "one"}\n')
    assert documents(tmp_path / "b", text_field="body") == [["one"]]
    (tmp_path / "c.jsonl").write_text("")
    assert documents(tmp_path / "c.jsonl") == [[]]


def test_folders_are_read_in_the_order_of_their_paths(tmp_path):
    for name in ("b/2.txt", "b/10.txt", "a.txt", "b/c/d.txt", ".hidden/e.txt", "b/.f.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    found = find_files([tmp_path / "b" / "c", tmp_path])
    assert [str(path.relative_to(tmp_path)) for path in found] == [
        "b/c/d.txt",
        "a.txt",
        "b/10.txt",
        "b/2.txt",
        "b/c/d.txt",
    ]
    assert next(read_documents([tmp_path])) == ["a.txt"]


def _zst(path, content):
    import pyarrow

    with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
        file.write(content)


WRITERS = {
    ".gz": lambda path, content: path.write_bytes(gzip.compress(content)),
    ".bz2": lambda path, content: path.write_bytes(bz2.compress(content)),
    ".xz": lambda path, content: path.write_bytes(lzma.compress(content)),
    ".zst": _zst,
}


@pytest.mark.parametrize("suffix", WRITERS)
def test_compressed(tmp_path, suffix):
    content = "\n".join(f"line {index}" for index in range(5000)).encode()
    path = tmp_path / f"a.txt{suffix}"
    WRITERS[suffix](path, content)
    assert documents(path) == [content.decode().split("\n")]
    json_lines = tmp_path / f"b.jsonl{suffix}"
    WRITERS[suffix](json_lines, b'{"text": "one"}')
    assert documents(json_lines) == [["one"]]
    for damaged in (path.read_bytes()[:-20], b"this is no such file at all"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"a\.txt\{suffix} cannot be decompressed"):
            documents(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"fine\nnot \xff fine\n", r"a\.txt, line 2 is not UTF-8"),
        ("a.txt", "fine".encode("utf-16"), r"a\.txt, line 1 is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl, line 2 is not JSON"),
        ("a.jsonl", b'["a"]\n', r"line 1 is a JSON list, expected an object"),
        ("a.jsonl", b'{"body": "a"}\n', r"line 1 has no field 'text'; it has: body"),
        ("a.jsonl", b'{"text": 3}\n', r"line 1: field 'text' is a int, expected a string"),
    ],
)
def test_what_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        documents(tmp_path / name)


def test_no_files(tmp_path):
    (tmp_path / ".hidden").write_text("a")
    with pytest.raises(ValueError, match="holds no file"):
        find_files([tmp_path])
    with pytest.raises(ValueError, match=r"there is no file or folder .*nowhere"):
        find_files([tmp_path / "nowhere"])


def test_sentences_are_split_by_a_simple_rule(tmp_path):
    (tmp_path / "a.txt").write_text(
        'He said "Go." Then (it rained.) We left, e.g. by car. 3.5 km? 你好。再见\uff01 Ärger! ok\n'
    )
    assert documents(tmp_path / "a.txt", split_sentences=True) == [
        ['He said "Go."', "Then (it rained.)", "We left, e.g. by car.", "3.5 km?", "你好。", "再见\uff01", "Ärger! ok"]
    ]


@given(
    st.lists(st.lists(st.text(st.characters(exclude_categories=["Cc", "Cs", "Z"]), min_size=1), min_size=1), min_size=1)
)
def test_what_is_written_is_read(tmp_path_factory, expected):
    path = tmp_path_factory.getbasetemp() / "law.txt"
    path.write_bytes("\n\n".join("\n".join(document) for document in expected).encode())
    if expected[0][0].startswith("\ufeff"):
        expected[0][0] = expected[0][0][1:]
    assert documents(path) == expected
    flat = [sentence for document in expected for sentence in (*document, "")]
    assert list(read_sentences(path)) == flat

"""IMDB's reviews: the folder aclImdb, Keras' `imdb.npz`, and files of rows."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any, ClassVar, Literal

import numpy as np

from bert_fast.data.classification import read_texts
from bert_fast.data.dataset import Request
from bert_fast.data.examples import Examples, TextExample
from bert_fast.data.tables import load_json, open_table
from bert_fast.terminal import progress_bar

ALIASES = {"negative": "neg", "positive": "pos"}
WORD_INDEX = "imdb_word_index.json"
#: Of Keras' `load_data`: what stands before each review, what for a word left out, and what is added to ranks.
START, UNKNOWN, INDEX_FROM = 1, 2, 3


def read_reviews(request: Request, **options: Any) -> Examples:
    """The reviews of a folder with `pos` and `neg`, of an `imdb.npz`, or of a file of rows (`review`, `sentiment`).

    `imdb.npz` holds the ranks of words, which become words again by `imdb_word_index.json` beside it; case and
    punctuation are gone. Arrays that somebody saved from Keras' `load_data` are known by the 1 that it puts before each
    review, and its 2 becomes [UNK]. The file is a pickle inside: only arrays and lists of whole numbers are taken out.

    Raises:
        ValueError, OSError: as `bert_fast.data.catalogue.read` says.
    """
    read = _read_folder if request.path.is_dir() else _read_npz if request.path.suffix == ".npz" else None
    if read is not None:
        _refuse(request, options)
        return read(request)
    return read_texts(open_table(request.path), request, aliases=ALIASES, **options)


def _refuse(request: Request, options: Mapping[str, Any]) -> None:
    """ValueError for what has no meaning where there are neither columns nor labels to read."""
    problem = options.get("problem", "single")
    if problem != "single":
        raise ValueError(f"problem is {problem!r}, but imdb is 'single'")
    given = [name for name in options if name != "problem"] + [f"column {role}" for role in request.columns]
    if given:
        raise ValueError(f"{request.path} has no columns with labels, which {given[0]!r} could be about")


def _read_folder(request: Request) -> Examples:
    examples = []
    for label in ("pos", "neg"):
        folder = request.path / label
        if not folder.is_dir():
            raise ValueError(f"{request.path} has no folder {label!r}")
        for path in progress_bar(sorted(folder.glob("*.txt")), what=f"reading {label}", unit=" files"):
            try:
                text = path.read_bytes().decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} is not UTF-8: {error}") from error
            known = None if request.labelled is False else label
            examples.append(TextExample(f"{label}/{path.stem}", text, None, known))
    return Examples(tuple(examples), {})


def _read_npz(request: Request) -> Examples:
    path, split = request.path, request.split
    reviews = [_ranks(review, path) for review in load_array(path, f"x_{split}")]
    labels = load_array(path, f"y_{split}")
    if len(reviews) != len(labels):
        raise ValueError(f"{path} has {len(reviews)} reviews and {len(labels)} labels")
    words = _words(path.with_name(WORD_INDEX))
    shifted = all(review[:1] == [START] for review in reviews)
    examples = []
    both = progress_bar(zip(reviews, labels, strict=True), total=len(reviews), what=f"reading {path.name}")
    for place, (review, label) in enumerate(both):
        if label not in (0, 1):
            raise ValueError(f"{path}: y_{split}[{place}] is {label!r}, expected 0 or 1")
        names = _decode(review, words, shifted, f"{path}: x_{split}[{place}]")
        known = None if request.labelled is False else ("neg", "pos")[int(label)]
        examples.append(TextExample(str(place), " ".join(names), None, known))
    return Examples(tuple(examples), {})


def _decode(review: Iterable[int], words: dict[int, str], shifted: bool, where: str) -> Iterable[str]:
    for rank in review:
        if shifted and rank in (0, START):
            continue  # padding, and the mark of the beginning
        if shifted and rank == UNKNOWN:
            yield "[UNK]"
            continue
        word = words.get(rank - INDEX_FROM if shifted else rank)
        if word is None:
            raise ValueError(f"{where} has the number {rank}, which is no word of {WORD_INDEX}")
        yield word


def _ranks(review: Any, path: Path) -> list[int]:
    if isinstance(review, np.ndarray) and review.dtype.kind in "iu":
        return [int(rank) for rank in review]
    if isinstance(review, list) and all(type(rank) is int for rank in review):
        return review
    raise ValueError(f"{path} holds a review that is a {type(review).__name__}, expected a list of whole numbers")


def _words(path: Path) -> dict[int, str]:
    if not path.is_file():
        raise ValueError(f"there is no {path}, which says what the numbers of {path.parent / 'imdb.npz'} are")
    index = load_json(path)
    if not isinstance(index, dict) or not all(isinstance(rank, int) for rank in index.values()):
        raise ValueError(f"{path} is not a word index: expected word -> number")
    return {rank: word for word, rank in index.items()}


def load_array(path: Path, name: str) -> np.ndarray:
    """One array of an .npz file, lists of numbers included, without running what a pickle can run.

    `numpy.load` needs `allow_pickle=True` for arrays of lists, and then does whatever the file says. Here a pickle may
    name NumPy's arrays and nothing else.

    Raises:
        ValueError: there is no such array, or it holds anything else.
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
            version = np.lib.format.read_magic(file)
            read_header = np.lib.format.read_array_header_1_0
            if version != (1, 0):
                read_header = np.lib.format.read_array_header_2_0
            shape, by_column, dtype = read_header(file)
            order: Literal["C", "F"] = "F" if by_column else "C"
            array = (
                _unpickle(file) if dtype.hasobject else np.frombuffer(file.read(), dtype).reshape(shape, order=order)
            )
    except (KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} has no array {name!r}: {error}") from error
    except (pickle.UnpicklingError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: the array {name!r} is refused: {error}") from error
    if not isinstance(array, np.ndarray) or array.ndim < 1:
        raise ValueError(f"{path}: {name!r} is a {type(array).__name__}, expected an array")
    return array


def _unpickle(file: IO[bytes]) -> Any:
    try:
        return _ArraysOnly(file, encoding="latin1").load()
    except (TypeError, AttributeError, IndexError, KeyError) as error:  # what a pickle gives that was made to break
        raise pickle.UnpicklingError(str(error)) from error


def _latin1(text: str, encoding: str) -> bytes:
    """How old protocols write bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it encodes as {encoding}")
    return text.encode("latin1")


class _ArraysOnly(pickle.Unpickler):
    """Knows arrays, and what Python makes of numbers and lists without a name."""

    ALLOWED: ClassVar = {
        ("_codecs", "encode"): _latin1,
        ("multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        root, _, leaf = module.rpartition(".")
        key = (leaf if root in ("numpy.core", "numpy._core") else module, name)
        if key not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, expected arrays and lists of whole numbers")
        return self.ALLOWED[key]

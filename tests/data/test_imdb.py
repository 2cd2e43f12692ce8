"""IMDB: the folder, rows, and Keras' archive of numbers, which is not trusted."""

import json
import os
import pickle
import zipfile

import numpy as np
import pytest

from bert_fast.data.catalogue import DATASETS, read
from bert_fast.data.imdb import load_array

WORDS = {"the": 1, "good": 2, "film": 3, "bad": 4, "was": 5}
REVIEWS = [[1, 3, 5, 2], [4, 3]]
TEXTS = ["the film was good", "bad film"]


def objects(rows):
    array = np.empty(len(rows), dtype=object)
    array[:] = rows
    return array


@pytest.fixture
def keras(tmp_path):
    """As `imdb.npz` is: lists of ranks, whose words stand in another file."""

    def make(reviews=REVIEWS, labels=(1, 0)):
        np.savez(tmp_path / "imdb.npz", x_train=objects(reviews), y_train=labels, x_test=objects([[2]]), y_test=[1])
        (tmp_path / "imdb_word_index.json").write_text(json.dumps(WORDS))
        return tmp_path

    return make


def said(found):
    return [(example.text, example.label) for example in found.examples]


def test_labels_are_those_of_datasets():
    """`ClassLabel(names=["neg", "pos"])` of `datasets/imdb/imdb.py` of huggingface/datasets (commit 02bb18c)."""
    assert DATASETS["imdb"].labels == ("neg", "pos")


def test_the_folder(tmp_path):
    for name, text in {"pos/0_9": "Good <br />", "pos/10_7": "Fine", "neg/1_2": "Schön ist's nicht"}.items():
        path = tmp_path / "aclImdb/train" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    expected = [("pos/0_9", "Good <br />", "pos"), ("pos/10_7", "Fine", "pos"), ("neg/1_2", "Schön ist's nicht", "neg")]
    for folder in (tmp_path, tmp_path / "aclImdb", tmp_path / "aclImdb" / "train"):
        found = read("imdb", folder, labelled=True)
        assert [(e.id, e.text, e.label) for e in found.examples] == expected
    assert read("imdb", tmp_path, labelled=False).examples[0].label is None
    with pytest.raises(ValueError, match=r"has no file of the split 'test' of imdb; looked for: test, aclImdb/test"):
        read("imdb", tmp_path, split="test")
    (tmp_path / "aclImdb/train/neg/2_1.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"neg/2_1.txt is not UTF-8"):
        read("imdb", tmp_path)
    (tmp_path / "aclImdb/train/neg").rename(tmp_path / "aclImdb/train/negative")
    with pytest.raises(ValueError, match="has no folder 'neg'"):
        read("imdb", tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_delimiter": ";"}, "has no columns with labels, which 'label_delimiter' could be about"),
        ({"no_label": -1}, "has no columns with labels, which 'no_label' could be about"),
        ({"columns": {"text": "review"}}, "has no columns with labels, which 'column text' could be about"),
        ({"problem": "multi"}, "problem is 'multi', but imdb is 'single'"),
    ],
)
def test_options_that_a_folder_has_no_use_for(tmp_path, keras, options, message):
    (tmp_path / "train/pos").mkdir(parents=True)
    for place in (tmp_path / "train", keras() / "imdb.npz"):
        with pytest.raises(ValueError, match=message):
            read("imdb", place, **options)
    assert read("imdb", keras() / "imdb.npz", problem="single").examples


def test_rows(tmp_path):
    path = tmp_path / "IMDB Dataset.csv"
    path.write_text('review,sentiment\n"He said ""no"",\nand left.",negative\nGood.,positive\n')
    assert said(read("imdb", path, labelled=True)) == [('He said "no",\nand left.', "neg"), ("Good.", "pos")]
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "Good.", "label": 1}\n')
    assert said(read("imdb", path)) == [("Good.", "pos")]


def test_ranks_become_words(keras):
    folder = keras()
    assert said(read("imdb", folder, labelled=True)) == [(TEXTS[0], "pos"), (TEXTS[1], "neg")]
    assert said(read("imdb", folder / "imdb.npz", split="test", labelled=False)) == [("good", None)]


def test_what_load_data_gave(keras):
    """Keras' `load_data`: 1 first, ranks moved by 3, 2 for words that were left out; 0 where somebody padded."""
    folder = keras([[1, 4, 6, 2, 5, 0, 0], np.array([1, 7, 6])])
    assert said(read("imdb", folder)) == [("the film [UNK] good", "pos"), ("bad film", "neg")]


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_every_age(tmp_path, protocol):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive, archive.open("x.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": (2,)})
        file.write(pickle.dumps(objects(REVIEWS), protocol=protocol))
    assert load_array(path, "x").tolist() == REVIEWS


class Command:
    def __reduce__(self):
        return os.system, ("touch taken",)


@pytest.mark.parametrize("payload", [Command(), print, {1: os.getcwd}], ids=["command", "function", "inside"])
def test_a_pickle_that_runs_something_is_refused(tmp_path, monkeypatch, payload):
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "imdb.npz", x_train=objects([payload]), y_train=[1])
    with pytest.raises(
        ValueError, match=r"the array 'x_train' is refused: it names \w+\.\w+, expected arrays and lists"
    ):
        read("imdb", tmp_path)
    assert not (tmp_path / "taken").exists()


@pytest.mark.parametrize("cut", [1, 20, 60, 100, 150])
def test_a_pickle_that_ends_early(tmp_path, cut):
    path = tmp_path / "a.npz"
    whole = pickle.dumps(objects(REVIEWS), protocol=3)
    with zipfile.ZipFile(path, "w") as archive, archive.open("x.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": (2,)})
        file.write(whole[:cut])
    with pytest.raises(ValueError, match="the array 'x' is refused"):
        load_array(path, "x")


@pytest.mark.parametrize(
    ("reviews", "labels", "message"),
    [
        ([[1, 9], [1]], (1, 0), r"x_train\[0\] has the number 9, which is no word of imdb_word_index.json"),
        (REVIEWS, (1, 2), r"y_train\[1\] is .*2.*, expected 0 or 1"),
        (REVIEWS, (1,), "has 2 reviews and 1 labels"),
        ([["the"], [1]], (1, 0), "holds a review that is a list, expected a list of whole numbers"),
        ([None, [1]], (1, 0), "holds a review that is a NoneType"),
    ],
)
def test_archives_that_are_refused(keras, reviews, labels, message):
    with pytest.raises(ValueError, match=message):
        read("imdb", keras(reviews, labels))


def test_padded_reviews_in_any_order(tmp_path):
    reviews = np.array([[1, 5, 6], [1, 7, 0]])
    np.savez(tmp_path / "a.npz", c=reviews, f=np.asfortranarray(reviews))
    for name in ("c", "f"):
        np.testing.assert_array_equal(load_array(tmp_path / "a.npz", name), reviews)


def test_archives_that_are_broken(keras):
    folder = keras()
    (folder / "imdb_word_index.json").write_text("[]")
    with pytest.raises(ValueError, match="is not a word index"):
        read("imdb", folder)
    (folder / "imdb_word_index.json").unlink()
    with pytest.raises(ValueError, match=r"there is no .*imdb_word_index.json, which says what the numbers"):
        read("imdb", folder)
    with pytest.raises(ValueError, match="has no array 'x_dev'"):
        load_array(folder / "imdb.npz", "x_dev")
    (folder / "imdb.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match="has no array 'x_train'"):
        read("imdb", folder)

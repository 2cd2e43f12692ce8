"""Text to shards and back: what an instance looks like, who makes it, and what is refused."""

import copy
import errno
import json
import os
import pickle
import signal

import corpora
import numpy as np
import pyarrow.feather
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from bert_fast import disk
from bert_fast.data import workers
from bert_fast.data.corpus import write_corpus
from bert_fast.data.encoding import Encoder, TokenizerVocabulary
from bert_fast.data.inspect import instances, statistics
from bert_fast.data.instances import BATCH, Options
from bert_fast.data.pretraining import ShardDataset
from bert_fast.data.shards import build
from bert_fast.folders import resolve
from bert_fast.tokenization import Tokenizer

CLS, SEP, MASK = 101, 102, 103


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders of each objective and masking, made once."""
    root = tmp_path_factory.mktemp("made")
    text = corpora.write(root)
    folders = {}
    for objective in ("nsp", "sop", "none"):
        for masking, scheme in (("static", "subword"), ("static", "whole_word"), ("dynamic", "span")):
            folder = folders[objective, masking, scheme] = root / f"{objective}-{masking}-{scheme}"
            chosen = corpora.options(objective=objective, masking=masking, scheme=scheme)
            build([text], "demo", folder, chosen, num_workers=1)
    return folders


KINDS = [
    (objective, masking, scheme)
    for objective in ("nsp", "sop", "none")
    for masking, scheme in (("static", "subword"), ("static", "whole_word"), ("dynamic", "span"))
]


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_an_instance(made, kind):
    objective, masking, _ = kind
    dataset = ShardDataset(made[kind])
    sentences = {tuple(ids) for ids in _tokens()}
    assert len(dataset) == dataset.manifest["statistics"]["num_instances"] > 80
    whole = 0
    for index in range(len(dataset)):
        features = dataset[index]
        ids = features["input_ids"].copy()
        if masking == "static":
            labels = features["labels"]
            chosen = labels >= 0
            assert 1 <= chosen.sum() <= min(20, max(1, round(0.15 * len(ids)))) or kind[2] == "whole_word"
            ids[chosen] = labels[chosen]
        else:
            words = features["word_ids"]
            assert (words[np.isin(ids, [CLS, SEP])] == -1).all()
            assert (np.diff(words[words >= 0]) >= 0).all()
            assert words.max() < len(ids)
        assert set(features) == {"input_ids", "token_type_ids"} | (
            {"labels"} if masking == "static" else {"word_ids"}
        ) | (set() if objective == "none" else {"next_sentence_label"})
        assert len(ids) == dataset.lengths[index] <= 48
        assert ids[0] == CLS
        assert ids[-1] == SEP
        ends = np.flatnonzero(ids == SEP)
        assert len(ends) == (1 if objective == "none" else 2)
        assert (ids == CLS).sum() == 1
        types = np.zeros(len(ids))
        types[ends[0] + 1 :] = 1
        np.testing.assert_array_equal(features["token_type_ids"], types)
        whole += tuple(ids[1 : ends[0]]) in sentences
        if objective != "none":
            assert features["next_sentence_label"] in (0, 1)
    assert whole > 5, "many a first segment is one sentence of the text"


def _tokens():
    backend = Tokenizer.from_pretrained(resolve("demo")).backend
    return [encoding.ids for encoding in backend.encode_batch(corpora.text().split("\n"), add_special_tokens=False)]


def test_the_text_is_all_there_once_in_each_duplicate(made):
    dataset = ShardDataset(made["none", "dynamic", "span"])
    found = np.sort(np.concatenate([dataset[index]["input_ids"][1:-1] for index in range(len(dataset))]))
    np.testing.assert_array_equal(found, np.sort(2 * sum(_tokens(), [])))  # noqa: RUF017


def test_labels_of_pairs_that_follow_each_other(made):
    """Label 0: the two are in a row in the text; of SOP with label 1 the other way round."""
    backend = Tokenizer.from_pretrained(resolve("demo")).backend
    documents = [
        " ".join(
            token for line in document.split("\n") for token in backend.encode(line, add_special_tokens=False).tokens
        )
        for document in corpora.text().split("\n\n")
    ]
    for objective in ("nsp", "sop"):
        dataset = ShardDataset(made[objective, "dynamic", "span"])
        counts = {"in order": 0, "swapped": 0, "neither": 0}
        for index in range(len(dataset)):
            features = dataset[index]
            tokens = [backend.id_to_token(int(token)) for token in features["input_ids"]]
            middle = tokens.index("[SEP]")
            a, b = " ".join(tokens[1:middle]), " ".join(tokens[middle + 1 : -1])
            if len(tokens) < 48:  # nothing was cut off
                in_order, swapped = (
                    any(both in document for document in documents) for both in (f"{a} {b}", f"{b} {a}")
                )
                assert in_order or features["next_sentence_label"] == 1
                counts["in order" if in_order else "swapped" if swapped else "neither"] += 1
        assert counts["in order"] > 10
        assert counts["swapped" if objective == "sop" else "neither"] > 10


def test_any_number_of_workers_makes_the_same_bytes(tmp_path, made):
    text = corpora.write(tmp_path)
    build([text], "demo", tmp_path / "three", corpora.options(), num_workers=3)
    expected, found = corpora.contents(made["nsp", "static", "subword"]), corpora.contents(tmp_path / "three")
    assert expected.keys() == found.keys()
    assert len([name for name in found if name.endswith(".arrow")]) > 4
    for name in found.keys() - {"manifest.json"}:
        assert expected[name] == found[name], name
    assert json.loads(expected["manifest.json"])["shards"] == json.loads(found["manifest.json"])["shards"]


def test_another_seed_makes_other_data(tmp_path, made):
    build([corpora.write(tmp_path)], "demo", tmp_path / "other", corpora.options(seed=1), num_workers=1)
    one, other = ShardDataset(made["nsp", "static", "subword"]), ShardDataset(tmp_path / "other")
    same = sum(one[i]["input_ids"].tolist() == other[i]["input_ids"].tolist() for i in range(min(len(one), len(other))))
    assert same < 10


def test_the_bytes_of_a_seed_are_the_same_in_every_release(tmp_path):
    build([corpora.write(tmp_path, 4)], "demo", tmp_path / "out", corpora.options(masking="dynamic"), num_workers=1)
    dataset = ShardDataset(tmp_path / "out")
    assert len(dataset) == 12
    assert dataset.lengths.tolist() == [16, 26, 14, 20, 15, 22, 21, 16, 20, 15, 32, 34]
    assert dataset[2]["input_ids"].tolist() == [
        CLS,
        2026,
        5916,
        17749,
        7852,
        1012,
        SEP,
        1996,
        7115,
        3727,
        1996,
        7440,
        1012,
        SEP,
    ]


def test_a_folder_is_read_in_other_processes_and_by_others(made):
    folder = made["nsp", "static", "subword"]
    dataset = ShardDataset(folder)
    assert len(pickle.dumps(dataset)) < 1000
    for other in (pickle.loads(pickle.dumps(dataset)), copy.deepcopy(dataset)):
        np.testing.assert_array_equal(other[3]["input_ids"], dataset[3]["input_ids"])
    loader = DataLoader(dataset, batch_size=1, num_workers=1, collate_fn=lambda rows: rows[0])
    for index, row in enumerate(loader):
        np.testing.assert_array_equal(row["labels"], dataset[index]["labels"])
    table = pyarrow.feather.read_table(folder / "shard-00000.arrow")
    frame = table.to_pylist()
    assert frame[0]["input_ids"] == dataset[0]["input_ids"].tolist()
    assert set(frame[0]) == {"input_ids", "token_type_ids", "labels", "next_sentence_label"}
    np.testing.assert_array_equal(dataset[-1]["input_ids"], dataset[len(dataset) - 1]["input_ids"])
    for index in (len(dataset), -len(dataset) - 1):
        with pytest.raises(IndexError):
            dataset[index]


def test_shards_are_no_open_files(made):
    before = len(os.listdir("/proc/self/fd"))
    dataset = ShardDataset(made["nsp", "static", "subword"])
    assert dataset.lengths.sum() == sum(len(dataset[index]["input_ids"]) for index in range(len(dataset)))
    assert len(os.listdir("/proc/self/fd")) == before


def test_more_than_a_batch(tmp_path):
    """Instances are found by number across batches of a shard."""
    text = tmp_path / "long.txt"
    text.write_text("\n".join(f"{number} sheep" for number in range(3 * BATCH)))  # one document
    chosen = Options(objective="none", max_seq_length=5, dupe_factor=1, masking="dynamic", short_seq_prob=0.0)
    manifest = build([text], "demo", tmp_path / "out", chosen, num_workers=1)
    dataset = ShardDataset(tmp_path / "out")
    assert len(manifest["shards"]) == 1
    assert len(dataset) > 2 * BATCH
    found = {tuple(dataset[index]["input_ids"].tolist()) for index in range(len(dataset))}
    assert len(found) == len(dataset) == len(dataset.lengths)


@settings(deadline=None, max_examples=8)
@given(
    st.lists(st.lists(st.sampled_from(corpora.THINGS), min_size=1, max_size=5), min_size=2, max_size=9),
    st.integers(5, 20),
)
def test_any_text_makes_legal_instances(tmp_path_factory, documents, max_seq_length):
    root = tmp_path_factory.mktemp("law")
    (root / "a.txt").write_text("\n\n".join("\n".join(document) for document in documents))
    chosen = corpora.options(max_seq_length=max_seq_length, scheme="ngram", short_seq_prob=0.5)
    build([root / "a.txt"], "demo", root / "out", chosen, num_workers=1)
    dataset = ShardDataset(root / "out")
    for index in range(len(dataset)):
        features = dataset[index]
        ids = np.where(features["labels"] >= 0, features["labels"], features["input_ids"])
        assert 5 <= len(ids) <= max_seq_length
        assert [ids[0], ids[-1]] == [CLS, SEP]
        assert (ids == SEP).sum() == 2


def test_statistics_and_instances_in_words(made):
    dataset = ShardDataset(made["nsp", "static", "subword"])
    table = statistics(dataset.folder, dataset.manifest)
    counts = dataset.manifest["statistics"]
    assert counts["documents"] == 40
    assert counts["sentences"] == len(_tokens()) - 39 - 1 == sum(1 + n % 7 for n in range(40))
    assert counts["tokens"] == sum(map(len, _tokens()))
    assert counts["num_tokens"] == dataset.lengths.sum()
    labels = [dataset[index]["next_sentence_label"] for index in range(len(dataset))]
    assert f"label 1, random   {np.mean(labels):.1%}" in table
    predicted = sum((dataset[index]["labels"] >= 0).sum() for index in range(len(dataset)))
    assert f"to predict        {predicted / dataset.lengths.sum():.2%}   (subword)" in table
    assert "of these [UNK]    0.00%" in table
    shown = instances(dataset, 4)
    assert shown.count("instance ") == 4
    assert "[MASK]→" in shown
    assert "label 1 (random)" in shown
    dynamic = ShardDataset(made["sop", "dynamic", "span"])
    assert "drawn in training   (span)" in statistics(dynamic.folder, dynamic.manifest)
    assert "[MASK]→" in instances(dynamic, 3)


def test_unknown_tokens_and_empty_documents_are_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one \U0001f600"}\n{"text": ""}\n{"text": "two\\n\u200b"}\n')
    counts = build([tmp_path / "a.jsonl"], "demo", tmp_path / "out", corpora.options(), num_workers=1)["statistics"]
    assert (counts["documents"], counts["empty_documents"]) == (2, 1)
    assert (counts["sentences"], counts["empty_sentences"]) == (2, 1)
    assert (counts["tokens"], counts["unknown"]) == (3, 1)


def test_finished_data_are_not_made_again(tmp_path):
    text, out = corpora.write(tmp_path), tmp_path / "out"
    first = build([text], "demo", out, corpora.options(), num_workers=1)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir() if path.name != ".lock"}
    (out / ".building").mkdir()  # a run that was killed at its very end
    assert build([text], "demo", out, corpora.options(), num_workers=2) == first
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir() if path.name != ".lock"} == before
    with pytest.raises(ValueError, match=r"begun with something else: seed was 12345 and is 3\. Choose another"):
        build([text], "demo", out, corpora.options(seed=3), num_workers=1)
    text.write_text(corpora.text() + "More.\n")
    with pytest.raises(ValueError, match=r"something else: the text changed in .*corpus\.txt"):
        build([text], "demo", out, corpora.options(), num_workers=1)


def test_a_disk_that_is_full_at_the_very_beginning(tmp_path, monkeypatch):
    def full(path, value):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    text, out = corpora.write(tmp_path), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(disk, "write_json", full)
        with pytest.raises(OSError, match="the same command goes on from there"):
            build([text], "demo", out, corpora.options(), num_workers=1)
    assert build([text], "demo", out, corpora.options(), num_workers=1)["statistics"]["documents"] == 40


def test_what_is_left_of_another_text_is_not_gone_on_with(tmp_path):
    """A folder that was being taken away when the process ended: the plan is gone, tokens are still there."""
    text, out = corpora.write(tmp_path), tmp_path / "out"
    left, vocabulary = out / ".building", TokenizerVocabulary.read("demo")
    left.mkdir(parents=True)
    encoder = lambda: Encoder(vocabulary, words="tokenizer")  # noqa: E731
    list(write_corpus(left, ["Another text.", "", "Its end.", ""], encoder, 100, num_workers=1, part=1))
    assert build([text], "demo", out, corpora.options(), num_workers=1)["statistics"]["documents"] == 40


@pytest.mark.parametrize(
    ("content", "given", "message"),
    [
        ("a\nb\n", {}, r"one document, and next-sentence prediction \(nsp\) .* the objective sop or none"),
        ("\n\n", {}, r"there is no text in .*a\.txt"),
        ("\u200b\n", {"objective": "none"}, "there is no text"),
        (b"a\n\n\xff", {}, r"a\.txt, line 3 is not UTF-8"),
        ("a\n\nb", {"scheme": "entity"}, "needs a file of entities"),
        ("a\n\nb", {"objective": "mlm"}, "objective is 'mlm', expected one of nsp, sop, none"),
        ("a\n\nb", {"masking": "both"}, "masking is 'both'"),
        ("a\n\nb", {"scheme": "word"}, "scheme is 'word'"),
        ("a\n\nb", {"max_seq_length": 4}, "max_seq_length is 4, expected 5"),
        ("a\n\nb", {"dupe_factor": 0}, "dupe_factor is 0"),
        ("a\n\nb", {"short_seq_prob": 1.5}, r"short_seq_prob is 1\.5"),
        ("a\n\nb", {"mlm_probability": 0.0}, r"mlm_probability is 0\.0"),
        ("a\n\nb", {"seed": -1}, "seed is -1"),
        ("a\n\nb", {"words": "spaces"}, "words is spaces, which static masks of the scheme subword do not"),
    ],
)
def test_what_is_refused_leaves_nothing(tmp_path, content, given, message):
    (tmp_path / "a.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        build([tmp_path / "a.txt"], "demo", tmp_path / "out", Options(**given), num_workers=1)
    assert not (tmp_path / "out").exists() or {path.name for path in (tmp_path / "out").iterdir()} == {".lock"}


def test_folders_that_are_refused(tmp_path, made):
    text = corpora.write(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"holds thesis\.tex, and no pre-training data"):
        build([text], "demo", tmp_path / "mine", corpora.options(), num_workers=1)
    with pytest.raises(ValueError, match=r"corpus\.txt is a file, expected a folder"):
        build([text], "demo", text, corpora.options(), num_workers=1)
    with pytest.raises(ValueError, match=r"out is in .*, whose files are the text"):
        build([tmp_path], "demo", tmp_path / "mine" / "out", corpora.options(), num_workers=1)
    with disk.locked(tmp_path / "busy"), pytest.raises(OSError, match=r"another run has .*busy \(process \d+ on .*\)"):
        build([text], "demo", tmp_path / "busy", corpora.options(), num_workers=1)
    with pytest.raises(ValueError, match="num_workers is 0"):
        build([text], "demo", tmp_path / "out", corpora.options(), num_workers=0)
    with pytest.raises(ValueError, match="entities are given, which static masks"):
        build([text], "demo", tmp_path / "out", corpora.options(), entities=text, num_workers=1)
    with pytest.raises(ValueError, match=r"mine holds no finished pre-training data: it has no manifest\.json"):
        ShardDataset(tmp_path / "mine")
    (tmp_path / "mine" / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="is not of bert_fast pre-training data 1"):
        ShardDataset(tmp_path / "mine")
    build([text], "demo", tmp_path / "out", corpora.options(), num_workers=1)
    shard = tmp_path / "out" / "shard-00001.arrow"
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"shard-00001\.arrow has \d+ bytes, expected \d+: make the data anew"):
        ShardDataset(tmp_path / "out")
    shard.unlink()
    with pytest.raises(ValueError, match=r"shard-00001\.arrow is missing"):
        ShardDataset(tmp_path / "out")


def test_workers_leave_an_interrupt_to_the_parent_from_their_first_moment():
    """They would say so with a traceback each, as they import what they need."""
    blocked = workers.map_in_order(signal.pthread_sigmask, [()], 2, int, signal.SIG_BLOCK)
    assert [signal.SIGINT in signals for _, signals in blocked] == [True]
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())

"""Extended checkpoints: what is new is the mean of its pieces, and nothing else has changed by a bit."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from tiny_checkpoint import checkpoint

from bert_fast import BertConfig, loading, saving
from bert_fast.embedder import Embedder
from bert_fast.folders import resolve
from bert_fast.modules import BertForMaskedLM
from bert_fast.tokenization import Tokenizer, bert_backend
from bert_fast.vocabulary.extension import changes, costly_words, extend, extended, plan
from bert_fast.vocabulary.words import count_words, split

WORDS = ["spinnaker", "Halyard", "sourdough"]
NEW = ["spinnaker", "halyard", "sourdough"]
OLD_TEXTS = ["The jib is the smaller sail.", "Dough rests [MASK] time.", "", "東京 ☃ spin hal"]
NEW_TEXTS = ["A spinnaker has no HALYARD.", "sourdough"]

EMBEDDINGS = "embeddings.word_embeddings.weight"


def ids_of(folder, texts):
    return [Tokenizer.from_pretrained(folder)([text]).input_ids.tolist() for text in texts]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def longer(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("extended") / "longer"
    return folder, extend(tiny, WORDS, folder)


def test_new_ids_come_after_the_old_ones(tiny, longer):
    folder, extension = longer
    assert extension.first_id == 30522
    assert list(extension.pieces) == NEW
    assert ids_of(folder, OLD_TEXTS) == ids_of(tiny, OLD_TEXTS)
    assert ids_of(folder, ["spinnaker HALYARD sourdough"]) == [[101, 30522, 30523, 30524, 102]]
    lines = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
    assert lines == [*(tiny / "vocab.txt").read_text(encoding="utf-8").split("\n")[:-1], *NEW, ""]
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 30525


def test_new_rows_are_means_and_old_rows_are_the_same(tiny, longer):
    folder, extension = longer
    before, after = load_file(tiny / "model.safetensors"), load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    assert torch.equal(after[EMBEDDINGS][:30522], before[EMBEDDINGS])
    for row, (word, pieces) in zip(after[EMBEDDINGS][30522:], extension.pieces.items(), strict=True):
        assert list(pieces) == ids_of(tiny, [word])[0][1:-1]
        assert torch.equal(row, before[EMBEDDINGS][list(pieces)].double().mean(0).float())
    for name in before.keys() - {EMBEDDINGS}:
        assert torch.equal(after[name], before[name]), name


def test_vectors_of_other_texts_are_bit_identical(tiny, longer):
    before, after = Embedder(tiny).encode(OLD_TEXTS), Embedder(longer[0]).encode(OLD_TEXTS)
    np.testing.assert_array_equal(after, before)


def test_transformers_reads_the_same(longer):
    folder, _ = longer
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = OLD_TEXTS + NEW_TEXTS
    assert tokenizer(texts)["input_ids"] == ids_of(folder, texts)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    assert model.config.vocab_size == len(tokenizer) == 30525
    for text in NEW_TEXTS:
        with torch.no_grad():
            theirs = model(**tokenizer([text], return_tensors="pt")).last_hidden_state.mean(1)
        np.testing.assert_allclose(Embedder(folder).encode([text]), theirs, atol=1e-5)
    (folder / "tokenizer.json").rename(folder / "hidden")
    try:  # vocab.txt alone says the same
        assert ids_of(folder, texts) == tokenizer(texts)["input_ids"]
    finally:
        (folder / "hidden").rename(folder / "tokenizer.json")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_masked_language_model_scores_a_new_word_as_its_pieces(tiny, tmp_path, tied, dtype):
    options = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertForMaskedLM(BertConfig(**options, tie_word_embeddings=tied)).to(dtype).eval()
    torch.nn.init.normal_(model.cls.predictions.bias)
    saving.save_pretrained(model, tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny / name, tmp_path / "model" / name)
    extension = extend(tmp_path / "model", WORDS, tmp_path / "longer")
    longer = loading.from_pretrained(tmp_path / "longer", "masked_lm")
    assert next(longer.parameters()).dtype == dtype
    ids = torch.tensor([[101, 103, 2003, 102]])
    with torch.no_grad():
        before, after = model(ids).logits[0, 1].double(), longer(ids).logits[0, 1].double()
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(after[:30522], before, rtol=0, atol=0)
    for score, pieces in zip(after[30522:], extension.pieces.values(), strict=True):
        torch.testing.assert_close(score, before[list(pieces)].mean(), rtol=0, atol=tolerance)
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "longer").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits[0, 1].double(), after, rtol=0, atol=tolerance)


def test_a_generator_of_electra(tiny, tmp_path):
    options = {"embedding_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.ElectraForMaskedLM(transformers.ElectraConfig(**options, intermediate_size=16)).eval()
    torch.nn.init.normal_(model.generator_lm_head.bias)
    model.save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny / name, tmp_path / "model" / name)
    extension = extend(tmp_path / "model", WORDS, tmp_path / "longer")
    longer = transformers.ElectraForMaskedLM.from_pretrained(tmp_path / "longer").eval()
    ids = torch.tensor([[101, 103, 2003, 102]])
    with torch.no_grad():
        before, after = model(ids).logits[0, 1], longer(ids).logits[0, 1]
    torch.testing.assert_close(after[:30522], before, rtol=0, atol=1e-6)
    for score, pieces in zip(after[30522:], extension.pieces.values(), strict=True):
        torch.testing.assert_close(score, before[list(pieces)].mean(), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_the_real_model(tmp_path):
    """All of the sentence-transformers folder goes along, and gives the same vectors but for the new words."""
    extend("demo", WORDS, tmp_path / "demo")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo"]
    before, after = SentenceTransformer(str(resolve("demo"))), SentenceTransformer(str(tmp_path / "demo"))
    np.testing.assert_array_equal(after.encode(OLD_TEXTS), before.encode(OLD_TEXTS))
    np.testing.assert_allclose(Embedder(tmp_path / "demo").encode(NEW_TEXTS), after.encode(NEW_TEXTS), atol=1e-5)
    moved = Embedder("demo").encode(NEW_TEXTS) * after.encode(NEW_TEXTS)
    assert (moved.sum(1) > 0.3).all()  # the cosines: another vector, but not another text's
    assert (moved.sum(1) < 0.999).all()


def test_spare_rows_of_the_table_are_taken_first(tmp_path):
    folder = checkpoint(tmp_path / "padded", vocab_size=30524)  # two rows more than the tokenizer has tokens
    extend(folder, WORDS, tmp_path / "longer")
    assert json.loads((tmp_path / "longer" / "config.json").read_text())["vocab_size"] == 30525
    extend(folder, WORDS[:1], tmp_path / "same")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "same" / "model.safetensors")
    assert after[EMBEDDINGS].shape == before[EMBEDDINGS].shape == (30524, 32)
    assert torch.equal(after[EMBEDDINGS][30523], before[EMBEDDINGS][30523])
    assert not torch.equal(after[EMBEDDINGS][30522], before[EMBEDDINGS][30522])


def test_an_extended_vocabulary_can_be_extended(longer, tmp_path):
    extension = extend(longer[0], ["levain", "halyard"], tmp_path / "longest")
    assert extension.first_id == 30525
    assert extension.refused == {"halyard": "is in the vocabulary already"}
    assert ids_of(tmp_path / "longest", ["halyard levain"]) == [[101, 30523, 30525, 102]]


def backend(*pieces):
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces]
    return bert_backend({token: id for id, token in enumerate(tokens)}, {})


LETTERS = ("a", "b", "c", "##a", "##b", "##c")


def test_what_is_refused_and_why():
    words = ["abc", "ABC", "a", "ab-c", " ", "a☃", "東", "a" * 101, "cb"]
    extension = plan(backend(*LETTERS), words)
    assert extension.pieces == {"abc": (5, 9, 10), "cb": (7, 9)}
    assert extension.refused == {
        "ABC": "is given twice, as abc",
        "a": "is in the vocabulary already",
        "ab-c": "the tokenizer takes it for 3 words: ab - c",
        " ": "nothing is left of it after normalisation",
        "a☃": "has characters that the vocabulary lacks at their place: ☃",
        "東": "has characters that the vocabulary lacks at their place: 東",
        "a" * 101: "is longer than 100 characters",
    }


def test_costly_words():
    counts = Counter({"abc": 2, "ab": 4, "ca": 4, "bb": 1, "a": 99, "☃": 99, "12": 99, "cab": 1})
    tokenizer = backend(*LETTERS, "1", "##2")
    assert costly_words(counts, tokenizer, 10) == ["ab", "abc", "ca", "cab", "bb"]
    assert costly_words(counts, tokenizer, 2) == ["ab", "abc"]
    assert costly_words(counts, tokenizer, 10, min_frequency=4) == ["ab", "ca"]


def test_longest_match_changes_words_that_begin_with_a_new_one():
    before = backend("a", "ab", "##b", "##cd", "##c", "##ab")
    after = extended(before, ["abc"])
    counts = {"abc": 7, "abcc": 1, "abcd": 3, "abab": 2, "cabc": 1}
    found = [(c.word, c.count, " ".join(c.before), " ".join(c.after)) for c in changes(counts, before, after, ["abc"])]
    assert found == [("abcd", 3, "ab ##cd", "[UNK]"), ("abcc", 1, "ab ##c ##c", "abc ##c")]


@settings(max_examples=100, deadline=None)
@given(st.text("abc-☃ ", max_size=30), st.lists(st.text("abc", min_size=2, max_size=4), min_size=1, max_size=3))
def test_changes_are_all_that_changes(text, words):
    """A text has other ids after the extension exactly if it has a new word, or one of `changes`."""
    before = backend(*LETTERS)
    new = plan(before, dict.fromkeys(words)).pieces
    after = extended(before, new)
    changed = {change.word for change in changes(count_words([text], before), before, after, new)}
    is_same = before.encode(text).ids == after.encode(text).ids
    assert is_same == (not (set(split(text, before)) & (changed | set(new))))
    assert all(word.startswith(tuple(new)) for word in changed)


@pytest.mark.parametrize(
    ("words", "message"),
    [([], "there is no word to add"), (["the"], "no word to add: the is in the vocabulary already")],
)
def test_no_word_to_add(tiny, tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        extend(tiny, words, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_does_not_fit_the_table(tmp_path):
    with pytest.raises(ValueError, match="has 30522 tokens, but the model's vocab_size is 30000"):
        extend(checkpoint(tmp_path / "short", vocab_size=30000), WORDS, tmp_path / "x")
    folder = checkpoint(tmp_path / "wrong")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 30600}))
    with pytest.raises(ValueError, match=r"word_embeddings.weight has 30522 rows, expected vocab_size, 30600"):
        extend(folder, WORDS, tmp_path / "x")


def test_a_family_with_other_tables(tiny, tmp_path):
    source = shutil.copytree(tiny, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": "mpnet"}))
    with pytest.raises(ValueError, match="model_type is 'mpnet', expected one of bert, electra"):
        extend(source, WORDS, tmp_path / "x")


def test_ids_with_gaps():
    gaps = bert_backend({"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "a": 4}, {})
    with pytest.raises(ValueError, match="ids of the 4 tokens are not the numbers from 0 to 3"):
        plan(gaps, ["aa"])


def test_the_output_is_whole_or_not_there(tiny, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="taken is there already"):
        extend(tiny, WORDS, tmp_path / "taken")
    source = shutil.copytree(tiny, tmp_path / "source")
    with open(source / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(ValueError, match="not a sound safetensors file"):
        extend(source, WORDS, tmp_path / "out")
    assert sorted(path.name for path in Path(tmp_path).iterdir()) == ["source", "taken"]


def test_other_forms_of_the_weights_and_states_of_a_run_stay_behind(tiny, tmp_path):
    source = shutil.copytree(tiny, tmp_path / "source")
    (source / "onnx").mkdir()
    (source / "checkpoint-8").mkdir()
    of_the_run = ("checkpoint-8/optimizer.pt", "metrics.jsonl", "predictions_test.jsonl", "report.html")
    for name in ("onnx/model.onnx", "pytorch_model.bin", "tf_model.h5", *of_the_run, "README.md"):
        (source / name).write_bytes(b"x")
    for path in source.iterdir():
        path.chmod(path.stat().st_mode & ~0o222)  # as in a cache that is not to be written
    extend(source, WORDS, tmp_path / "out")
    assert all(path.stat().st_mode & 0o200 for path in (tmp_path / "out").iterdir())
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in tiny.iterdir()} | {"README.md"}

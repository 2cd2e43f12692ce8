"""Tags of words: which sub-word has one, as transformers' run_ner lays them, and words that are cut off."""

import numpy as np
import pytest
import tiny_checkpoint
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval.metrics import f1_score
from transformers import AutoTokenizer

from bert_fast.data.examples import TextExample, TokensExample
from bert_fast.folders import resolve
from bert_fast.loading import from_pretrained
from bert_fast.tasks._batches import PaddingCollator
from bert_fast.tasks.tokens import TokenClassification

pytestmark = pytest.mark.filterwarnings("ignore:the checkpoint has no weights for this head")

TOKENIZER = tiny_checkpoint.tokenizer()
THEIRS = AutoTokenizer.from_pretrained(resolve("demo"))
TAGS = ("B-LOC", "B-PER", "I-PER", "O")  # of LOC there is no I


def run_ner(words, tags, max_length, label_all_tokens):
    """Ids and labels as `tokenize_and_align_labels` of transformers' run_ner.py defines them."""
    encoded = THEIRS(words, truncation=True, max_length=max_length, is_split_into_words=True)
    labels, previous = [], None
    for word in encoded.word_ids():
        if word is None:
            labels.append(-100)
        elif word != previous:
            labels.append(TAGS.index(tags[word]))
        elif label_all_tokens:
            inside = tags[word].replace("B-", "I-")
            labels.append(TAGS.index(inside if inside in TAGS else tags[word]))
        else:
            labels.append(-100)
        previous = word
    return encoded["input_ids"], labels


WORD = st.sampled_from(["Maria", "Okafor", "unbelievably", "in", "New", "York", "东京", "\u200b", "don't", "3.14", "ß"])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(WORD, st.sampled_from(TAGS)), min_size=1, max_size=12), st.integers(3, 20), st.booleans())
def test_features_are_those_of_run_ner(tagged, max_length, label_all_tokens):
    words, tags = zip(*tagged, strict=True)
    task = TokenClassification(TAGS, max_length, label_all_tokens)
    features = task.features([TokensExample("0", words, tags)], TOKENIZER, labelled=True)
    ids, labels = run_ner(list(words), tags, max_length, label_all_tokens)
    assert features.inputs[0]["input_ids"].tolist() == ids
    assert features.inputs[0]["labels"].tolist() == labels


def test_each_word_gets_the_tag_of_its_first_sub_word_and_what_is_cut_off_gets_none():
    task = TokenClassification(TAGS, max_seq_length=10)
    words = ("Maria", "\u200b", "unbelievably", "saw", "New", "York", "again")  # the second one has no token
    example = TokensExample("s", words, ("B-PER", "O", "O", "O", "B-LOC", "O", "O"))
    features = task.features([example], TOKENIZER, labelled=True)
    assert features.num_truncated == 1
    first, _ = features.extras[0]
    assert first[1] == -1
    tokens = [TOKENIZER.backend.id_to_token(i) for i in features.inputs[0]["input_ids"]]
    assert [tokens[place] for place in first if place >= 0] == ["maria", "un", "saw", "new"]
    logits = np.zeros((len(tokens), 4), np.float32)
    logits[:, 0] = 1  # everything is a place
    said = task.predictions([example], features, [(logits,)])
    assert said == [{"id": "s", "tags": ["B-LOC", "O", "B-LOC", "B-LOC", "B-LOC", "O", "O"], "num_words_cut": 2}]


def test_packed_and_padded_batches_agree(tmp_path):
    task = TokenClassification(TAGS)
    examples = [TokensExample("0", ("Maria", "saw", "unbelievably"), None), TokensExample("1", ("no",), None)]
    features = task.features(examples, TOKENIZER, labelled=False)
    model = from_pretrained(tiny_checkpoint.checkpoint(tmp_path), task.head, config=task.config())
    with torch.inference_mode():
        packed = task.outputs(model, task.collator(model.config)(features.inputs))
        padded = task.outputs(model, PaddingCollator(0)(features.inputs))
    for (ours,), (other,), feature in zip(packed, padded, features.inputs, strict=True):
        assert ours.shape == (len(feature["input_ids"]), 4)
        np.testing.assert_allclose(ours, other, atol=1e-6)


def test_entities_are_scored_as_seqeval_does_and_other_tags_by_accuracy():
    task = TokenClassification(TAGS)
    truth = [("B-PER", "I-PER", "O"), ("B-LOC", "O")]
    said = [["B-PER", "O", "O"], ["B-LOC", "O"]]
    examples = [TokensExample(str(n), ("w",) * len(tags), tags) for n, tags in enumerate(truth)]
    predictions = [{"id": str(n), "tags": tags} for n, tags in enumerate(said)]
    metrics = task.metrics(examples, predictions)
    assert metrics["f1"] == pytest.approx(f1_score([list(tags) for tags in truth], said))
    assert metrics["accuracy"] == pytest.approx(0.8)
    assert task.main_metric == "f1"
    task.return_entity_level_metrics = True
    by_type = {"PER_f1": 0.0, "PER_precision": 0.0, "PER_recall": 0.0, "LOC_f1": 1.0}
    assert task.metrics(examples, predictions).items() >= {**metrics, **by_type}.items()
    parts = TokenClassification()
    parts.learn([TokensExample("0", ("he", "ran"), ("PRON", "VERB"))])
    assert parts.labels == ("PRON", "VERB")
    assert parts.main_metric == "accuracy"
    assert parts.metrics([TokensExample("0", ("he", "ran"), ("PRON", "VERB"))], [{"tags": ["PRON", "NOUN"]}]) == {
        "accuracy": 0.5
    }


def test_bad_input():
    with pytest.raises(ValueError, match="example 0 has the label 'B-ORG', which is none of those of training: B-LOC"):
        TokenClassification(TAGS).features([TokensExample("0", ("x",), ("B-ORG",))], TOKENIZER, labelled=True)
    with pytest.raises(ValueError, match="example 0 has no tags"):
        TokenClassification().learn([TokensExample("0", ("x",))])
    with pytest.raises(ValueError, match="example 0 is a TextExample, expected a TokensExample"):
        TokenClassification().learn([TextExample("0", "x")])
    with pytest.raises(ValueError, match="does not know its labels yet"):
        TokenClassification().config()
    with pytest.raises(ValueError, match=r"texts\[1\] has a word that is a int, expected a str"):
        TOKENIZER.encode_words([["a"], ["b", 0]])

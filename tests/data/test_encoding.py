"""Sentences to tokens that know their words: those of a tokenizer, of a user, and names."""

import json

import numpy as np
import pytest

from bert_fast.data.encoding import Encoder, TokenizerVocabulary

VOCABULARY = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "中",
    "国",
    "人",
    "new",
    "york",
    "##ers",
    "old",
    ".",
    "city",
]
VOCABULARY += ["[", "]", "sep", "mask"]


@pytest.fixture
def vocabulary(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    return TokenizerVocabulary.read(str(tmp_path))


def words(encoder, sentence):
    """The tokens of a sentence, those of one word together."""
    tokens, lengths = encoder([sentence])
    assert lengths.tolist() == [len(tokens)]
    joined = []
    for token in tokens.tolist():
        name = VOCABULARY[token if token >= 0 else -1 - token]
        if token < 0:
            joined[-1].append(name)
        else:
            joined.append([name])
    return joined


def test_words_of_the_tokenizer(vocabulary):
    encode = Encoder(vocabulary, words="tokenizer")
    assert words(encode, "New Yorkers. 中国") == [["new"], ["york", "##ers"], ["."], ["中"], ["国"]]


def test_words_that_the_text_was_cut_into(vocabulary):
    encode = Encoder(vocabulary, words="spaces")
    assert words(encode, "中国 人 new yorkers .") == [["中", "国"], ["人"], ["new"], ["york", "##ers"], ["."]]
    plain = Encoder(vocabulary, words="tokenizer")(["中国", "人", "new", "yorkers", "."])
    cut = encode(["中国 人 new yorkers ."])
    assert np.maximum(cut.tokens, -1 - cut.tokens).tolist() == np.maximum(plain.tokens, -1 - plain.tokens).tolist()


def test_names_are_one_word(vocabulary):
    names = ["New York", "New York City", "York old", "city"]
    encode = Encoder(vocabulary, words="tokenizer", entities=names)
    assert words(encode, "old NEW york.") == [["old"], ["new", "york"], ["."]]
    assert words(encode, "new york city city") == [["new", "york", "city"], ["city"]], "the longest"
    assert words(encode, "new york old") == [["new", "york"], ["old"]], "the first one"
    assert words(encode, "new yorkers") == [["new"], ["york", "##ers"]], "it ends with a word"
    tokens, lengths = encode(["old new", "york", "", "new york"])
    assert lengths.tolist() == [2, 1, 0, 2]
    assert (tokens < 0).tolist() == [False, False, False, False, True], "in one sentence"


def test_text_that_reads_like_a_special_token_is_text(vocabulary):
    encode = Encoder(vocabulary, words="tokenizer")
    assert words(encode, "[SEP] [MASK]") == [
        ["["],
        ["sep"],
        ["]"],
        ["["],
        ["mask"],
        ["]"],
    ]


def test_without_words_it_is_the_same_tokens(vocabulary):
    sentences = ["New Yorkers.", "", "中国 x"]
    marked, plain = (Encoder(vocabulary, words="tokenizer", marked=marked)(sentences) for marked in (True, False))
    np.testing.assert_array_equal(np.maximum(marked.tokens, -1 - marked.tokens), plain.tokens)
    np.testing.assert_array_equal(marked.lengths, plain.lengths)
    assert plain.tokens[-1] == VOCABULARY.index("[UNK]")


def test_special_tokens_by_their_names(tmp_path):
    (tmp_path / "vocab.txt").write_text("<pad>\n[UNK]\n[CLS]\n[SEP]\n<mask>\na\n")
    with pytest.raises(ValueError, match=r"lacks the special tokens \[PAD\], \[MASK\]"):
        TokenizerVocabulary.read(str(tmp_path))
    config = {"pad_token": "<pad>", "mask_token": {"content": "<mask>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    vocabulary = TokenizerVocabulary.read(str(tmp_path))
    assert vocabulary.ids == {"unk_token": 1, "sep_token": 3, "pad_token": 0, "cls_token": 2, "mask_token": 4}
    assert vocabulary.special_token_ids == (2, 3, 0)


def test_digests_tell_vocabularies_apart(tmp_path, vocabulary):
    before = vocabulary.digests()
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    cased = TokenizerVocabulary.read(str(tmp_path)).digests()
    assert cased["vocabulary_sha256"] == before["vocabulary_sha256"]
    assert cased["sha256"] != before["sha256"]
    (tmp_path / "vocab.txt").write_text("\n".join([*VOCABULARY[:-2], "mask", "sep"]) + "\n")
    assert TokenizerVocabulary.read(str(tmp_path)).digests()["vocabulary_sha256"] != before["vocabulary_sha256"]

"""Token ids against transformers' tokenizer, and every odd text a caller can bring."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, BertTokenizer

from bert_fast.folders import resolve
from bert_fast.tokenization import Tokenizer
from bert_fast.verify import shipped_sentences

ODD_TEXTS = [
    "",
    " \t\r\n\u00a0\u3000",
    "\x00\x01\x7f\x9f\u200b\ufeff",
    "\ufffd",
    "Crème brûlée, naïve façade, Ångström, İstanbul, straße, ΑΣΟΦΟΣ",
    "e\u0301 a\u0308 o\u0302\u0323 \u0301",
    "我爱北京天安门。東京タワー 한국어 ひらがな",
    "😀👩\u200d👩\u200d👧🇫🇷 ❤\ufe0f",
    "[MASK] [CLS] it [SEP] [UNK] [PAD] [mask]",
    "don't stop-believin', e.g. U.S.A. 3.14 $5,000 50% a_b c/d",
    "x" * 101,
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "\U0010ffff \ue000 \u0378",
    "ǅungla ﬁnal ①②③ ½ ™",
    "עברית العربية हिन्दी ไทย",
]


@pytest.fixture(scope="module")
def demo():
    return resolve("demo")


@pytest.fixture(scope="module")
def tokenizer(demo):
    return Tokenizer.from_pretrained(demo)


@pytest.fixture(scope="module")
def oracle(demo):
    return AutoTokenizer.from_pretrained(demo)


def rows(batch):
    """Ids and types of each text."""
    ends = batch.lengths.cumsum()[:-1]
    ids, types = np.split(batch.input_ids, ends), np.split(batch.token_type_ids, ends)
    return [i.tolist() for i in ids], [t.tolist() for t in types]


def assert_same(tokenizer, oracle, texts, max_length=None):
    columns = [list(column) for column in zip(*texts, strict=True)] if isinstance(texts[0], tuple) else [texts]
    expected = oracle(*columns, truncation=max_length is not None, max_length=max_length)
    ids, types = rows(tokenizer(texts, max_length))
    assert ids == expected["input_ids"]
    assert types == expected["token_type_ids"]


def test_ids_are_those_of_transformers(tokenizer, oracle):
    assert_same(tokenizer, oracle, shipped_sentences() + ODD_TEXTS)


@pytest.mark.parametrize("max_length", [4, 5, 8, 17])  # from one token a text of a pair to no cut at all for some
def test_pairs_and_truncation_are_those_of_transformers(tokenizer, oracle, max_length):
    sentences = shipped_sentences()[:40] + ODD_TEXTS
    assert_same(tokenizer, oracle, sentences, max_length)
    assert_same(tokenizer, oracle, list(zip(sentences, reversed(sentences), strict=True)), max_length)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40))
def test_any_text_has_the_ids_of_transformers(tokenizer, oracle, text):
    assert rows(tokenizer([text]))[0] == oracle([text])["input_ids"]


@pytest.mark.parametrize(
    "options",
    [
        {"do_lower_case": True},
        {"do_lower_case": False},
        {"do_lower_case": True, "strip_accents": False},
        {"do_lower_case": False, "strip_accents": True},
        {"do_lower_case": True, "tokenize_chinese_chars": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("with_json", [True, False], ids=["tokenizer.json", "vocab.txt"])
def test_options_of_tokenizer_config(demo, tmp_path, options, with_json):
    shutil.copy(demo / "vocab.txt", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", **options}))
    oracle = BertTokenizer.from_pretrained(tmp_path)
    if with_json:
        shutil.copy(demo / "tokenizer.json", tmp_path)
    assert_same(Tokenizer.from_pretrained(tmp_path), oracle, shipped_sentences()[:50] + ODD_TEXTS)


def test_special_tokens_of_another_name(demo, tmp_path):
    vocab = (demo / "vocab.txt").read_text().replace("[CLS]", "<s>").replace("[SEP]", "</s>")
    (tmp_path / "vocab.txt").write_text(vocab)
    names = {"cls_token": "<s>", "sep_token": {"content": "</s>", "lstrip": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    batch = Tokenizer.from_pretrained(tmp_path)(["hello </s> world"])
    assert batch.input_ids.tolist() == [101, 7592, 102, 2088, 102]


def test_the_files_padding_and_truncation_are_ignored(demo, tokenizer):
    written = json.loads((demo / "tokenizer.json").read_text())
    assert written["padding"]["strategy"] == {"Fixed": 128}
    assert written["truncation"]["max_length"] == 128
    batch = tokenizer(["one", "two " * 300])
    assert batch.lengths.tolist() == [3, 302]
    assert batch.num_truncated == 0


def test_truncation_is_counted(tokenizer):
    batch = tokenizer(["a b c d e f", "a", "a b c d"], max_length=6)
    assert batch.lengths.tolist() == [6, 3, 6]
    assert batch.num_truncated == 1
    assert tokenizer([("a b c", "d e f"), ("a", "b")], max_length=8).num_truncated == 1


def test_max_length_is_never_more_than_the_models(tokenizer):
    assert tokenizer.model_max_length == 512
    batch = tokenizer(["word " * 600], max_length=10_000)
    assert batch.lengths.tolist() == [512]
    assert batch.num_truncated == 1


def test_no_limit_where_the_folder_has_none(demo, tmp_path):
    shutil.copy(demo / "vocab.txt", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": int(1e30)}))
    assert Tokenizer.from_pretrained(tmp_path)(["word " * 600]).lengths.tolist() == [602]


@pytest.mark.parametrize(("text", "same_as"), [("a\ud800b", "a\ufffdb"), ("\udfff", "\ufffd"), ("\ud83d\ude00", "😀")])
def test_surrogates(tokenizer, text, same_as):
    assert rows(tokenizer([text, (text, text)])) == rows(tokenizer([same_as, (same_as, same_as)]))


def test_a_million_characters(tokenizer):
    batch = tokenizer(["word " * 200_000, "x" * 1_000_000])
    assert batch.lengths.tolist() == [512, 3]
    assert batch.num_truncated == 1


def test_no_texts(tokenizer):
    batch = tokenizer([])
    assert batch.input_ids.shape == batch.lengths.shape == (0,)
    assert batch.input_ids.dtype == batch.lengths.dtype == batch.token_type_ids.dtype == np.int64
    assert batch.to_ragged().cu_seqlens.tolist() == [0]


def test_to_ragged(tokenizer):
    batch = tokenizer([("a b", "c"), ("", "d")])
    ragged = batch.to_ragged("cpu")
    assert ragged.input_ids.tolist() == batch.input_ids.tolist()
    assert ragged.token_type_ids.tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 1, 1]
    assert ragged.position_ids.tolist() == [*range(6), *range(4)]
    assert ragged.cu_seqlens.tolist() == [0, 6, 10]
    assert ragged.max_seqlen == 6


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["fine", 7], r"texts\[1\] is a int"),
        ([None], r"texts\[0\] is a NoneType"),
        ([b"bytes"], r"texts\[0\] is a bytes"),
        ([("a", "b", "c")], r"texts\[0\] is a tuple"),
        ([("a", 1)], r"texts\[0\] is a tuple"),
        ("a bare string", "one str"),
    ],
)
def test_what_is_not_a_text(tokenizer, texts, message):
    with pytest.raises(ValueError, match=message):
        tokenizer(texts)


@pytest.mark.parametrize(("texts", "max_length"), [(["a"], 2), (["a"], 0), (["a"], -1), ([("a", "b")], 3)])
def test_max_length_without_room(tokenizer, texts, max_length):
    with pytest.raises(ValueError, match=f"max_length is {max_length}"):
        tokenizer(texts, max_length)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (None, "", "holds no tokenizer"),
        ("tokenizer.json", "{", "tokenizer.json is not a tokenizer"),
        ("tokenizer.json", '{"version": "1.0"}', "tokenizer.json is not a tokenizer"),
        ("vocab.txt", "a\nb\n", "vocab.txt lacks the special tokens"),
        ("tokenizer_config.json", "[1]", "tokenizer_config.json holds a list"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not JSON"),
    ],
)
def test_bad_folders(tmp_path, file, content, message):
    if file is not None:
        (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_pretrained(tmp_path)


def test_threads_with_different_limits(tokenizer):
    texts = shipped_sentences()
    expected = {n: tokenizer(texts, n).input_ids.tolist() for n in (8, 16, 32)}
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda n: (n, tokenizer(texts, n).input_ids.tolist()), [8, 16, 32] * 8))
    assert all(ids == expected[n] for n, ids in results)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=30) | st.sampled_from(ODD_TEXTS), max_size=3))
def test_offsets_are_those_of_transformers(tokenizer, oracle, texts):
    batch, offsets = tokenizer.encode_offsets(texts)
    ends = batch.lengths.cumsum()
    for text, start, end in zip(texts, ends - batch.lengths, ends, strict=True):
        expected = oracle(text, add_special_tokens=False, return_offsets_mapping=True)
        assert batch.input_ids[start:end].tolist() == expected["input_ids"]
        assert offsets[start:end].tolist() == [list(pair) for pair in expected["offset_mapping"]]


def test_offsets_of_a_lone_surrogate_and_of_no_text(tokenizer):
    _, offsets = tokenizer.encode_offsets(["a \ud800 b"])
    assert offsets.tolist()[-1] == [4, 5]
    batch, offsets = tokenizer.encode_offsets([])
    assert (batch.lengths.shape, offsets.shape) == ((0,), (0, 2))
    with pytest.raises(ValueError, match=r"texts\[1\] is a int"):
        tokenizer.encode_offsets(["a", 1])

"""Masks by words, n-grams and spans: what is never split, how much, and in which shares."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from bert_fast import losses
from bert_fast.data.masking import IGNORED_LABEL, SCHEMES, Masking, WordSpans, choose_ngrams, choose_spans
from bert_fast.training.masking import IndexedDataset, MaskingCollator

VOCAB, PAD, CLS, SEP, MASK = 1000, 0, 1, 2, 3
WORD_SCHEMES = [scheme for scheme in SCHEMES if scheme != "subword"]


def masking(**options):
    arguments = {"vocab_size": VOCAB, "mask_token_id": MASK, "special_token_ids": (PAD, CLS, SEP)}
    return Masking(**(arguments | options))


def text(*segments):
    """(ids, word ids) of [CLS] segment [SEP] ...; a segment is the sizes of its words."""
    word_ids, number = [-1], 0
    for sizes in segments:
        for size in sizes:
            word_ids += [number] * size
            number += 1
        word_ids.append(-1)
    words = np.array(word_ids)
    return np.where(words < 0, SEP, 10 + np.arange(len(words))), words


def draws(rows, count, seed=0):
    return np.random.default_rng(seed).random((rows, count))


texts = st.lists(st.lists(st.integers(1, 6), max_size=25), min_size=1, max_size=3).map(lambda parts: text(*parts))


@settings(deadline=None, max_examples=200)
@given(
    st.lists(texts, min_size=1, max_size=4),
    st.sampled_from(WORD_SCHEMES),
    st.sampled_from([0.15, 0.5, 1.0]),
    st.none() | st.integers(1, 9),
    st.integers(0, 99),
)
def test_words_are_whole_and_as_many_as_fit(batch, scheme, probability, most, seed):
    ids, words = (np.concatenate(parts) for parts in zip(*batch, strict=True))
    lengths = np.array([len(part) for part, _ in batch])
    hide = masking(scheme=scheme, mlm_probability=probability, max_predictions=most)
    seen, labels = hide.hide(ids, lengths, draws(hide.numbers, len(ids), seed), words)
    starts = lengths.cumsum() - lengths
    for start, length in zip(starts, lengths, strict=True):
        part = slice(start, start + length)
        chosen = labels[part] != IGNORED_LABEL
        limit = min(most or length, max(1, round(length * probability)))
        assert chosen.sum() <= limit
        free = [
            (words[part] == word).sum() for word in set(words[part]) - {-1} if not _whole(chosen[words[part] == word])
        ]
        if scheme != "ngram":  # whose words may be left over where the only n-gram drawn from them is taken in part
            assert all(chosen.sum() + size > limit for size in free)
    assert (labels[words < 0] == IGNORED_LABEL).all()
    np.testing.assert_array_equal(labels[labels != IGNORED_LABEL], ids[labels != IGNORED_LABEL])
    np.testing.assert_array_equal(seen[labels == IGNORED_LABEL], ids[labels == IGNORED_LABEL])


def _whole(chosen):
    """Whether a word is chosen; all of it is, or nothing."""
    assert chosen.all() or not chosen.any(), "a word was split"
    return chosen.all()


@given(texts, st.integers(0, 99))
def test_words_of_one_token_are_chosen_as_tokens_are(example, seed):
    ids, words = example
    words = np.where(words < 0, -1, np.arange(len(words)))
    numbers = draws(3, len(ids), seed)
    lengths = np.array([len(ids)])
    by_token = masking().hide(ids, lengths, numbers)
    by_word = masking(scheme="whole_word").hide(ids, lengths, numbers, words)
    np.testing.assert_array_equal(by_token, by_word)


@given(texts)
def test_where_words_are(example):
    _, ids = example
    words = WordSpans(ids)
    for number, (start, end) in enumerate(zip(words.starts, words.ends, strict=True)):
        assert len(set(ids[start:end])) == 1
        assert ids[start - 1] != ids[start]
        assert ids[end] != ids[start]
        last = words.lasts[number]
        assert (ids[start : words.ends[last - 1]] >= 0).all(), "no special token between"
        assert ids[words.ends[last - 1]] == -1
    np.testing.assert_array_equal(words.tokens >= 0, ids >= 0)
    assert words.tokens.max() == len(words.starts) - 1


@given(st.lists(st.integers(1, 4), min_size=1, max_size=25), st.integers(1, 30), st.integers(0, 99))
def test_ngrams_are_those_of_albert(sizes, count, seed):
    """google-research/albert with the same order and the same n, written out with lists of tokens."""
    ids, word_ids = text(sizes)
    scores, numbers = draws(2, len(ids), seed)
    words = [np.flatnonzero(word_ids == word).tolist() for word in range(len(sizes))]
    covered = []
    for first in sorted(range(len(words)), key=lambda word: scores[words[word][0]]):
        grams = [sum(words[first : first + n], []) for n in (1, 2, 3)]  # noqa: RUF017
        n = 1 + np.searchsorted([6 / 11, 9 / 11], numbers[words[first][0]], side="right")
        while n > 1 and len(covered) + len(grams[n - 1]) > count:
            n -= 1
        gram = grams[n - 1]
        if len(covered) + len(gram) <= count and not set(gram) & set(covered):
            covered += gram
    picked = choose_ngrams(scores, numbers, WordSpans(word_ids), count)
    assert {token for word in picked for token in words[word]} == set(covered)


def first_run(picked):
    """How many words the first span has."""
    size = 1
    while size < len(picked) and picked[size] == picked[0] + size:
        size += 1
    return size


@pytest.mark.parametrize(
    ("choose", "shares"),
    [
        (choose_ngrams, [6 / 11, 3 / 11, 2 / 11]),  # 1/n
        (choose_spans, [0.2 * 0.8**n / (1 - 0.8**10) for n in range(10)]),  # geometric, p = 0.2, at most ten
    ],
)
def test_the_lengths_of_ngrams_and_spans(choose, shares):
    """Of the first of each text, which has room; the next one touches it in one text of a hundred."""
    _, word_ids = text([1] * 400)
    words, rng, counts = WordSpans(word_ids), np.random.default_rng(0), np.zeros(len(shares))
    for _ in range(3000):
        scores = rng.random(len(word_ids))
        scores[[0, -1]] = 2
        scores[-12:] += 1  # not from the end, where there are too few words
        counts[first_run(choose(scores, rng.random(len(word_ids)), words, len(shares))) - 1] += 1
    assert chisquare(counts, 3000 * np.array(shares)).pvalue > 1e-3


@pytest.mark.parametrize(("choose", "most"), [(choose_ngrams, 3), (choose_spans, 10)])
def test_none_goes_over_a_special_token(choose, most):
    """The last word but one of the first segment comes first, with as many words as there can be, then the last one."""
    _, word_ids = text([1] * 5, [1] * 20)
    scores = np.linspace(1, 0.9, len(word_ids))
    scores[4] = 0
    picked = choose(scores, np.full(len(scores), 0.999), WordSpans(word_ids), most)
    assert picked[:2] == [3, 4]
    assert len(picked) < 3 or picked[2] != 5


@pytest.mark.parametrize("scheme", SCHEMES)
def test_80_10_10(scheme):
    """Per token, but of a span all or none; 3,800 decisions: five standard deviations are at most 0.033."""
    example = text([1, 2, 1, 3] * 30)
    ids, words = (np.tile(part, 700) for part in example)
    lengths = np.full(700, len(example[0]))
    hide = masking(scheme=scheme)
    seen, labels = hide.hide(ids, lengths, draws(hide.numbers, len(ids)), words)
    chosen = labels != IGNORED_LABEL
    assert abs(chosen.sum() / len(ids) - 0.15) < 0.003
    kind = np.select([~chosen, seen == MASK, seen == ids], [-1, 0, 1], 2)
    before = np.concatenate([[-1], kind[:-1]])
    decided = chosen & ((before < 0) if scheme == "span" else True)
    assert decided.sum() > 3800
    shares = np.bincount(kind[decided], minlength=3) / decided.sum()
    np.testing.assert_allclose(shares, [0.8, 0.1, 0.1], atol=0.033)
    inside = chosen & (before >= 0)
    if scheme == "span":  # 0.002 of the random words are the true one, or [MASK]
        assert (kind != before)[inside].mean() < 0.002
    elif scheme != "subword":
        assert 0.25 < (kind != before)[inside].mean() < 0.42  # 1 - 0.8^2 - 2 * 0.1^2 = 0.34


def test_other_shares():
    ids, _ = text([1] * 100)
    hide = masking(masked=0.85, replaced=0.0, mlm_probability=1.0)
    seen, labels = hide.hide(np.tile(ids, 50), np.full(50, len(ids)), draws(3, 50 * len(ids)))
    assert ((seen == MASK) | (seen == labels) | (labels < 0)).all()
    assert abs((seen[labels >= 0] == MASK).mean() - 0.85) < 0.026


def test_the_collator_draws_by_words():
    ids, words = text([2, 3, 1, 2], [4, 1, 1])
    examples = IndexedDataset([{"input_ids": ids, "word_ids": words}] * 50)
    features = [examples[index] for index in range(50)]
    arguments = {"vocab_size": VOCAB, "mask_token_id": MASK, "special_token_ids": (PAD, CLS, SEP)}
    for scheme in WORD_SCHEMES:
        collate = MaskingCollator(**arguments, scheme=scheme, mlm_probability=0.4)
        batch = collate(features)
        assert "word_ids" not in batch
        labels = batch["labels"].numpy().reshape(50, -1)
        for row in labels:
            for word in range(words.max() + 1):
                _whole(row[words == word] >= 0)
        assert len({tuple(row) for row in labels}) > 10, "each example its own masks"
        again = collate(features[7:9])["labels"].numpy().reshape(2, -1)
        np.testing.assert_array_equal(again, labels[7:9])
        collate.set_epoch(1)
        assert (collate(features)["labels"].numpy().reshape(50, -1) != labels).any()
        with pytest.raises(ValueError, match=f"the features have no word_ids, which masks of the scheme {scheme} are"):
            collate([{"input_ids": ids, "example_index": 0}])
        with pytest.raises(ValueError, match=r"word_ids of feature 1 has shape \(2,\)"):
            collate([features[0], {**features[1], "word_ids": [0, 1]}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "word"}, "scheme is 'word', expected one of subword, whole_word"),
        ({"masked": 0.8, "replaced": 0.3}, r"masked is 0\.8 and replaced 0\.3"),
        ({"replaced": -0.1}, r"replaced -0\.1"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        masking(**options)


def test_the_ignored_label_is_that_of_the_losses():
    assert IGNORED_LABEL == losses.IGNORED_LABEL

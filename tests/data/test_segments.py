"""Segments against google-research's algorithm, written out with lists, and against its distribution."""

from itertools import chain, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from bert_fast.data.counters import Uniforms
from bert_fast.data.segments import Segment, full_sentences, pairs, truncated


class Texts:
    """Documents of sentences of given lengths; token i is the number i."""

    def __init__(self, sizes):
        ends = np.concatenate([[0], np.cumsum([size for document in sizes for size in document])]).astype(np.int64)
        counts = np.cumsum([0, *map(len, sizes)])
        self.bounds = [ends[first : last + 1] for first, last in pairwise(counts)]
        self.lists = [[list(range(a, b)) for a, b in pairwise(d)] for d in self.bounds]

    def __len__(self):
        return len(self.bounds)

    def sentences(self, index):
        return self.bounds[index]


def by_the_book(documents, index, draw, max_seq_length, short_seq_prob, objective):
    """(tokens of a, tokens of b, label) as create_pretraining_data.py makes them, one token at a time."""
    random, randint = (lambda: draw.take(1)[0]), draw.integer
    most = max_seq_length - 3
    target = randint(2, most) if random() < short_seq_prob else most
    document, chunk, place = documents[index], [], 0
    while place < len(document):
        chunk.append(document[place])
        if place == len(document) - 1 or sum(map(len, chunk)) >= target:
            a_end = randint(1, len(chunk) - 1) if len(chunk) > 1 else 1
            a, rest = (list(chain.from_iterable(part)) for part in (chunk[:a_end], chunk[a_end:]))
            label, b = 0, rest
            if len(chunk) == 1 or (objective == "nsp" and random() < 0.5):
                label, b = 1, []
                for _ in range(10):
                    other = randint(0, len(documents) - 1)
                    if other != index:
                        break
                for sentence in documents[other][randint(0, len(documents[other]) - 1) :]:
                    b = b + sentence
                    if len(b) >= target - len(a):
                        break
                place -= len(chunk) - a_end
            elif objective == "sop" and random() < 0.5:
                a, b, label = rest, a, 1
            while len(a) + len(b) > most:
                longer = a if len(a) > len(b) else b
                del longer[0 if random() < 0.5 else -1]
            yield a, b, label
            chunk = []
        place += 1


corpora = st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=12), min_size=1, max_size=5)
options = {"max_seq_length": st.integers(5, 40), "short_seq_prob": st.sampled_from([0.0, 0.1, 1.0])}


@settings(deadline=None, max_examples=300)
@given(corpora, st.sampled_from(["nsp", "sop"]), st.integers(0, 99), st.fixed_dictionaries(options))
def test_pairs_are_those_of_the_original_for_the_same_random_numbers(sizes, objective, seed, lengths):
    texts, draws = Texts(sizes), (Uniforms(seed), Uniforms(seed))
    for index in range(len(texts)):
        for draw in draws:
            draw.go_to(index, 3)
        expected = list(by_the_book(texts.lists, index, draws[0], **lengths, objective=objective))
        made = list(pairs(texts, index, draws[1], **lengths, objective=objective))
        assert [(list(range(*pair.a)), list(range(*pair.b)), pair.label) for pair in made] == expected
        assert all(min(pair.a.size, pair.b.size) >= 1 for pair in made)
        assert all(pair.a.size + pair.b.size + 3 <= lengths["max_seq_length"] for pair in made)


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=4), st.integers(0, 99), st.integers(5, 20))
def test_every_sentence_of_a_document_is_used_once(counts, seed, max_seq_length):
    """Sentences of one token, so that nothing is ever cut; what follows a random segment was put back."""
    texts, draw = Texts([[1] * count for count in counts]), Uniforms(seed)
    for index, bounds in enumerate(texts.bounds):
        used = []
        for pair in pairs(texts, index, draw, max_seq_length=max_seq_length, short_seq_prob=0.1, objective="nsp"):
            used += range(*pair.a)
            used += range(*pair.b) if pair.label == 0 else ()
        assert used == list(range(bounds[0], bounds[-1]))


@settings(deadline=None)
@given(corpora, st.integers(0, 99), st.fixed_dictionaries(options))
def test_full_sentences_lose_nothing_and_cut_only_what_is_too_long(sizes, seed, lengths):
    texts, draw = Texts(sizes), Uniforms(seed)
    room = lengths["max_seq_length"] - 2
    for index, bounds in enumerate(texts.bounds):
        made = list(full_sentences(texts, index, draw, **lengths))
        assert [token for part in made for token in range(*part)] == list(range(bounds[0], bounds[-1]))
        assert all(1 <= part.size <= room for part in made)
        longest = max(sizes[index])
        for part in made:
            assert part.stop in bounds or (longest > room and part.size == room)
        if lengths["short_seq_prob"] == 0:
            following = bounds[np.searchsorted(bounds, [part.stop for part in made[:-1]], side="right")]
            assert all(stop - part.start > room for part, stop in zip(made, following, strict=False))


def test_the_shares_of_labels_and_random_segments():
    texts = Texts([[10] * 10, [10] * 7, [10] * 7, [10] * 7])
    draw, labels, others, starts = Uniforms(1), np.zeros(2), np.zeros(4), np.zeros(7)
    for group in range(4000):
        draw.go_to(0, group)
        pair = next(pairs(texts, 0, draw, max_seq_length=300, short_seq_prob=0, objective="nsp"))
        labels[pair.label] += 1
        if pair.label:
            owner = next(index for index, bounds in enumerate(texts.bounds) if bounds[0] <= pair.b.start < bounds[-1])
            others[owner] += 1
            starts[(pair.b.start - texts.bounds[owner][0]) // 10] += 1
    assert chisquare(labels).pvalue > 1e-3
    assert others[0] == 0, "never the document itself"
    assert chisquare(others[1:]).pvalue > 1e-3
    assert chisquare(starts).pvalue > 1e-3


def test_where_a_chunk_is_cut():
    """After one to n - 1 of its sentences, all alike."""
    texts, draw, counts = Texts([[1] * 10, [1]]), Uniforms(2), np.zeros(9)
    for group in range(3000):
        draw.go_to(0, group)
        pair = next(pairs(texts, 0, draw, max_seq_length=64, short_seq_prob=0, objective="nsp"))
        counts[pair.a.size - 1] += 1
    assert chisquare(counts).pvalue > 1e-3


def test_short_lengths_are_drawn_for_a_tenth_of_the_documents():
    texts, draw, targets = Texts([[1] * 40]), Uniforms(3), []
    for group in range(5000):
        draw.go_to(0, group)
        targets.append(next(full_sentences(texts, 0, draw, max_seq_length=22, short_seq_prob=0.1)).size)
    shorter = np.bincount(targets, minlength=21)[2:20]  # 2 to 19; 20 is the full length, and a random one of it
    expected = 5000 * 0.1 * 18 / 19
    assert abs(shorter.sum() - expected) < 5 * expected**0.5
    assert chisquare(shorter).pvalue > 1e-3


@given(st.integers(1, 40), st.integers(1, 40), st.integers(2, 50), st.integers(0, 99))
def test_truncation(size_a, size_b, room, seed):
    a, b = truncated(Segment(0, size_a), Segment(100, 100 + size_b), room, Uniforms(seed))
    assert a.size + b.size == min(size_a + size_b, room)
    assert min(a.size, b.size) >= min(size_a, size_b, room // 2)
    assert 0 <= a.start < a.stop <= size_a
    assert 100 <= b.start < b.stop <= 100 + size_b
    if size_a + size_b <= room:
        assert (a, b) == (Segment(0, size_a), Segment(100, 100 + size_b))


def test_both_ends_are_cut_alike():
    fronts = [truncated(Segment(0, 1), Segment(0, 1001), 2, Uniforms(seed))[1].start for seed in range(20)]
    assert abs(np.mean(fronts) - 500) < 5 * (1000 / 4 / 20) ** 0.5
    assert len(set(fronts)) > 10


def test_one_document_and_its_only_sentence():
    """The original draws ten times, then takes the document itself."""
    texts, draw = Texts([[5]]), Uniforms(0)
    made = list(pairs(texts, 0, draw, max_seq_length=32, short_seq_prob=0, objective="nsp"))
    assert made == [(Segment(0, 5), Segment(0, 5), 1)]


@pytest.mark.parametrize("count", [1, 3, 1000])
def test_numbers_come_from_their_place_alone(count):
    draw, other = Uniforms(5, 6), Uniforms(5, 6)
    draw.go_to(7, 8)
    first = draw.take(count)
    other.go_to(1, 2)
    other.take(99)
    other.go_to(7, 8)
    np.testing.assert_array_equal(np.concatenate([other.take(1) for _ in range(count)]), first)
    assert ((first >= 0) & (first < 1)).all()
    for place in ((7, 9), (8, 8)):
        other.go_to(*place)
        assert not np.isin(other.take(count), first).any()

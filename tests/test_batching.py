"""Chunks, the thread that works ahead, and batches by tokens."""

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bert_fast.batching import MAX_CHUNK_CHARACTERS, MAX_CHUNK_TEXTS, RowBuffer, chunks, map_ahead, plan_batches


def workers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("bert_fast")]


def test_chunks_are_bounded_in_number():
    texts = [str(i) for i in range(20_000)]
    sizes = [len(chunk) for chunk in chunks(texts)]
    assert sizes == [64, 256, 1024, 4096, 4096, 4096, 4096, 2272]
    assert max(sizes) == MAX_CHUNK_TEXTS
    assert [text for chunk in chunks(iter(texts)) for text in chunk] == texts
    assert list(chunks([])) == []


def test_chunks_are_bounded_in_characters():
    long = "x" * (MAX_CHUNK_CHARACTERS // 2)
    assert [len(chunk) for chunk in chunks([long] * 5)] == [2, 2, 1]
    assert [len(chunk) for chunk in chunks(["a", long * 8, "b"])] == [2, 1]


def test_what_is_not_a_text_is_named_by_its_index_among_all():
    with pytest.raises(ValueError, match=r"sentences\[5000\] is a bytes, expected a str"):
        list(chunks([*["a"] * 5000, b"a"]))


def test_the_thread_works_ahead_of_the_consumer():
    second = threading.Event()

    def function(item):
        if item == 1:
            second.set()
        return item, threading.current_thread().name

    results = map_ahead(function, iter(range(4)))
    item, name = next(results)
    assert (item, name[:9]) == (0, "bert_fast")
    assert second.wait(30), "nothing was computed while the consumer had the first result"
    assert [item for item, _ in results] == [1, 2, 3]
    assert workers() == []


def test_items_are_read_in_the_callers_thread_two_ahead_at_most():
    read = []

    def items():
        for i in range(9):
            read.append(threading.current_thread())
            yield i

    for done, item in enumerate(map_ahead(str, items()), 1):
        assert item == str(done - 1)
        assert len(read) <= done + 1
    assert set(read) == {threading.current_thread()}


@pytest.mark.parametrize("items", [[], [7]])
def test_no_thread_for_one_item(items):
    names = list(map_ahead(lambda _: threading.current_thread(), iter(items)))
    assert names == [threading.current_thread()] * len(items)


def test_the_thread_ends_when_the_consumer_stops():
    results = map_ahead(str, iter(range(9)))
    next(results)
    assert len(workers()) == 1
    results.close()
    assert workers() == []


def test_errors_surface_and_end_the_thread():
    def fails_at_two(item):
        return 1 // (item - 2)

    seen = []
    with pytest.raises(ZeroDivisionError):
        seen.extend(map_ahead(fails_at_two, iter(range(9))))
    assert workers() == []

    def items():
        yield from range(3)
        raise OSError("the source is gone")

    with pytest.raises(OSError, match="the source is gone"):
        list(map_ahead(str, items()))
    assert workers() == []


@given(st.lists(st.integers(2, 300), max_size=200), st.integers(1, 2000))
def test_batches_hold_every_text_once_within_the_budget(lengths, budget):
    lengths = np.array(lengths, dtype=np.int64)
    batches = plan_batches(lengths, budget)
    order = np.concatenate(batches)
    assert sorted(order) == list(range(len(lengths)))
    if len(batches) == 1:
        assert list(order) == list(range(len(lengths)))
        return
    assert (np.diff(lengths[order]) <= 0).all(), "longest first"
    assert all(0 < lengths[batch].sum() < budget + lengths[batch].max() for batch in batches)
    assert len(batches) <= -(-lengths.sum() // budget)


def test_batches_are_evenly_filled():
    lengths = np.full(100, 10)
    assert [len(batch) for batch in plan_batches(lengths, 900)] == [50, 50]


@pytest.mark.parametrize("expected", [0, 3, 1000])
def test_rows_are_collected_whatever_was_expected(expected):
    rows, buffer = np.random.default_rng(0).random((50, 4), dtype=np.float32), RowBuffer(expected, 4)
    for start in range(0, 50, 7):
        buffer.append(rows[start : start + 7])
    assert len(buffer) == 50
    assert np.array_equal(buffer.array(), rows)
    assert RowBuffer(expected, 4).array().shape == (0, 4)

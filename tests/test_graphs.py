"""Buckets of sizes, and the cache of what was recorded: as plain data, without a GPU."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from bert_fast import ops
from bert_fast.engine.graphs import (
    MAX_GRAPH_TOKENS,
    RECORD_AT,
    ROW_STEP,
    Bucket,
    GraphCache,
    Graphs,
    graph_tokens,
)

SIZES = {"num_tokens": st.integers(0, 20000), "batch_size": st.integers(0, 5000), "max_seqlen": st.integers(0, 9000)}


@given(**SIZES)
def test_a_bucket_holds_its_batch_and_wastes_little(num_tokens, batch_size, max_seqlen):
    bucket = Bucket.rounded(num_tokens, batch_size, max_seqlen)
    assert all(size >= wanted for size, wanted in zip(bucket, (num_tokens, batch_size, max_seqlen), strict=True))
    assert bucket.num_tokens % ROW_STEP == 0
    assert bucket.num_tokens - num_tokens < max(num_tokens / 8, ROW_STEP + 1)
    assert bucket.batch_size < max(2 * batch_size, 2)
    assert bucket.max_seqlen < max(2 * max_seqlen, 65)
    exact = Bucket.exact(num_tokens, batch_size, max_seqlen)
    assert exact.num_tokens % ROW_STEP == 0
    assert num_tokens <= exact.num_tokens <= bucket.num_tokens
    assert exact[1:] == (batch_size, max_seqlen)


@given(**SIZES)
def test_a_bucket_is_its_own(num_tokens, batch_size, max_seqlen):
    bucket = Bucket.rounded(num_tokens, batch_size, max_seqlen)
    assert Bucket.rounded(*bucket) == bucket


def test_buckets_rise_and_are_few():
    buckets = [Bucket.rounded(n, 1, 1).num_tokens for n in range(1, 4097)]
    assert buckets == sorted(buckets)
    assert len(set(buckets)) == 8 + 8 * 5  # to 128 in steps of 16, then eight in each of five octaves


def test_more_layers_do_not_change_what_graphs_are_for_and_wider_ones_do():
    sizes = [graph_tokens(hidden_size, 4 * hidden_size) for hidden_size in (128, 384, 768, 1024)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == MAX_GRAPH_TOKENS
    assert 3000 < sizes[2] < 3500
    assert graph_tokens(0, 0) == MAX_GRAPH_TOKENS


class CacheMachine(RuleBasedStateMachine):
    """Against a list of keys, the last used at its end."""

    def __init__(self):
        super().__init__()
        self.cache = GraphCache(capacity=3, counted=4)
        self.order = []

    @rule(key=st.integers(0, 6))
    def get(self, key):
        found = self.cache.get(key)
        assert (found == f"graph {key}") is (key in self.order)
        if found:
            self.order.remove(key)
            self.order.append(key)

    @rule(key=st.integers(0, 6))
    def put(self, key):
        if key not in self.order:
            self.cache.put(key, f"graph {key}")
            self.order = [*self.order, key][-3:]

    @rule()
    def clear(self):
        self.cache.clear()
        self.order = []

    @invariant()
    def bounded(self):
        assert len(self.cache) == len(self.order) <= 3


TestCache = CacheMachine.TestCase


def test_a_key_is_due_when_it_comes_again():
    cache = GraphCache(capacity=2, counted=3)
    uses = [cache.is_due("a") for _ in range(RECORD_AT)]
    assert uses == [False] * (RECORD_AT - 1) + [True]
    for key in "bcd":
        assert not cache.is_due(key)
    assert not cache.is_due("a"), "it was forgotten among so many others"


class Rerun:
    """Records by keeping the function: a replay runs it again, into the same result."""

    def __init__(self):
        self.begun = self.ended = self.renewed = 0

    def record(self, run):
        result = run()
        return lambda: result.copy_(run()), result

    def begin(self):
        self.begun += 1

    def end(self):
        self.ended += 1

    def wait(self):
        assert self.begun == self.ended, "a replay is under way"

    def renew(self):
        self.renewed += 1


def doubling(recorder):
    """Graphs of: twice the input."""
    return Graphs(recorder, make_inputs=lambda size: torch.zeros(size), forward=lambda size, inputs: inputs * 2)


def test_a_forward_is_replayed_from_its_second_use_on():
    recorder = Rerun()
    graphs = doubling(recorder)
    for use in range(4):
        result = graphs.run(3, lambda inputs, use=use: inputs.fill_(use), torch.clone)
        if use + 1 < RECORD_AT:
            assert result is None
        else:
            assert result.tolist() == [2.0 * use] * 3
    assert recorder.begun == recorder.ended == 4 - (RECORD_AT - 1)
    graphs.clear()
    assert recorder.renewed == 1
    results = [graphs.run(3, lambda inputs: inputs.fill_(1), torch.clone) for _ in range(RECORD_AT)]
    assert [result is None for result in results] == [True] * (RECORD_AT - 1) + [False]


def test_an_error_while_filling_ends_the_replay():
    recorder = Rerun()
    graphs = doubling(recorder)

    def fail(inputs):
        raise ValueError("no ids")

    assert graphs.run(3, fail, torch.clone) is None
    with pytest.raises(ValueError, match="no ids"):
        graphs.run(3, fail, torch.clone)
    assert recorder.begun == recorder.ended == 1
    assert graphs.run(3, lambda inputs: inputs.fill_(1), torch.clone).tolist() == [2.0] * 3


def test_what_cannot_be_recorded_runs_eagerly_and_says_why_once(recwarn):
    class Refusing(Rerun):
        def record(self, run):
            try:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee documentation")
            finally:
                raise RuntimeError("the capture was invalidated")  # what ending it raises then

    recorder = Refusing()
    graphs = doubling(recorder)
    assert [graphs.run(3, lambda inputs: None, torch.clone) for _ in range(5)] == [None] * 5
    (warning,) = [w for w in recwarn if w.category is ops.FallbackWarning]
    assert str(warning.message) == (
        "bert_fast: CUDA graphs are off, every kernel is launched by itself: "
        "CUDA out of memory. Tried to allocate 2 GiB."
    )
    assert recorder.begun == recorder.ended == 1, "what ran until it failed was in the memory of the others"


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 1000))
def test_threads_get_their_own_results(seed):
    graphs = doubling(Rerun())
    wrong = []

    def work(thread):
        for turn in range(50):
            value, size = float(seed + thread * 100 + turn), 1 + (thread + turn) % 5
            result = graphs.run(size, lambda inputs, value=value: inputs.fill_(value), torch.clone)
            if result is not None and result.tolist() != [2 * value] * size:
                wrong.append((thread, turn))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert not wrong

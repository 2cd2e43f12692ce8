"""Windows against transformers' fast tokenizer, the search against Google's loop written a second time, and scores."""

import collections
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bert_fast import BertConfig
from bert_fast.data.examples import Answer, QuestionExample, TextExample
from bert_fast.modules import BertForQuestionAnswering
from bert_fast.tasks._batches import PaddingCollator
from bert_fast.tasks._spans import Window, best_spans, max_context, null_span, window_bounds
from bert_fast.tasks.question_answering import QuestionAnswering
from bert_fast.tokenization import Tokenizer
from bert_fast.training.batches import PackingCollator

CONTEXT = (
    "The lighthouse at Källa was built in 1884 by Ida Brandt, who had never seen the sea. Its lamp burned fish oil "
    "until 1921; since then it is electric. In stormy nights, the keepers' children slept in the tower (all 9 of them)."
)
WORDS = re.findall(
    r"\w+", "the at was built in by who had never seen sea its lamp burned fish oil until since then electric"
)
PIECES = ["light", "##house", "kal", "##la", "ida", "brand", "##t", "storm", "##y", "night", "##s", "keepers", "tower"]
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *PIECES, *".,;()'", *map(str, range(10)), "##8", "##84"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.txt").write_text("\n".join([*VOCAB, "1884", "1921", "when", "?"]), encoding="utf-8")
    return Tokenizer.from_pretrained(folder)


def question(text="When was the lighthouse built?", answer="1884", context=CONTEXT, id="q", **others):
    answers = (Answer(answer, context.index(answer)),) if answer else ()
    return QuestionExample(id, text, context, answers, **others)


def small(**options):
    sizes = {"max_seq_length": 24, "doc_stride": 6, "max_query_length": 10, "max_answer_length": 5, "n_best_size": 4}
    return QuestionAnswering(**{**sizes, **options})


# ---- features


@settings(max_examples=60, deadline=None)
@given(st.integers(14, 70), st.integers(1, 80), st.integers(1, 12))
def test_windows_as_the_fast_tokenizer_of_transformers(tokenizer, max_seq_length, doc_stride, max_query_length):
    """Which counts the tokens that windows share, and takes no more than all but one of them."""
    transformers = pytest.importorskip("transformers")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend)
    max_query_length = min(max_query_length, max_seq_length - 4)
    options = {"max_seq_length": max_seq_length, "max_query_length": max_query_length}
    task = QuestionAnswering(**options, doc_stride=doc_stride)
    example = question("when was the tower built")
    got = task.features([example], tokenizer, labelled=False)
    words = example.question.split()[:max_query_length]  # each is one token
    room = max_seq_length - 3 - len(words)
    expected = fast(
        " ".join(words),
        CONTEXT,
        max_length=max_seq_length,
        truncation="only_second",
        stride=room - min(doc_stride, room),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_token_type_ids=True,
    )
    assert [feature["input_ids"].tolist() for feature in got.inputs] == expected["input_ids"]
    assert [feature["token_type_ids"].tolist() for feature in got.inputs] == expected["token_type_ids"]
    for number, (window, offsets) in enumerate(zip(got.extras, expected["offset_mapping"], strict=True)):
        inside = [owner == 1 for owner in expected.sequence_ids(number)]
        assert window.column == inside.index(True)
        assert window.offsets.tolist() == [list(pair) for pair, there in zip(offsets, inside, strict=True) if there]
    assert got.num_truncated == (len(words) < 5)


@pytest.mark.parametrize(
    ("num_tokens", "room", "stride", "bounds"),
    [
        (5, 5, 2, [(0, 5)]),
        (6, 5, 2, [(0, 5), (2, 6)]),
        (12, 5, 9, [(0, 5), (5, 10), (10, 12)]),  # a stride past the window leaves nothing out
        (0, 5, 2, [(0, 0)]),
    ],
)
def test_window_bounds(num_tokens, room, stride, bounds):
    assert window_bounds(num_tokens, room, stride) == bounds


def test_targets_are_where_the_answer_is(tokenizer):
    features = small().features([question(), question(answer="Ida Brandt", id="r")], tokenizer, labelled=True)
    found = collections.defaultdict(set)
    for owner, feature, window in zip(features.owners, features.inputs, features.extras, strict=True):
        start, end = feature["start_positions"], feature["end_positions"]
        if (start, end) == (0, 0):
            continue
        first, last = window.offsets[start - window.column], window.offsets[end - window.column]
        found[int(owner)].add(CONTEXT[first[0] : last[1]])
    assert found == {0: {"1884"}, 1: {"Ida Brandt"}}
    whole = [window for window in features.extras if window.offsets[0, 0] <= 39 and window.offsets[-1, 1] >= 55]
    assert sum(feature["start_positions"] > 0 for feature in features.inputs) >= 2
    assert len(features.inputs) > len(whole)  # the others point to [CLS]


def test_an_answer_within_a_word_takes_the_word(tokenizer):
    features = QuestionAnswering().features([question(answer="house")], tokenizer, labelled=True)
    (feature,), (window,) = features.inputs, features.extras
    place = slice(feature["start_positions"] - window.column, feature["end_positions"] - window.column + 1)
    assert [CONTEXT[a:b] for a, b in window.offsets[place]] == ["house"]
    assert [CONTEXT[a:b] for a, b in window.offsets[:7]] == ["The", "light", "house", "at", "Käl", "la", "was"]


def test_a_context_without_tokens_and_one_without_an_answer(tokenizer):
    task = small(version_2_with_negative=True)
    examples = [
        question(context="", answer=None, is_impossible=True),
        question(answer=None, is_impossible=True, id="r"),
    ]
    features = task.features(examples, tokenizer, labelled=True)
    assert len(features.extras[0].offsets) == 0
    assert {(f["start_positions"], f["end_positions"]) for f in features.inputs} == {(0, 0)}
    logits = [(np.zeros(len(f["input_ids"]), np.float32),) * 2 for f in features.inputs]
    assert task.predictions(examples, features, logits)[0]["answer"] == ""
    assert small().predictions(examples[:1], small().features(examples[:1], tokenizer, labelled=False), logits[:1]) == [
        {"id": "q", "answer": "", "start": None, "end": None, "score": 0.0, "n_best": []}
    ]


# ---- the search


def google(context, windows, outputs, n_best, longest, version_2, threshold):
    """run_squad.py's write_predictions, its loops kept; characters in place of its words."""
    spans = [(window.first, len(window.offsets)) for window in windows]

    def is_max_context(number, position):
        best_score, best = None, None
        for index, (start, length) in enumerate(spans):
            end = start + length - 1
            if position < start or position > end:
                continue
            score = min(position - start, end - position) + 0.01 * length
            if best_score is None or score > best_score:
                best_score, best = score, index
        return number == best

    def best_indexes(logits):
        return [i for i, _ in sorted(enumerate(logits), key=lambda pair: pair[1], reverse=True)][:n_best]

    prelim, score_null = [], 1000000
    for number, (window, (start_logits, end_logits)) in enumerate(zip(windows, outputs, strict=True)):
        start_logits, end_logits = start_logits.tolist(), end_logits.tolist()
        if version_2 and start_logits[0] + end_logits[0] < score_null:
            score_null, null = start_logits[0] + end_logits[0], (start_logits[0], end_logits[0])
        there = range(window.column, window.column + len(window.offsets))
        for start in best_indexes(start_logits):
            for end in best_indexes(end_logits):
                if start not in there or end not in there:
                    continue
                if not is_max_context(number, window.first + start - window.column):
                    continue
                if end < start or end - start + 1 > longest:
                    continue
                begin, stop = window.offsets[start - window.column][0], window.offsets[end - window.column][1]
                prelim.append((context[begin:stop], int(begin), start_logits[start], end_logits[end]))
    if version_2:
        prelim.append(("", None, *null))
    prelim = sorted(prelim, key=lambda entry: entry[2] + entry[3], reverse=True)
    nbest, seen = [], set()
    for entry in prelim:
        if len(nbest) >= n_best:
            break
        if entry[0] in seen:
            continue
        seen.add(entry[0])
        nbest.append(entry)
    if version_2 and "" not in seen:
        nbest.append(("", None, *null))
    if not version_2:
        return nbest, None, nbest[0][0] if nbest else ""
    best = next((entry for entry in nbest if entry[0]), ("", None, 0.0, 0.0))
    difference = score_null - best[2] - best[3]
    return nbest, difference, "" if difference > threshold else best[0]


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(15, 40),
    st.integers(1, 20),
    st.integers(1, 12),
    st.integers(1, 9),
    st.booleans(),
    st.floats(-3, 3),
)
def test_predictions_as_googles(tokenizer, seed, max_seq_length, stride, n_best, longest, version_2, threshold):
    draw = np.random.default_rng(seed)
    options = {"max_seq_length": max_seq_length, "doc_stride": stride, "n_best_size": n_best}
    options |= {"max_answer_length": longest, "version_2_with_negative": version_2}
    task = small(**options, null_score_diff_threshold=threshold)
    context = " ".join(CONTEXT.split()[: draw.integers(1, 40)])  # names come twice: different spans of one text
    examples = [question(context=f"{context} {context}", answer=None), question(answer=None, id="r")]
    features = task.features(examples, tokenizer, labelled=False)
    outputs = [
        tuple(draw.normal(size=(2, len(feature["input_ids"]))).round(1).astype(np.float32))  # rounded: some are equal
        for feature in features.inputs
    ]
    got = task.predictions(examples, features, outputs)
    for number, (example, prediction) in enumerate(zip(examples, got, strict=True)):
        mine = features.owners == number
        windows = [window for window, own in zip(features.extras, mine, strict=True) if own]
        logits = [output for output, own in zip(outputs, mine, strict=True) if own]
        nbest, difference, answer = google(example.context, windows, logits, n_best, longest, version_2, threshold)
        names = ("answer", "start", "start_logit", "end_logit")
        assert [tuple(entry[name] for name in names) for entry in prediction["n_best"]] == nbest
        assert prediction["answer"] == answer
        assert prediction["id"] == example.id
        if version_2:
            assert prediction["null_score"] == pytest.approx(difference)
        if prediction["start"] is not None:
            assert example.context[prediction["start"] : prediction["end"]] == answer
        if nbest:
            total = sum(math.exp(entry[2] + entry[3]) for entry in nbest)
            scores = [math.exp(entry[2] + entry[3]) / total for entry in nbest]
            assert [entry["score"] for entry in prediction["n_best"]] == pytest.approx(scores)


def test_each_token_has_its_max_context_once():
    """The example of Google's comment: "bought" is at the edge of the second of three windows."""
    bought = 7  # the man went to the store and bought a gallon of milk
    windows = [Window(0, first, np.zeros((5, 2), np.int64)) for first in (0, 3, 6)]
    said = max_context(windows)
    assert [bool(said[n][bought - first]) for n, first in ((1, 3), (2, 6))] == [False, True]
    covered = np.zeros(11, int)
    for window, own in zip(windows, said, strict=True):
        covered[window.first : window.first + 5] += own
    assert covered.tolist() == [1] * 11


def test_a_likely_start_at_the_edge_of_its_window_does_not_count():
    offsets = np.array([[i, i + 1] for i in range(6)])
    windows = [Window(1, 0, offsets[:4]), Window(1, 2, offsets[2:])]
    start = [np.full(6, -9, np.float32), np.full(6, -9, np.float32)]
    start[0][4] = 5.0  # "d" as the last token of the first window, with more around it in the second
    start[1][2] = 1.0
    spans = best_spans("abcdef", windows, [(s, s) for s in start], n_best_size=3, max_answer_length=2)
    assert (spans[0].text("abcdef"), spans[0].score) == ("d", 2.0)
    assert null_span([(s, s) for s in start]).score == -18


# ---- the whole of it


def test_scores_and_bad_ids():
    task = small(version_2_with_negative=True)
    examples = [question(), question(id="r", answer=None, is_impossible=True), question(id="s", answer=None)]
    said = [
        {"id": "q", "answer": "in 1884", "best_answer": "in 1884", "null_score": -2.0},
        {"id": "r", "answer": "the sea", "best_answer": "the sea", "null_score": -1.0},
        {"id": "s", "answer": "nobody knows", "best_answer": "", "null_score": 0.0},
    ]
    scores = task.metrics(examples, said)  # "s" is in no score: nobody says whether it has an answer
    third = 2 / 3
    assert scores == pytest.approx(
        {
            "exact_match": 0.0,
            "f1": third / 2,
            "HasAns_exact": 0.0,
            "HasAns_f1": third,
            "NoAns_exact": 0.0,
            "NoAns_f1": 0,
        }
        | {"best_exact": 0.5, "best_exact_thresh": -3.0, "best_f1": (1 + third) / 2, "best_f1_thresh": -2.0}
    )
    assert small().metrics(examples[:1], []) == {"exact_match": 0.0, "f1": 0.0}
    with pytest.raises(ValueError, match="there are two predictions with the id 'q'"):
        task.metrics(examples, [said[0], *said])
    with pytest.raises(ValueError, match="there are two questions with the id 'q'"):
        task.metrics([*examples, examples[0]], said)
    with pytest.raises(ValueError, match="a prediction is for 't', which is none of the 2 questions"):
        task.metrics(examples, [*said, {"id": "t", "answer": ""}])


def test_an_answer_without_a_place_is_scored_but_not_learnt(tokenizer):
    """Of what is not in its context: the text counts, as in SQuAD's script, and the loss leaves its windows out."""
    task = small()
    placed = question(id="p")
    lost = QuestionExample("q", "where?", placed.context, (Answer("Paris", -1), Answer("the sea", -1)))
    both = QuestionExample("r", placed.question, placed.context, (Answer("Paris", -1), *placed.answers))
    features = task.features([placed, lost, both], tokenizer, labelled=True)
    targets = [[f for f, owner in zip(features.inputs, features.owners, strict=True) if owner == n] for n in range(3)]
    places = [[(f["start_positions"], f["end_positions"]) for f in own] for own in targets]
    assert places[1] == [(len(f["input_ids"]),) * 2 for f in targets[1]]
    assert places[2] == places[0] != places[1]
    outputs = [(np.zeros(len(f["input_ids"]), np.float32),) * 2 for f in features.inputs]
    expected = np.mean([np.log(len(f["input_ids"])) for f in targets[0] + targets[2]])
    assert task.mean_loss(features, outputs) == pytest.approx(expected)
    only = task.features([lost], tokenizer, labelled=True)
    assert task.mean_loss(only, [(np.zeros(len(f["input_ids"]), np.float32),) * 2 for f in only.inputs]) is None
    said = [{"id": id, "answer": "The sea!"} for id in "pqr"]
    assert task.metrics([lost], said[1:2]) == {"exact_match": 1.0, "f1": 1.0}
    with pytest.raises(ValueError, match="the answer 'Paris' to question q is not at character -1"):
        task.learn([lost])


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (TextExample("7", "x", label="y"), "example 7 is a TextExample, expected a QuestionExample"),
        (question(answer=None), "question q has no answer, and is not said to have none"),
        (question(answer=None, is_impossible=True), "question q has no answer: set version_2_with_negative"),
        (
            QuestionExample("q", "?", "the sea", (Answer("sea", 3),)),
            "the answer 'sea' to question q is not at character 3 of its context, which has ' se' there",
        ),
        (QuestionExample("q", "?", "the sea", (Answer("a", -1),)), "is not at character -1"),
        (QuestionExample("q", "?", "the sea", (Answer(" ", 3),)), "the answer ' ' to question q"),
    ],
)
def test_examples_that_cannot_be_learnt(example, message):
    with pytest.raises(ValueError, match=message):
        small().learn([example])


def test_bad_options_and_answers(tokenizer):
    with pytest.raises(ValueError, match="there are no examples"):
        small().learn([])
    with pytest.raises(ValueError, match="doc_stride is 0, expected at least 1"):
        QuestionAnswering(doc_stride=0)
    with pytest.raises(ValueError, match="max_seq_length is 67, which leaves no room for a context beside a question"):
        QuestionAnswering(max_seq_length=67).features([question()], tokenizer, labelled=False)
    nothing = QuestionExample("q", "?", "the \u0007 sea", (Answer("\u0007", 4),))
    with pytest.raises(ValueError, match=r"the answer '\\x07' to question q has no token"):
        small().features([nothing], tokenizer, labelled=True)


def test_packed_and_padded_say_the_same(tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=tokenizer.vocab_size, max_position_embeddings=24, **sizes)
    model, task = BertForQuestionAnswering(config).eval(), small()
    features = task.features([question(), question("who?", "Ida Brandt", id="r")], tokenizer, labelled=False)
    with torch.no_grad():
        packed = task.outputs(model, task.collator(config)(features.inputs))
        padded = task.outputs(model, PaddingCollator(0)(features.inputs))
        alone = [task.outputs(model, PackingCollator()([feature]))[0] for feature in features.inputs]
    for said in (packed, padded):
        for got, expected in zip(said, alone, strict=True):
            for logits, wanted in zip(got, expected, strict=True):
                np.testing.assert_allclose(logits, wanted, rtol=1e-5, atol=1e-6)
    labelled = task.features([question(), question("who?", "Ida Brandt", id="r")], tokenizer, labelled=True)
    losses = [model(**collate(labelled.inputs)).loss for collate in (task.collator(config), PaddingCollator(0))]
    torch.testing.assert_close(losses[0], losses[1])

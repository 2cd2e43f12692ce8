"""The laws of the token-budget sampler, and what the packing collator gives a model."""

import json

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from bert_fast import BertConfig, accelerate
from bert_fast.modules import (
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)
from bert_fast.training.batches import PackingCollator, TokenBudgetSampler

LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=80)
OPTIONS = st.fixed_dictionaries(
    {
        "max_tokens": st.integers(40, 150),
        "seed": st.integers(0, 3),
        "shuffle": st.booleans(),
        "max_sequences": st.none() | st.integers(1, 9),
    }
)


def mix(num_texts):
    """Lengths as in performance.md's mix: log-normal, median 32, sigma 0.8, cut at 256."""
    lengths = np.random.default_rng(0).lognormal(np.log(32), 0.8, num_texts)
    return lengths.round().clip(1, 256).astype(int)


def of_all_ranks(lengths, num_replicas, **options):
    """[rank][batch][text]."""
    ranks = range(num_replicas)
    samplers = [TokenBudgetSampler(lengths, num_replicas=num_replicas, rank=rank, **options) for rank in ranks]
    shares = [list(sampler) for sampler in samplers]
    assert [len(sampler) for sampler in samplers] == [len(share) for share in shares]
    return shares


def texts(shares):
    return sorted(text for share in shares for batch in share for text in batch)


def cannot_share(lengths, num_replicas, **options):
    """Whether even batches of one text would not come out even."""
    if len(lengths) < num_replicas:
        return True
    alone = len(TokenBudgetSampler(lengths, **options))
    return -(-alone // num_replicas) * num_replicas > len(lengths)


@settings(deadline=None)
@given(LENGTHS, OPTIONS, st.integers(1, 5))
def test_every_text_once_in_batches_within_the_budget(lengths, options, num_replicas):
    if cannot_share(lengths, num_replicas, **options):
        with pytest.raises(ValueError, match="replicas"):
            of_all_ranks(lengths, num_replicas, **options)
        return
    shares = of_all_ranks(lengths, num_replicas, **options)
    assert texts(shares) == list(range(len(lengths)))
    assert len({len(share) for share in shares}) == 1
    for batch in (batch for share in shares for batch in share):
        assert batch
        assert sum(lengths[text] for text in batch) <= options["max_tokens"]
        assert len(batch) <= (options["max_sequences"] or len(batch))


@settings(deadline=None)
@given(LENGTHS, OPTIONS, st.integers(1, 5))
def test_drop_last_leaves_out_less_than_a_step(lengths, options, num_replicas):
    assume(len(lengths) >= num_replicas)
    alone = len(TokenBudgetSampler(lengths, **options))
    shares = of_all_ranks(lengths, num_replicas, drop_last=True, **options)
    assert {len(share) for share in shares} == {alone // num_replicas}
    found = texts(shares)
    assert len(found) == len(set(found))


@settings(deadline=None)
@given(LENGTHS, OPTIONS, st.integers(1, 4), st.integers(0, 100), st.booleans())
def test_a_resumed_epoch_has_the_batches_that_were_to_come(lengths, options, num_replicas, done, drop_last):
    assume(not cannot_share(lengths, num_replicas, **options))
    options |= {"num_replicas": num_replicas, "rank": num_replicas - 1, "drop_last": drop_last}
    sampler = TokenBudgetSampler(lengths, **options)
    sampler.set_epoch(2)
    try:
        whole = list(sampler)
    except ValueError:  # the number of batches depends on the epoch
        assume(False)
    done = min(done, len(whole))
    sampler.advance(done)
    resumed = TokenBudgetSampler(lengths, **options)
    resumed.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    resumed.set_epoch(2)
    assert len(resumed) == len(whole) - done
    assert list(resumed) == list(sampler) == whole[done:]
    resumed.set_epoch(3)
    sampler.set_epoch(3)
    assert list(resumed) == list(sampler)


@settings(deadline=None)
@given(LENGTHS, OPTIONS, st.lists(st.tuples(st.integers(1, 4), st.integers(0, 5)), min_size=2, max_size=3))
def test_another_number_of_replicas_continues_the_epoch(lengths, options, runs):
    """Each run does some batches, then another number of processes takes over; the last one ends the epoch."""
    state, found = None, []
    for run, (num_replicas, done) in enumerate(runs):
        assume(len(lengths) >= num_replicas)
        samplers = [
            TokenBudgetSampler(lengths, num_replicas=num_replicas, rank=r, **options) for r in range(num_replicas)
        ]
        for sampler in samplers:
            if state is not None:
                sampler.load_state_dict(state)
            try:
                batches = list(sampler)
            except ValueError:  # too few texts are left for so many
                assume(False)
            batches = batches if run == len(runs) - 1 else batches[:done]
            sampler.advance(len(batches))
            found += [text for batch in batches for text in batch]
        state = samplers[0].state_dict()
    assert sorted(found) == list(range(len(lengths)))
    samplers[0].set_epoch(1)
    fresh = TokenBudgetSampler(lengths, num_replicas=num_replicas, **options)
    fresh.set_epoch(1)
    assert samplers[0].state_dict() == fresh.state_dict()


@pytest.mark.parametrize("max_tokens", [512, 2048, 8192])  # 2, 8 and 32 times the longest text
def test_batches_are_full_and_their_lengths_mixed(max_tokens):
    lengths = mix(20_000)
    batches = list(TokenBudgetSampler(lengths, max_tokens))
    assert max(lengths[batch].sum() for batch in batches) <= max_tokens
    assert lengths.sum() / (len(batches) * max_tokens) >= 0.97
    halves = [np.concatenate(half) for half in (batches[: len(batches) // 2], batches[len(batches) // 2 :])]
    early, late = (lengths[half].mean() for half in halves)
    assert abs(early - late) < 0.05 * lengths.mean()
    # Nearly as many texts longer and shorter than the median stand together as in batches cut from a shuffled list.
    long = lengths > np.median(lengths)
    parts = np.array([long[batch].mean() for batch in batches])
    size = np.mean([len(batch) for batch in batches])
    assert parts.std() < 2 * 0.5 / np.sqrt(size)


def test_order_depends_on_seed_and_epoch_alone():
    lengths = mix(500)

    def batches(seed, epoch):
        sampler = TokenBudgetSampler(lengths, 512, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    first = batches(0, 0)
    assert first == batches(0, 0)
    assert first != batches(0, 1)
    assert first != batches(1, 0)
    sampler = TokenBudgetSampler(lengths, 512)
    assert sampler.num_batches(1) == len(batches(0, 1))
    sampler.advance(3)
    sampler.set_epoch(0)
    assert sampler.start_batch == 3, "the present epoch stays where it is"
    sampler.set_epoch(1)
    assert list(sampler) == batches(0, 1)


def test_the_last_batches_are_split_evenly():
    """70 texts of one token: a step of four full batches, and six tokens for the four of the next."""
    shares = of_all_ranks([1] * 70, 4, max_tokens=16)
    assert sorted([len(batch) for batch in share] for share in shares) == [[16, 1], [16, 1], [16, 2], [16, 2]]


def test_unshuffled_batches_keep_the_order():
    lengths = mix(300)
    one, two = of_all_ranks(lengths, 2, max_tokens=512, shuffle=False)
    in_turn = [batch for pair in zip(one, two, strict=True) for batch in pair]
    assert [text for batch in in_turn for text in batch] == list(range(300))


def test_the_state_counts_what_was_trained_on_and_not_what_was_fetched():
    lengths = mix(200).tolist()
    sampler = TokenBudgetSampler(lengths, 512)
    whole = list(sampler)
    loader = DataLoader(range(200), batch_sampler=sampler, num_workers=2, prefetch_factor=3, collate_fn=list)
    for batch, expected in zip(loader, whole[:3], strict=False):
        assert batch == expected
        sampler.advance()
    resumed = TokenBudgetSampler(lengths, 512)
    resumed.load_state_dict(sampler.state_dict())
    assert list(DataLoader(range(200), batch_sampler=resumed, collate_fn=list)) == whole[3:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": [9] * 11}, r"num_texts was 10 and is 11; num_tokens was 90 and is 99; digest"),
        ({"lengths": [8, 10] * 5}, r"saved: digest_of_lengths was '\w+' and is"),
        ({"max_tokens": 31}, "max_tokens was 30 and is 31"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"shuffle": False}, "shuffle was True and is False"),
    ],
)
def test_changed_data_is_noticed_when_a_run_is_resumed(change, message):
    arguments = {"lengths": [9] * 10, "max_tokens": 30}
    state = TokenBudgetSampler(**arguments).state_dict()
    with pytest.raises(ValueError, match=message):
        TokenBudgetSampler(**(arguments | change)).load_state_dict(state)


def test_more_batches_than_there_are():
    sampler = TokenBudgetSampler([5, 5], 5)
    sampler.advance(2)
    with pytest.raises(ValueError, match="3 batches are done of the 2 of epoch 0; set_epoch"):
        sampler.advance()


def test_the_batches_of_a_seed_are_the_same_in_every_release():
    """A run may be resumed with another NumPy."""
    assert list(TokenBudgetSampler([4, 2, 3, 1, 5, 2], 7, seed=3)) == [[0, 1, 3], [2, 5], [4]]


def test_a_state_that_lacks_something():
    sampler = TokenBudgetSampler([1], 1)
    state = sampler.state_dict()
    del state["seed"]
    with pytest.raises(ValueError, match="lacks seed"):
        sampler.load_state_dict(state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": [3, 11]}, "text 1 has 11 tokens, expected at most max_tokens 10"),
        ({"lengths": [3, -1]}, "text 1 has -1 tokens"),
        ({"lengths": []}, "at least one"),
        ({"lengths": [1.5]}, "float64"),
        ({"lengths": [1, 1], "num_replicas": 3}, "2 texts cannot give each of 3 replicas a batch"),
        ({"rank": 1}, "rank is 1, expected one of 0 to 0"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_sequences": 0}, "max_sequences is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_what_a_sampler_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        TokenBudgetSampler(**({"lengths": [3, 4], "max_tokens": 10} | arguments))


def test_batches_that_cannot_be_shared():
    """Three texts as long as the budget are three batches, whatever is split."""
    with pytest.raises(ValueError, match="3 texts fill 3 batches, which 2 replicas cannot share evenly; drop_last"):
        len(TokenBudgetSampler([5, 5, 5], 5, num_replicas=2))


# --- packing


def config(**changes):
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertConfig(**(sizes | {"intermediate_size": 32, "max_position_embeddings": 12} | changes))


FEATURES = [
    {"input_ids": [2, 7, 3], "token_type_ids": [0, 0, 1]},
    {"input_ids": np.array([2, 9, 9, 11, 3], np.int32), "token_type_ids": np.zeros(5, np.int64)},
    {"input_ids": torch.tensor([2, 3]), "token_type_ids": torch.tensor([0, 1])},
]


def with_labels(*labels, name="labels"):
    return [{**feature, name: label} for feature, label in zip(FEATURES, labels, strict=True)]


def padded(features):
    lengths = [len(feature["input_ids"]) for feature in features]
    rows = {
        name: torch.zeros(len(features), max(lengths), dtype=torch.int64) for name in ("input_ids", "token_type_ids")
    }
    for name, row in rows.items():
        for index, feature in enumerate(features):
            row[index, : lengths[index]] = torch.as_tensor(feature[name])
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return {**rows, "attention_mask": mask}


def test_a_packed_batch():
    batch = PackingCollator()(with_labels([1, -100, 2], [3] * 5, torch.tensor([4, 5])))
    assert batch["input_ids"].tolist() == [[2, 7, 3, 2, 9, 9, 11, 3, 2, 3]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 1, 0, 0, 0, 0, 0, 0, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 4, 0, 1]]
    assert batch["labels"].tolist() == [[1, -100, 2, 3, 3, 3, 3, 3, 4, 5]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 8, 10]
    assert batch["max_length_q"] == 5
    assert {name: tensor.dtype for name, tensor in batch.items() if name not in ("cu_seq_lens_q", "max_length_q")} == {
        name: torch.int64 for name in ("input_ids", "token_type_ids", "position_ids", "labels")
    }
    assert batch["cu_seq_lens_q"].dtype == torch.int32


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ((1, 0, 2), torch.tensor([1, 0, 2])),
        ((1.5, 0, 2.0), torch.tensor([1.5, 0.0, 2.0])),
        ((np.int32(1), torch.tensor(0), 2), torch.tensor([1, 0, 2])),
        (([0.0, 1.0], [1.0, 1.0], [0.0, 0.0]), torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])),
    ],
    ids=["classes", "regression", "arrays", "several classes"],
)
def test_labels_of_texts(labels, expected):
    for name in ("labels", "label", "label_ids"):
        got = PackingCollator()(with_labels(*labels, name=name))["labels"]
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_what_is_not_for_the_model_is_left_out():
    features = with_labels(1, 2, 3)
    extra = {"special_tokens_mask": [0], "example_index": 3, "length": 3}
    with_extra = [{**f, **extra, "attention_mask": [1] * len(f["input_ids"])} for f in features]
    assert PackingCollator()(with_extra).keys() == PackingCollator()(features).keys()


def test_models_give_the_same_packed_and_padded():
    """Ours and an accelerated one of transformers; labels of texts and of tokens."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    of_texts, of_tokens = with_labels(1, 0, 1), with_labels([1, 0, 1], [0] * 5, [1, -100])
    row = torch.full((3, 5), -100)
    for index, feature in enumerate(of_tokens):
        row[index, : len(feature["labels"])] = torch.tensor(feature["labels"])
    theirs = transformers.BertForSequenceClassification(transformers.BertConfig(**vars(config())))
    for model, features, labels in (
        (BertForSequenceClassification(config()), of_texts, torch.tensor([1, 0, 1])),
        (BertForTokenClassification(config()), of_tokens, row),
        (accelerate(theirs), of_texts, torch.tensor([1, 0, 1])),
    ):
        model.eval()
        packed = model(**PackingCollator()(features))
        expected = model(**padded(features), labels=labels)
        torch.testing.assert_close(packed.loss, expected.loss, rtol=1e-5, atol=1e-6)


def test_spans_of_a_packed_batch_count_from_their_text():
    """Loss and gradients are those of the padded batch; an end past its text, but inside the batch, is ignored."""
    torch.manual_seed(0)
    model = BertForQuestionAnswering(config(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    spans = [(1, 2), (0, 4), (1, 2)]  # the last text has two tokens
    features = [
        {**feature, "start_positions": start, "end_positions": end}
        for feature, (start, end) in zip(FEATURES, spans, strict=True)
    ]
    starts, ends = map(torch.tensor, zip(*spans, strict=True))
    losses = [
        model(**PackingCollator()(features)).loss,
        model(**padded(features), start_positions=starts, end_positions=ends).loss,
    ]
    torch.testing.assert_close(losses[0], losses[1])
    got, expected = (torch.autograd.grad(loss, model.bert.embeddings.word_embeddings.weight)[0] for loss in losses)
    torch.testing.assert_close(got, expected)
    features.insert(1, {"input_ids": [], "token_type_ids": [], "start_positions": 0, "end_positions": 0})
    torch.testing.assert_close(model(**PackingCollator()(features)).loss, losses[0], msg="a text without tokens")
    with pytest.raises(ValueError, match="there are 2 start_positions or end_positions for 3 texts"):
        model(**{**PackingCollator()(features[1:]), "start_positions": starts[:2]})


def test_a_text_without_tokens_is_zeros():
    torch.manual_seed(0)
    batch = PackingCollator()([{"input_ids": [2, 5, 3]}, {"input_ids": []}, {"input_ids": [2, 3]}])
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 3, 5]
    model = BertModel(config()).eval()
    pooled = model(**batch).pooler_output
    without = model(**PackingCollator()([{"input_ids": [2, 5, 3]}, {"input_ids": [2, 3]}])).pooler_output
    torch.testing.assert_close(pooled[[0, 2]], without)
    torch.testing.assert_close(pooled[1], torch.tanh(model.pooler.dense.bias))


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([], "no features"),
        ([{"input_ids": [1]}, {"labels": 1}], "feature 1 has no input_ids; it has labels"),
        ([{"input_ids": [1], "labels": 1}, {"input_ids": [1]}], "features 0 and 1 do not have the same names: labels"),
        (with_labels([1, 2, 3], [1] * 4, [1, 2]), "labels of feature 1 has 4 values for 5 tokens"),
        (with_labels([1, 2, 3], 4, [1, 2]), r"labels of feature 1 is int64 of shape \(\)"),
        (with_labels([0.0, 1.0], [1.0], [1.0, 0.0]), r"labels of feature 1 has shape \(1,\), that of feature 0 \(2,\)"),
        ([{"input_ids": [[1, 2], [3, 4]]}], r"input_ids of feature 0 is int64 of shape \(2, 2\)"),
        ([{"input_ids": [[1, 2], [3]]}], "input_ids of feature 0 is not an array"),
        ([{"input_ids": [1.0]}], "input_ids of feature 0 is float64"),
        ([{"input_ids": [1], "text": "a"}], "text of feature 0 is a str, expected numbers"),
        ([{"input_ids": [1, 0], "attention_mask": [1, 0]}], "attention_mask of feature 0 hides tokens"),
        ([{"input_ids": [1]}, {"input_ids": [1] * 6}], "feature 1 has 6 tokens, more than max_position_embeddings 5"),
    ],
)
def test_what_the_collator_refuses(features, message):
    with pytest.raises(ValueError, match=message):
        PackingCollator(max_position_embeddings=5)(features)

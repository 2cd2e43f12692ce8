"""BERT's masking: how many tokens, which, what becomes of them, and that it depends on nothing else."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from bert_fast import BertConfig
from bert_fast.modules import BertForMaskedLM
from bert_fast.training.batches import INDEX, TokenBudgetSampler
from bert_fast.training.masking import IndexedDataset, MaskingCollator

VOCAB, CLS, SEP, MASK = 1000, 1, 2, 3


def collator(**options):
    arguments = {"vocab_size": VOCAB, "mask_token_id": MASK, "special_token_ids": (0, CLS, SEP)}
    return MaskingCollator(**(arguments | options))


def texts(num_texts, length=None):
    """[CLS] words [SEP]; words are 10 to VOCAB - 1."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 60, num_texts) if length is None else np.full(num_texts, length)
    return [{"input_ids": [CLS, *rng.integers(10, VOCAB, n - 2).tolist(), SEP]} for n in lengths]


def rows(batch):
    """[(input_ids, labels)] of each text."""
    cuts = batch["cu_seq_lens_q"][1:-1].tolist()
    parts = (torch.tensor_split(batch[name][0], cuts) for name in ("input_ids", "labels"))
    return [(ids.tolist(), labels.tolist()) for ids, labels in zip(*parts, strict=True)]


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(0, VOCAB - 1), max_size=50), min_size=1, max_size=6),
    st.sampled_from([0.15, 0.4, 1.0]),
    st.none() | st.integers(1, 5),
    st.integers(0, 3),
)
@example([[10] * 30, [10] * 10], 0.15, None, 0)  # 4.5 and 1.5, both rounded to even
def test_as_many_as_bert_chooses_and_none_that_is_special(examples, probability, most, epoch):
    collate = collator(mlm_probability=probability, max_predictions=most)
    collate.set_epoch(epoch)
    batch = collate([{"input_ids": ids, INDEX: index} for index, ids in enumerate(examples)])
    for ids, (hidden, labels) in zip(examples, rows(batch), strict=True):
        chosen = [label != -100 for label in labels]
        free = sum(token not in (0, CLS, SEP) for token in ids)
        count = max(1, round(len(ids) * probability))  # create_pretraining_data.py
        assert sum(chosen) == min(count, most or count, free)
        for token, seen, label, is_chosen in zip(ids, hidden, labels, chosen, strict=True):
            assert label == (token if is_chosen else -100)
            assert is_chosen or seen == token
            assert not is_chosen or token not in (0, CLS, SEP)


def test_80_10_10_and_every_place_alike():
    """100,000 chosen tokens: five standard deviations of a share are at most 0.0064."""
    length, collate = 50, collator(mlm_probability=0.2)
    examples = IndexedDataset(texts(10_000, length))
    batch = collate([examples[index] for index in range(len(examples))])
    hidden, labels = batch["input_ids"].view(-1, length), batch["labels"].view(-1, length)
    chosen = labels != -100
    assert chosen.sum() == 100_000
    seen, truth = hidden[chosen], labels[chosen]
    assert abs((seen == MASK).float().mean() - 0.8) < 0.0064
    assert abs((seen == truth).float().mean() - 0.1) < 0.0064
    replaced = seen[(seen != MASK) & (seen != truth)]
    # Over the whole vocabulary, special tokens included: 10 of each of the 1000 words.
    assert replaced.min() < 5
    assert replaced.max() > VOCAB - 5
    assert abs(replaced.float().mean() - VOCAB / 2) < 5 * VOCAB / 12**0.5 / len(replaced) ** 0.5
    share = chosen[:, 1:-1].float().mean(0) * (length - 2) / 10  # 1 for each place
    assert (share - 1).abs().max() < 5 * (48 / 10_000 / 10) ** 0.5


def test_the_mask_depends_on_seed_epoch_and_example_alone():
    examples = IndexedDataset(texts(40))

    def masks(indices, seed=0, epoch=0):
        collate = collator(seed=seed)
        collate.set_epoch(epoch)
        return dict(zip(indices, rows(collate([examples[index] for index in indices])), strict=True))

    whole = masks(range(40))
    assert masks([31]) == {31: whole[31]}, "a batch of its own"
    assert masks([31, 5, 7]) == {index: whole[index] for index in (31, 5, 7)}, "another batch in another order"
    assert masks(range(40)) == whole, "again"
    for other in (masks(range(40), seed=1), masks(range(40), epoch=1)):
        assert sum(other[index] == whole[index] for index in whole) < 20
    same_text = IndexedDataset(texts(1, 60) * 2)
    first, second = rows(collator()([same_text[0], same_text[1]]))
    assert first != second, "the same text under another index"


def test_the_masks_of_a_seed_are_the_same_in_every_release():
    """A run may be resumed with another NumPy."""
    collate = collator(mlm_probability=0.5, seed=5)
    collate.set_epoch(2)
    hidden, labels = rows(collate([{"input_ids": [CLS, *range(10, 20), SEP], INDEX: 7}]))[0]
    assert hidden == [CLS, MASK, 11, 12, MASK, 14, 15, MASK, MASK, MASK, 19, SEP]
    assert labels == [-100, 10, -100, -100, 13, -100, 15, 16, 17, 18, -100, -100]


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_any_number_of_workers_draws_the_same_masks_in_every_epoch(start):
    """Workers that persist keep a copy of the collator from before `set_epoch`."""
    examples = IndexedDataset(texts(40))
    sampler = TokenBudgetSampler([len(example["input_ids"]) for example in examples.examples], 256)
    collate, alone = collator(), collator()
    loader = DataLoader(
        examples,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=2,
        persistent_workers=True,
        multiprocessing_context=start,
    )
    for epoch in (0, 1):
        for part in (sampler, collate, alone):
            part.set_epoch(epoch)
        expected = [rows(batch) for batch in DataLoader(examples, batch_sampler=sampler, collate_fn=alone)]
        assert [rows(batch) for batch in loader] == expected


def test_a_model_learns_from_the_batch():
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    model = BertForMaskedLM(config).eval()
    examples = IndexedDataset(texts(8))
    batch = collator()([examples[index] for index in range(8)])
    output = model(**batch)
    chosen = batch["labels"] != -100
    expected = torch.nn.functional.cross_entropy(output.logits[chosen], batch["labels"][chosen])
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mlm_probability": 0.0}, "mlm_probability is 0.0"),
        ({"mlm_probability": 1.5}, "mlm_probability is 1.5"),
        ({"max_predictions": 0}, "max_predictions is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"mask_token_id": VOCAB}, rf"token id {VOCAB} is out of range \[0, {VOCAB}\)"),
        ({"special_token_ids": [-1]}, "token id -1"),
    ],
)
def test_what_the_collator_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        collator(**options)


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        ({"input_ids": [5]}, "no index .* wrap the data set in IndexedDataset"),
        ({"input_ids": [5], INDEX: 0, "label": 1}, "have labels"),
        ({"input_ids": [5] * 9, INDEX: 0}, "feature 0 has 9 tokens, more than max_position_embeddings 8"),
    ],
)
def test_features_it_refuses(feature, message):
    with pytest.raises(ValueError, match=message):
        collator(max_position_embeddings=8)([feature])


def test_an_epoch_before_the_first():
    with pytest.raises(ValueError, match="epoch is -1"):
        collator().set_epoch(-1)

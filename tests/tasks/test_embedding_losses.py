"""The losses over sentence vectors against sentence-transformers' own, values and gradients, and by definition."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers.sentence_transformer import losses
from torch import nn

from bert_fast.sentence_embedding import LOSSES, EmbeddingSettings

BOTH = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}


def theirs(name, chosen):
    """sentence-transformers' class for a loss of ours."""
    anything = nn.Identity()  # the model, which is not asked: the losses are given vectors
    if name == "multiple_negatives_ranking":
        return losses.MultipleNegativesRankingLoss(anything, scale=chosen.scale, **(BOTH if chosen.symmetric else {}))
    if name == "triplet":
        return losses.TripletLoss(anything, triplet_margin=chosen.margin)
    if name == "cosent":
        return losses.CoSENTLoss(anything, scale=chosen.scale)
    return losses.CosineSimilarityLoss(anything)


def vectors(num_examples, num_texts, dtype, seed=0):
    """(num_examples, num_texts, 8), with gradients."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_examples, num_texts, 8, generator=generator, dtype=dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("name", "num_texts", "options"),
    [
        ("multiple_negatives_ranking", 2, {}),
        ("multiple_negatives_ranking", 3, {"scale": 7.0}),
        ("multiple_negatives_ranking", 5, {"symmetric": True}),  # several negatives, and both directions
        ("triplet", 3, {}),
        ("triplet", 3, {"margin": 0.1}),  # small enough that some triplets are satisfied
        ("cosine_similarity", 2, {}),
        ("cosent", 2, {}),
    ],
)
@pytest.mark.parametrize("num_examples", [1, 9])
def test_values_and_gradients_are_those_of_sentence_transformers(name, num_texts, options, num_examples, dtype):
    chosen = EmbeddingSettings(loss=name, **options)
    ours, oracle = vectors(num_examples, num_texts, dtype), vectors(num_examples, num_texts, dtype)
    labels = (torch.arange(num_examples) % 4 / 4).to(dtype)  # some are equal: pairs that CoSENT leaves out
    text_ids = torch.arange(num_examples * num_texts).view(num_examples, num_texts)
    got = LOSSES[name](ours, labels, text_ids, chosen)
    expected = theirs(name, chosen).compute_loss_from_embeddings(list(oracle.unbind(1)), labels)
    got.backward()
    expected.backward()
    bound = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(got, expected, **bound)
    torch.testing.assert_close(ours.grad, oracle.grad, **bound)


@pytest.mark.parametrize("name", LOSSES)
def test_equal_vectors_have_finite_gradients(name):
    same = torch.ones(3, 2 if "cos" in name else 3, 8).requires_grad_()
    text_ids = torch.arange(same.shape[0] * same.shape[1]).view(same.shape[:2])
    LOSSES[name](same, torch.tensor([0.0, 0.5, 1.0]), text_ids, EmbeddingSettings(loss=name)).backward()
    assert same.grad.isfinite().all()


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(*[st.integers(0, 5)] * 3), min_size=1, max_size=6), st.booleans())
def test_texts_that_are_not_wrong_are_no_negatives(rows, symmetric):
    """The definition, one anchor after another, over sets of texts."""
    text_ids = torch.tensor(rows)
    table = vectors(6, 1, torch.float64).detach()[:, 0]
    chosen = EmbeddingSettings(symmetric=symmetric)
    got = LOSSES["multiple_negatives_ranking"](table[text_ids], torch.ones(len(rows)), text_ids, chosen)
    candidates = [(index, place) for place in (1, 2) for index in range(len(rows))]

    def is_negative(anchor, index, place):
        right = {positive for other, positive, _ in rows if other == rows[anchor][0]}
        return rows[index][place] not in right | {rows[anchor][0]}

    def score(anchor, text):
        return 20 * F.cosine_similarity(table[rows[anchor][0]], table[text], dim=0)

    total = 0.0
    for anchor in range(len(rows)):
        own = score(anchor, rows[anchor][1])
        others = [
            score(anchor, rows[i][p]) for i, p in candidates if (i, p) != (anchor, 1) and is_negative(anchor, i, p)
        ]
        sums = torch.stack([own, *others]).logsumexp(0)
        if symmetric:
            back = [score(i, rows[anchor][1]) for i in range(len(rows)) if i != anchor and is_negative(i, anchor, 1)]
            sums = (sums + torch.stack([own, *back]).logsumexp(0)) / 2
        total = total + sums - own
    torch.testing.assert_close(got, total / len(rows))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling_mode": "last"}, "pooling_mode is 'last', expected one of cls, mean, max"),
        ({"loss": "hinge"}, "loss is 'hinge', expected one of multiple_negatives_ranking"),
        ({"scale": 0.0}, "scale is 0.0, expected above 0"),
        ({"margin": -1.0}, "margin is -1.0"),
        ({"max_seq_length": 2}, "max_seq_length is 2"),
    ],
)
def test_settings_that_are_impossible(options, message):
    with pytest.raises(ValueError, match=message):
        EmbeddingSettings(**options)

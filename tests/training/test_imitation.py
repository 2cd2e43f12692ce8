"""The differences between student and teacher against independent definitions, and the laws they obey."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Bernoulli, Categorical, kl_divergence

from bert_fast import BertConfig
from bert_fast.training import imitation


def logits(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_divergence_of_classes_is_torchs(temperature):
    student, teacher = logits(7, 5), logits(7, 5, seed=1)
    expected = kl_divergence(Categorical(logits=teacher / temperature), Categorical(logits=student / temperature))
    torch.testing.assert_close(imitation.class_divergence(student, teacher, temperature), expected * temperature**2)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_divergence_of_labels_is_torchs(temperature):
    student, teacher = logits(7, 5), logits(7, 5, seed=1)
    each = kl_divergence(Bernoulli(logits=teacher / temperature), Bernoulli(logits=student / temperature))
    expected = each.mean(-1) * temperature**2
    torch.testing.assert_close(imitation.label_divergence(student, teacher, temperature), expected)


def test_spans_are_classes_over_each_text():
    lengths, student, teacher = [3, 1, 6], logits(10), logits(10, seed=1)
    found = imitation.span_divergence(student.requires_grad_(), teacher, lengths, 2.0)
    expected = [
        imitation.class_divergence(a[None], b[None], 2.0)
        for a, b in zip(student.split(lengths), teacher.split(lengths), strict=True)
    ]
    torch.testing.assert_close(found, torch.cat(expected))
    (gradient,) = torch.autograd.grad(found @ logits(3, seed=2), student, retain_graph=True)
    (wanted,) = torch.autograd.grad(torch.cat(expected) @ logits(3, seed=2), student)
    torch.testing.assert_close(gradient, wanted)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(2, 5), st.floats(0.25, 8), st.integers(0, 99))
def test_a_divergence_is_never_negative_and_0_for_the_same(rows, classes, temperature, seed):
    student, teacher = logits(rows, classes, seed=seed), logits(rows, classes, seed=seed + 100)
    for divergence in (imitation.class_divergence, imitation.label_divergence):
        assert (divergence(student, teacher, temperature) > -1e-12).all()
        torch.testing.assert_close(divergence(student, student + 0.0, temperature), torch.zeros(rows).double())
    shifted = imitation.class_divergence(student + 3, teacher - 5, temperature)
    torch.testing.assert_close(shifted, imitation.class_divergence(student, teacher, temperature))


def test_at_a_high_temperature_it_is_the_squared_error_of_centred_logits():
    """The limit that Hinton et al. give in section 2.1: its gradient is (z - v) / classes."""
    student, teacher = logits(4, 3), logits(4, 3, seed=1)
    found = imitation.class_divergence(student, teacher, 1e4)
    centred = (student - student.mean(-1, keepdim=True)) - (teacher - teacher.mean(-1, keepdim=True))
    torch.testing.assert_close(found, centred.square().sum(-1) / (2 * 3), rtol=1e-2, atol=1e-3)


def relations(vectors, heads):
    """Of one text, in NumPy: a softmax of scaled products, head by head, token by token."""
    maps = []
    for part in np.split(vectors.numpy(), heads, axis=1):
        scores = part @ part.T / math.sqrt(part.shape[1])
        weights = np.exp(scores)
        maps.append(weights / weights.sum(1, keepdims=True))
    return np.stack(maps)


def test_divergence_of_relations_with_other_widths():
    lengths = [4, 0, 1, 7]  # a text without tokens, and one of a single token, which has but one relation
    student, teacher = logits(12, 6), logits(12, 10, seed=1)
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    expected = []
    for a, b in zip(student.split(lengths), teacher.split(lengths), strict=True):
        said, wanted = relations(a, 2), relations(b, 2)
        expected.append((wanted * np.log(wanted / said)).sum(2).mean(0))
    found = imitation.relation_divergence(student, teacher, cu_seqlens, 2)
    np.testing.assert_allclose(found.numpy(), np.concatenate(expected), atol=1e-12)
    assert found[4] == 0.0


def test_squared_error_is_a_mean_over_features():
    student, teacher = logits(3, 2, 4), logits(3, 2, 4, seed=1)
    np.testing.assert_allclose(
        imitation.squared_error(student, teacher), ((student - teacher).numpy() ** 2).mean((1, 2))
    )


def test_states_lie_as_deep_in_the_one_as_in_the_other():
    assert imitation.matching_states(4, 12) == [0, 3, 6, 9, 12]  # TinyBERT's
    assert imitation.matching_states(6, 6) == list(range(7))
    assert imitation.matching_states(4, 6) == [0, 2, 3, 5, 6]
    assert imitation.matching_states(1, 24) == [0, 24]


@given(st.integers(1, 24), st.integers(1, 24))
def test_states_rise_from_the_embeddings_to_the_last(student, teacher):
    found = imitation.matching_states(student, teacher)
    assert found[0] == 0
    assert found[-1] == teacher
    assert found == sorted(found)


def test_relation_heads_divide_both_widths():
    def config(width, heads):
        return BertConfig(hidden_size=width, num_attention_heads=heads)

    assert imitation.relation_heads(config(384, 12), config(768, 12)) == 12
    assert imitation.relation_heads(config(312, 12), config(768, 12)) == 12
    assert imitation.relation_heads(config(128, 2), config(384, 12)) == 8

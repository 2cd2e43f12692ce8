"""How far a student is from its teacher: in logits, in hidden states, in what its tokens attend to.

Everything here is a value for each row, a text or a token, and differentiable in the student.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def class_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) of each row (Hinton et al., 2015, arXiv:1503.02531).

    The factor keeps the size of the gradients as it is at T = 1.

    Args:
        student, teacher: (rows, classes) logits.
        temperature: T, above 0.

    Returns:
        (rows,), at least 0.
    """
    wanted, said = (F.log_softmax(logits / temperature, dim=-1) for logits in (teacher, student))
    return (wanted.exp() * (wanted - said)).sum(-1) * temperature**2


def label_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The same for labels that may apply together: of sigmoids, the mean over the labels. (rows, labels) -> (rows,)."""
    both = [torch.stack([logits, torch.zeros_like(logits)], dim=-1) for logits in (student, teacher)]
    return class_divergence(both[0], both[1], temperature).mean(-1)


def span_divergence(student: Tensor, teacher: Tensor, lengths: list[int], temperature: float) -> Tensor:
    """The same where the classes are the tokens of a text. (num_tokens,) logits, one text after another -> (texts,)."""
    said, wanted = (
        pad_sequence(list(logits.split(lengths)), batch_first=True, padding_value=torch.finfo(logits.dtype).min / 4)
        for logits in (student, teacher)
    )
    return class_divergence(said, wanted, temperature)


def squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean of the squared differences in each row: (rows, ...) -> (rows,)."""
    return (student - teacher).square().flatten(1).mean(1)


def relation_divergence(student: Tensor, teacher: Tensor, cu_seqlens: Tensor, num_heads: int) -> Tensor:
    """How differently the tokens of a text relate to each other (Wang et al., 2021, MiniLMv2, arXiv:2012.15828).

    A token's relations are softmax(a a^T / sqrt(d)) over the tokens of its text, where a is a head's part of the
    vectors and d their width. The heads are cut here, so that neither widths nor numbers of heads need be the same.

    Args:
        student, teacher: (num_tokens, width), the queries, the keys or the values of a layer; widths may differ.
        cu_seqlens: (batch_size + 1,) integers: text i is rows cu_seqlens[i] to cu_seqlens[i + 1].
        num_heads: divides both widths.

    Returns:
        (num_tokens,): KL(teacher || student) of each token's relations, the mean over the heads.
    """
    rows = [student.new_zeros(0)]
    for start, end in pairwise(cu_seqlens.tolist()):
        wanted, said = (_log_relations(vectors[start:end], num_heads) for vectors in (teacher, student))
        rows.append((wanted.exp() * (wanted - said)).sum(-1).mean(0))
    return torch.cat(rows)


def _log_relations(vectors: Tensor, num_heads: int) -> Tensor:
    """(n, width) of one text -> (num_heads, n, n)."""
    heads = vectors.unflatten(-1, (num_heads, -1)).transpose(0, 1)
    return F.log_softmax(heads @ heads.transpose(1, 2) / math.sqrt(heads.shape[-1]), dim=-1)


def relation_heads(student: Any, teacher: Any) -> int:
    """The most heads, up to the teacher's, that both widths can be cut into; of two configurations."""
    widths = math.gcd(student.hidden_size, teacher.hidden_size)
    return max(heads for heads in range(1, teacher.num_attention_heads + 1) if widths % heads == 0)


def matching_states(student_layers: int, teacher_layers: int) -> list[int]:
    """Which of the teacher's hidden states each of the student's is compared with, the embeddings (0) among them.

    They lie as deep in the one as in the other: state m of M beside round(m N / M) of N, as in TinyBERT (Jiao et al.,
    2020, arXiv:1909.10351) where M divides N.
    """
    return [(2 * m * teacher_layers + student_layers) // (2 * student_layers) for m in range(student_layers + 1)]

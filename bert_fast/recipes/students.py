"""A smaller model made of a larger one's weights, to begin a distillation from."""

from __future__ import annotations

import dataclasses
import re

import torch
from torch import Tensor

from bert_fast.config import BertConfig
from bert_fast.heads import Head

_LAYER = re.compile(r"(.*encoder\.layer\.)(\d+)(\..*)")

#: Fields that a student has from its teacher, whatever its own configuration says: they are the task's.
OF_THE_TASK = ("id2label", "problem_type")


def copied_layers(student_layers: int, teacher_layers: int) -> list[int]:
    """Which of the teacher's layers, from 0, a student starts with: evenly from the first to the last one.

    For 6 of 12 they are 0, 2, 4, 7, 9 and 11, those of DistilBERT (Sanh et al., 2019, arXiv:1910.01108).
    """
    steps, last = max(student_layers - 1, 1), teacher_layers - 1
    return [(2 * index * last + steps) // (2 * steps) for index in range(student_layers)]


def shallower(config: BertConfig, num_hidden_layers: int) -> BertConfig:
    """The same model with fewer layers; ValueError for more, or for less than one."""
    if not 1 <= num_hidden_layers <= config.num_hidden_layers:
        raise ValueError(
            f"student_layers is {num_hidden_layers}, expected from 1 to the teacher's {config.num_hidden_layers}"
        )
    return dataclasses.replace(config, num_hidden_layers=num_hidden_layers)


def student_of(teacher: Head, config: BertConfig) -> Head:
    """A model of the teacher's class, initialised from its weights.

    Its layers are copies of `copied_layers`. Where it is narrower, every matrix has evenly spaced rows and columns of
    the teacher's, the same ones of the residual stream everywhere (weight selection: Xu et al., 2024,
    arXiv:2311.18823). A shorter table of positions has the first ones.

    Args:
        teacher: a head of `bert_fast.modules`.
        config: the student's; names of labels and the kind of problem are taken from the teacher's.

    Returns:
        In evaluation mode, float32.

    Raises:
        ValueError: the student is larger than the teacher somewhere, or has another vocabulary; the message says where.
    """
    theirs = teacher.config
    if config.model_type != theirs.model_type:
        raise ValueError(
            f"the student's model_type is {config.model_type!r}, the teacher's {theirs.model_type!r}, whose weights it "
            "is to start from; --student takes a trained model of any family"
        )
    if config.vocab_size != theirs.vocab_size:
        raise ValueError(
            f"the student's vocab_size is {config.vocab_size}, the teacher's {theirs.vocab_size}: they read the same "
            "tokens, so that their vocabularies must be the same"
        )
    for name in (
        "num_hidden_layers",
        "hidden_size",
        "embedding_size",
        "intermediate_size",
        "max_position_embeddings",
        "type_vocab_size",
    ):
        if getattr(config, name) > getattr(theirs, name):
            raise ValueError(
                f"the student's {name} is {getattr(config, name)}, more than the teacher's {getattr(theirs, name)}, "
                "whose weights it is to start from; --student takes a trained model of any size"
            )
    projects = [each.embedding_size != each.hidden_size for each in (config, theirs)]
    if projects == [True, False]:
        raise ValueError(
            f"the student's embedding_size is {config.embedding_size} beside a hidden_size of {config.hidden_size}, "
            f"but the teacher has {theirs.embedding_size} in both, and no projection to start from; --student takes a "
            "trained model of any size"
        )
    student = type(teacher)(dataclasses.replace(config, **{name: getattr(theirs, name) for name in OF_THE_TASK}))
    weights = dict(teacher.named_parameters(remove_duplicate=False))
    layers = copied_layers(config.num_hidden_layers, theirs.num_hidden_layers)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if place := _LAYER.fullmatch(name):
                name = f"{place[1]}{layers[int(place[2])]}{place[3]}"
            parameter.copy_(_selected(weights[name], parameter.shape, first="position_embeddings" in name))
    return student.eval()


def _selected(weight: Tensor, shape: torch.Size, first: bool) -> Tensor:
    """Evenly spaced elements along each dimension; with `first` those that the first one begins with."""
    for dimension, size in enumerate(shape):
        whole = weight.shape[dimension]
        index = torch.arange(size, device=weight.device)
        weight = weight.index_select(dimension, index if first and not dimension else index * whole // size)
    return weight

"""Which weights of a teacher a student starts with."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bert_fast import BertConfig
from bert_fast.config import ElectraConfig
from bert_fast.electra import ElectraForSequenceClassification
from bert_fast.modules import BertForSequenceClassification
from bert_fast.recipes.students import copied_layers, shallower, student_of


def config(**fields):
    shape = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4}
    shape |= {"intermediate_size": 24, "max_position_embeddings": 10}
    return BertConfig(**{**shape, **fields})


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    labels = {"id2label": {0: "no", 1: "yes", 2: "maybe"}, "problem_type": "single_label_classification"}
    return BertForSequenceClassification(config(**labels)).eval()


def test_half_of_the_layers_are_distilberts():
    assert copied_layers(6, 12) == [0, 2, 4, 7, 9, 11]
    assert copied_layers(3, 6) == [0, 3, 5]
    assert copied_layers(1, 6) == [0]


@given(st.integers(1, 24), st.integers(0, 24))
def test_layers_rise_and_are_all_there_where_none_is_left_out(student, more):
    layers = copied_layers(student, student + more)
    assert layers == sorted(set(layers))
    assert 0 <= layers[0] <= layers[-1] < student + more
    if not more:
        assert layers == list(range(student))


def test_a_student_of_the_same_shape_says_the_same(teacher):
    student = student_of(teacher, config())
    ids = torch.tensor([[1, 5, 7, 2]])
    assert torch.equal(student(ids).logits, teacher(ids).logits)
    assert student.config.id2label == {0: "no", 1: "yes", 2: "maybe"}
    assert student.config.problem_type == "single_label_classification"


def test_a_shallower_student_has_copies_of_the_layers_and_of_all_else(teacher):
    student = student_of(teacher, shallower(teacher.config, 2))
    theirs = teacher.state_dict()
    for name, value in student.state_dict().items():
        assert torch.equal(value, theirs[name.replace("layer.1.", "layer.3.")]), name
        assert value.data_ptr() != theirs[name.replace("layer.1.", "layer.3.")].data_ptr()


def test_a_narrower_student_has_the_same_features_everywhere(teacher):
    student = student_of(teacher, config(hidden_size=8, intermediate_size=12, max_position_embeddings=6))
    mine, theirs = student.state_dict(), teacher.state_dict()
    for name, rows, columns in (
        ("bert.embeddings.word_embeddings.weight", slice(None), slice(0, None, 2)),
        ("bert.embeddings.position_embeddings.weight", slice(6), slice(0, None, 2)),
        ("bert.encoder.layer.3.intermediate.dense.weight", slice(0, None, 2), slice(0, None, 2)),
        ("classifier.weight", slice(None), slice(0, None, 2)),
    ):
        assert torch.equal(mine[name], theirs[name][rows, columns]), name
    assert torch.equal(
        mine["bert.encoder.layer.0.output.LayerNorm.bias"], theirs["bert.encoder.layer.0.output.LayerNorm.bias"][::2]
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 32}, r"hidden_size is 32, more than the teacher's 16, whose weights it is to start from"),
        ({"num_hidden_layers": 5}, r"num_hidden_layers is 5, more than the teacher's 4"),
        ({"vocab_size": 21}, r"vocab_size is 21, the teacher's 20: they read the same tokens"),
    ],
)
def test_what_cannot_start_from_the_teacher_says_so(teacher, fields, message):
    with pytest.raises(ValueError, match=message):
        student_of(teacher, config(**fields))


def test_a_projection_that_the_teacher_has_not_is_no_start():
    shape = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    wide, narrow = (ElectraConfig(**shape, intermediate_size=24, embedding_size=size) for size in (16, 8))
    with pytest.raises(ValueError, match="embedding_size is 8 beside a hidden_size of 16, but the teacher has 16 in"):
        student_of(ElectraForSequenceClassification(wide), narrow)


def test_a_number_of_layers_that_is_none_says_so():
    for layers in (0, 5):
        with pytest.raises(ValueError, match=rf"student_layers is {layers}, expected from 1 to the teacher's 4"):
            shallower(config(), layers)

"""ELECTRA's heads for tasks against transformers': answers, losses, gradients, and checkpoints both ways."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_electra import SHAPE, gradients
from torch import Tensor

import bert_fast
from bert_fast import electra, loading, ops, reference
from bert_fast.config import ElectraConfig
from bert_fast.families import FAMILIES, make_config

#: The heads of tasks by our names for them, with the class of transformers that has the same.
HEADS = {
    "sequence_classification": "ElectraForSequenceClassification",
    "token_classification": "ElectraForTokenClassification",
    "question_answering": "ElectraForQuestionAnswering",
    "multiple_choice": "ElectraForMultipleChoice",
}
#: Embeddings that are projected, and such as are as wide as the layers.
BOTH = [("sequence_classification", 12), ("sequence_classification", 32), ("token_classification", 32),
        ("question_answering", 12), ("multiple_choice", 12)]  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are too small for two
    yield
    torch.set_num_threads(before)


def pair(head: str, width: int = 12, **others: Any) -> tuple[Any, Any]:
    """transformers' model and ours, with the same weights, large enough to tell one activation from another."""
    options = {**SHAPE, "embedding_size": width, "summary_last_dropout": 0.0, "initializer_range": 0.3, **others}
    if head != "question_answering":
        options["id2label"] = {0: "a", 1: "b", 2: "c"}
    torch.manual_seed(0)
    theirs = getattr(transformers, HEADS[head])(transformers.ElectraConfig(**options))
    ours = FAMILIES["electra"].heads[head](ElectraConfig(**options))
    ours.load_state_dict(theirs.state_dict())
    return theirs.train(), ours.train()


def batch(head: str) -> dict[str, Tensor]:
    """Four texts, of which one is a single token, with their targets; or two of two choices each."""
    torch.manual_seed(3)
    lengths = torch.tensor([13, 5, 9, 1])
    mask = (torch.arange(13) < lengths[:, None]).long()
    inputs = {"input_ids": torch.randint(5, 60, (4, 13)) * mask, "attention_mask": mask}
    inputs["token_type_ids"] = torch.randint(2, (4, 13)) * mask
    if head == "multiple_choice":
        return {name: value.view(2, 2, 13) for name, value in inputs.items()} | {"labels": torch.tensor([1, 0])}
    if head == "question_answering":  # of whole texts: in transformers padding competes for the answer
        inputs["attention_mask"] = torch.ones_like(mask)
        return inputs | {"start_positions": torch.tensor([3, 1, 0, 20]), "end_positions": torch.tensor([4, 1, 8, 2])}
    if head == "token_classification":
        return inputs | {"labels": torch.randint(3, (4, 13)).masked_fill(mask == 0, -100)}
    return inputs | {"labels": torch.tensor([0, 2, 1, 1])}


def answers(output: Any, mask: Tensor) -> list[Tensor]:
    """Logits, those of tokens at the tokens there are."""
    logits = [output[name] for name in ("logits", "start_logits", "end_logits") if name in output.__dict__]
    return [value[mask == 1] if value.shape[: mask.dim()] == mask.shape else value for value in logits]


@pytest.mark.parametrize(("head", "width"), BOTH)
def test_losses_and_gradients_are_those_of_transformers(head: str, width: int) -> None:
    (theirs, ours), inputs = pair(head, width), batch(head)
    truth, exact = (gradients(copy.deepcopy(model).double(), inputs) for model in (theirs, ours))
    plain, fast = gradients(theirs, inputs), gradients(ours, inputs, loss_only=True)
    assert fast.keys() == truth.keys()
    for key, expected in truth.items():
        torch.testing.assert_close(exact[key].double(), expected.double(), rtol=1e-6, atol=1e-7, msg=key)
        error, allowed = ((found[key].double() - expected.double()).norm() for found in (fast, plain))
        assert error <= 4 * allowed + 8 * torch.finfo(torch.float32).eps * expected.norm() + 1e-9, key


@pytest.mark.parametrize(("head", "width"), BOTH)
def test_answers_are_those_of_transformers(head: str, width: int) -> None:
    """Of the packed engine, of the ops, and of the plain definition."""
    (theirs, ours), inputs = pair(head, width), batch(head)
    plain = getattr(reference, HEADS[head])(ours.config).eval()
    plain.load_state_dict(ours.state_dict())
    with torch.no_grad():
        expected = answers(theirs.eval().double()(**inputs), inputs["attention_mask"])
        exact = answers(plain.double()(**inputs), inputs["attention_mask"])
        packed = answers(ours.eval()(**inputs), inputs["attention_mask"])
        assert ops.extension() is None or ours.bert.engine() is not None
        with ops.force("reference"):
            by_ops = answers(ours(**inputs), inputs["attention_mask"])
    torch.testing.assert_close(exact, expected, rtol=1e-9, atol=1e-9)
    for found in (packed, by_ops):
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5, check_dtype=False)


@pytest.mark.parametrize(
    ("labels", "options"),
    [
        (torch.tensor([[1.0, 0.0, 1.0]] * 4), {"problem_type": "multi_label_classification"}),
        (torch.tensor([0.5, 2.0, -1.0, 3.0]), {"id2label": {0: "score"}}),
    ],
    ids=["several labels", "a number"],
)
def test_other_problems(labels: Tensor, options: dict[str, Any]) -> None:
    options = {**SHAPE, "id2label": {0: "a", 1: "b", 2: "c"}, **options}
    theirs = transformers.ElectraForSequenceClassification(transformers.ElectraConfig(**options)).double()
    ours = electra.ElectraForSequenceClassification(ElectraConfig(**options)).double()
    ours.load_state_dict(theirs.state_dict())
    inputs = batch("sequence_classification") | {"labels": labels.double()}
    torch.testing.assert_close(ours(**inputs).loss, theirs(**inputs).loss, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", [{"summary_use_proj": False}, {"summary_activation": ""}])
def test_other_summaries(options: dict[str, Any]) -> None:
    (theirs, ours), inputs = pair("multiple_choice", **options), batch("multiple_choice")
    found, expected = (model.eval().double()(**inputs).logits for model in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_the_first_token_is_the_first_one_that_the_mask_keeps() -> None:
    model, inputs = pair("sequence_classification")[1].eval(), batch("sequence_classification")
    right = model(**inputs).logits
    left = {name: value.flip(1) if value.dim() == 2 else value for name, value in inputs.items()}
    left["input_ids"], left["token_type_ids"] = (
        torch.stack([row[mask == 1].new_tensor([0] * int((mask == 0).sum()) + row[mask == 1].tolist())
                     for row, mask in zip(inputs[name], inputs["attention_mask"], strict=True)])
        for name in ("input_ids", "token_type_ids")
    )  # fmt: skip
    left["position_ids"] = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(model(**left).logits, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_transformers_reads_ours_and_we_read_theirs(head: str, tmp_path: Path) -> None:
    theirs, ours = pair(head)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    kind = getattr(transformers, HEADS[head].replace("Electra", "AutoModel"))
    loaded, info = kind.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert type(loaded).__name__ == HEADS[head]
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    back = bert_fast.from_pretrained(tmp_path / "theirs", head)
    assert type(back) is type(ours)
    for key, weight in theirs.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[key], weight, rtol=0, atol=0)
        torch.testing.assert_close(back.state_dict()[key], weight, rtol=0, atol=0)


def test_a_discriminator_becomes_a_classifier(tmp_path: Path) -> None:
    """Its encoder stays, what it predicted goes; and so does a classifier of another number of labels."""
    torch.manual_seed(0)
    before = electra.ElectraForPreTraining(ElectraConfig(**SHAPE))
    before.save_pretrained(tmp_path / "discriminator")
    with pytest.warns(UserWarning, match="classifier.dense.weight, .*classifier.out_proj.bias"):
        model: Any = bert_fast.from_pretrained(tmp_path / "discriminator", "sequence_classification")
    for key, weight in before.electra.state_dict().items():
        assert torch.equal(model.electra.state_dict()[key], weight), key
    assert model.classifier.out_proj.weight.std() > 0
    model.save_pretrained(tmp_path / "two")
    with pytest.warns(UserWarning, match="has 2 outputs, but 3 are wanted"):
        other = bert_fast.from_pretrained(
            tmp_path / "two", "sequence_classification", config={"id2label": {0: "a", 1: "b", 2: "c"}}
        )
    assert other(torch.tensor([[5, 6]])).logits.shape == (1, 3)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    electra.ElectraModel(ElectraConfig(**SHAPE)).save_pretrained(tmp_path)
    assert type(bert_fast.from_pretrained(tmp_path)) is electra.ElectraModel
    with pytest.raises(ValueError, match="head is 'next_sentence', expected None or, for electra, one of masked_lm"):
        bert_fast.from_pretrained(tmp_path, "next_sentence")
    with pytest.raises(ValueError, match="model_type is 'roberta'; bert_fast knows: bert, electra"):
        make_config({"model_type": "roberta"})
    with pytest.raises(ValueError, match="summary_type is 'last', expected 'first'"):
        pair("multiple_choice", summary_type="last")
    with pytest.raises(ValueError, match="summary_activation is 'swish', expected None or one of gelu"):
        ElectraConfig(summary_activation="swish")
    state = {name: value for name, value in loading.read_state_dict(tmp_path).items() if "project" not in name}
    with pytest.raises(ValueError, match="lacks 2 weights of ElectraModel: embeddings_project"):
        loading.build(electra.ElectraModel, ElectraConfig(**SHAPE), state)

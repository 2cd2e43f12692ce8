"""Multiple choice: pairs as transformers tokenises them, the batch that the head takes, and the choice that is said."""

import numpy as np
import pytest
import tiny_checkpoint
import torch
from transformers import AutoTokenizer, BertForMultipleChoice

from bert_fast.data.examples import ChoiceExample, TextExample
from bert_fast.folders import resolve
from bert_fast.loading import from_pretrained
from bert_fast.tasks.multiple_choice import MultipleChoice

pytestmark = pytest.mark.filterwarnings("ignore:the checkpoint has no weights for this head")

TOKENIZER = tiny_checkpoint.tokenizer()
EXAMPLES = [
    ChoiceExample("0", (("The rain stopped.", "We went out into the wet garden."), ("The rain stopped.", "Four.")), 0),
    ChoiceExample("1", (("He took the ladder.", "A fish."), ("He took the ladder.", "He climbed up to the roof.")), 1),
]


def test_batch_and_answers_are_those_of_transformers(tmp_path):
    task = MultipleChoice(max_seq_length=12)
    task.learn(EXAMPLES)
    features = task.features(EXAMPLES, TOKENIZER, labelled=True)
    model = from_pretrained(tiny_checkpoint.checkpoint(tmp_path / "base"), task.head, config=task.config())
    model.save_pretrained(tmp_path / "tuned")
    batch = task.collator(model.config)(features.inputs)
    pairs = [pair for example in EXAMPLES for pair in example.choices]
    theirs = AutoTokenizer.from_pretrained(resolve("demo"))
    expected = theirs(pairs, truncation="longest_first", max_length=12, padding=True, return_tensors="pt")
    for name in ("input_ids", "token_type_ids", "attention_mask"):
        assert torch.equal(batch[name], expected[name].view(2, 2, -1)), name
    assert batch["labels"].tolist() == [0, 1]
    assert features.num_truncated == 2
    other = BertForMultipleChoice.from_pretrained(tmp_path / "tuned").eval()
    with torch.inference_mode():
        outputs = task.outputs(model, {name: value for name, value in batch.items() if name != "labels"})
        answer = other(**batch)
        assert float(model(**batch).loss) == pytest.approx(answer.loss.item(), rel=1e-5)
    np.testing.assert_allclose([output[0] for output in outputs], answer.logits, atol=1e-5)
    said = task.predictions(EXAMPLES, features, outputs)
    assert [prediction["label"] for prediction in said] == answer.logits.argmax(1).tolist()
    np.testing.assert_allclose([p["probabilities"] for p in said], answer.logits.softmax(1), atol=1e-5)


def test_single_texts_and_accuracy():
    task = MultipleChoice()
    single = [ChoiceExample("0", (("one", None), ("two", None), ("three", None)), 2)]
    features = task.features(single, TOKENIZER, labelled=True)
    assert [len(ids) for ids in features.inputs[0]["input_ids"]] == [3, 3, 3]
    assert task.metrics(single * 2, [{"label": 2}, {"label": 0}]) == {"accuracy": 0.5}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (ChoiceExample("9", (("a", "b"), ("a", "c"), ("a", "d")), 0), "example 9 has 3 choices, expected 2"),
        (ChoiceExample("9", (("a", "b"), ("a", None)), 0), "example 9 has single texts and pairs"),
        (ChoiceExample("9", (("a", "b"), ("a", "c")), 2), "example 9 has the label 2, expected one from 0 to 1"),
        (ChoiceExample("9", (("a", "b"), ("a", "c"))), "example 9 has no label"),
        (TextExample("9", "a"), "example 9 is a TextExample, expected a ChoiceExample"),
    ],
)
def test_bad_examples_are_named(changed, message):
    task = MultipleChoice()

    def learn_and_tokenize():
        task.learn([*EXAMPLES, changed])
        task.features([*EXAMPLES, changed], TOKENIZER, labelled=True)

    with pytest.raises(ValueError, match=message):
        learn_and_tokenize()
    with pytest.raises(ValueError, match="example 0 has 1 choices, expected 2"):
        task.features([ChoiceExample("0", (("a", "b"),), 0)], TOKENIZER, labelled=False)

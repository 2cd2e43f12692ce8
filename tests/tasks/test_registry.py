"""Tasks by name, and task.json."""

import pytest

from bert_fast.tasks.classification import Classification
from bert_fast.tasks.multiple_choice import MultipleChoice
from bert_fast.tasks.registry import load_task, make_task, save_task
from bert_fast.tasks.tokens import TokenClassification


@pytest.mark.parametrize(
    "task",
    [
        Classification(("no", "ja, sicher"), "multi", 64, ("micro_f1",)),
        Classification(problem="regression"),
        TokenClassification(("B-Größe", "O"), 50, label_all_tokens=True),
        MultipleChoice(99),
    ],
)
def test_a_task_is_kept_beside_its_model(task, tmp_path):
    save_task(task, tmp_path)
    assert load_task(tmp_path) == task
    assert make_task(task.kind, **vars(task)) == task


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="the kind of task is 'summary', expected one of classification, tokens"):
        make_task("summary")
    with pytest.raises(ValueError, match="doc_stride is no option of classification, which takes labels, problem"):
        make_task("classification", doc_stride=3)
    with pytest.raises(ValueError, match=r"has no task.json: it is not a model that was fine-tuned here"):
        load_task(tmp_path)
    (tmp_path / "task.json").write_text('{"kind": 3}')
    with pytest.raises(ValueError, match="does not say what kind of task it is"):
        load_task(tmp_path)

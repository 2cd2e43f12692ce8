"""The carried MiniLM, fine-tuned on the files of examples/ for each kind of task, to a stated score."""

from pathlib import Path

import pytest

from bert_fast.recipes.finetune import FinetuneSettings, finetune

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:the checkpoint has no weights for this head"),
]

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    ("task", "data", "ending", "learning_rate", "epochs", "scores"),
    [
        ("classification", "reviews", "tsv", 2e-4, 2, {"accuracy": 0.85}),
        ("classification", "paraphrases", "jsonl", 2e-4, 4, {"accuracy": 0.6}),
        ("classification", "similarity", "tsv", 2e-4, 5, {"pearson": 0.4, "spearman": 0.4}),
        ("classification", "topics", "jsonl", 5e-4, 6, {"micro_f1": 0.7}),
        ("tokens", "entities", "txt", 3e-4, 5, {"f1": 0.75, "accuracy": 0.9}),
        ("multiple_choice", "endings", "csv", 1e-4, 4, {"accuracy": 0.5}),  # of four
    ],
)
def test_scores(task, data, ending, learning_rate, epochs, scores, tmp_path):
    """Bounds lie below what several seeds reach; chance is 0.5, 0.5, 0, about 0.4, 0.1 and 0.25."""
    arguments = {"learning_rate": learning_rate, "num_train_epochs": epochs, "per_device_train_batch_size": 8}
    arguments |= {"disable_tqdm": True, "plot_metrics": False, "eval_strategy": "no", "save_strategy": "no"}
    result = finetune(
        FinetuneSettings(
            model_name_or_path="demo",
            task=task,
            output_dir=str(tmp_path),
            train_file=str(EXAMPLES / data / f"train.{ending}"),
            validation_file=str(EXAMPLES / data / f"validation.{ending}"),
            arguments=arguments,
        )
    )
    reached = result.metrics["validation"]
    assert {name: reached[name] for name in scores if reached[name] < scores[name]} == {}

"""What the tests of search, distillation and transfer share: a few labelled texts, and settings of a short run."""

from pathlib import Path

from bert_fast.recipes.finetune import FinetuneSettings

GOOD = [
    "a good book",
    "good bread and a good view",
    "the film was good",
    "what a good idea",
    "good and warm",
    "so good",
]
BAD = ["a bad book", "bad bread and a bad view", "the film was bad", "what a bad idea", "bad and cold", "so bad"]

#: Of a run that lasts a moment.
SHORT = {
    "num_train_epochs": 2,
    "per_device_train_batch_size": 6,
    "learning_rate": 1e-2,
    "disable_tqdm": True,
    "plot_metrics": False,
    "use_cpu": True,
}


def file(path: Path, labelled: bool = True) -> str:
    """Twelve texts as tab-separated values."""
    rows = [
        f"{text}\t{label}"
        for pair in zip(GOOD, BAD, strict=True)
        for text, label in zip(pair, ("yes", "no"), strict=True)
    ]
    lines = ["sentence\tlabel", *rows] if labelled else ["sentence", *(row.split("\t")[0] for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def settings(model: Path, folder: Path, **arguments) -> FinetuneSettings:
    """Of a fine-tuning on these texts."""
    texts = file(folder.parent / "texts.tsv")
    return FinetuneSettings(str(model), "classification", str(folder), texts, texts, arguments={**SHORT, **arguments})

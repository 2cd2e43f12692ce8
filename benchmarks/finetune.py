"""Fine-tuning, whole: bert_fast's `finetune` beside transformers' `Trainer`, the same data, seeds and recipe.

    python -m benchmarks.finetune [--data mixed|short] [--seeds N] [--epochs N] [--batch_size N] [--bf16] [--threads N]
                                  [--contenders NAME ...]

The data are those of `examples/reviews`: "short", as they are, 9 to 19 tokens; or "mixed", several reviews of one kind
joined to texts whose lengths are as mixed as those of real ones, log-normal with median 32 and sigma 0.8, at most 256
tokens. The checkpoint is the demo; AdamW, linear schedule, dropout. transformers is the script `run_glue.py` without
its command line: padded to the longest text of a batch, or to `max_seq_length` as the script does if nothing else is
said. Timed is `Trainer.train()`, without evaluation and saving. Contenders take turns. The table has the accuracy on
the validation file, mean and standard deviation over the seeds, and the median of the seconds.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bert_fast.data.catalogue import read
from bert_fast.folders import resolve
from bert_fast.recipes.finetune import FinetuneSettings, finetune

SHORT = Path(__file__).parents[1] / "examples" / "reviews"

#: Of the texts of "mixed": how many, tokens of the median, sigma of the logarithm, and about how many a review has.
NUM_MIXED = {"train": 240, "validation": 200}
MEDIAN, SIGMA, REVIEW_TOKENS = 32, 0.8, 12.5

#: Tokens at which both cut a text.
MAX_SEQ_LENGTH = {"short": 128, "mixed": 256}

#: Of both trainers.
RECIPE: dict[str, Any] = {
    "learning_rate": 2e-4,
    "per_device_train_batch_size": 32,
    "weight_decay": 0.01,
    "warmup_steps": 0.1,
    "adam_epsilon": 1e-6,
    "eval_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "logging_strategy": "no",
    "dataloader_pin_memory": False,
}


@dataclass(frozen=True)
class Data:
    """The files of a run, and the tokens at which a text is cut."""

    train: str
    validation: str
    max_seq_length: int


def mixed(folder: Path) -> Data:
    """The reviews joined, in `folder`; the same files every time."""
    for split, count in NUM_MIXED.items():
        examples: Sequence[Any] = read("classification", str(SHORT / f"{split}.tsv")).examples
        draw = random.Random(split)
        lines = ["sentence\tlabel"]
        for _ in range(count):
            label = draw.choice(["negative", "positive"])
            reviews = max(1, round(draw.lognormvariate(math.log(MEDIAN), SIGMA) / REVIEW_TOKENS))
            texts = draw.choices([example.text for example in examples if example.label == label], k=reviews)
            lines.append(f"{' '.join(texts)}\t{label}")
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return Data(str(folder / "train.tsv"), str(folder / "validation.tsv"), MAX_SEQ_LENGTH["mixed"])


@dataclass(frozen=True)
class Trained:
    """A run: its accuracy on the validation file, and the seconds of its training."""

    accuracy: float
    seconds: float


def ours(data: Data, seed: int, epochs: float, folder: Path) -> Trained:
    """`bert_fast.recipes.finetune`."""
    arguments = {**RECIPE, "num_train_epochs": epochs, "seed": seed, "plot_metrics": False}
    result = finetune(
        FinetuneSettings(
            model_name_or_path="demo",
            task="classification",
            output_dir=str(folder),
            train_file=data.train,
            validation_file=data.validation,
            task_options={"max_seq_length": data.max_seq_length},
            arguments=arguments,
        )
    )
    return Trained(result.metrics["validation"]["accuracy"], result.seconds)


def theirs(data: Data, seed: int, epochs: float, folder: Path, padding: str) -> Trained:
    """transformers, padded to the "longest" text of a batch or to "max_length"."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(resolve("demo"))

    def features(file: str) -> list[dict[str, Any]]:
        examples: Sequence[Any] = read("classification", file).examples
        texts, pad = [example.text for example in examples], "max_length" if padding == "max_length" else False
        encoded = tokenizer(texts, truncation=True, max_length=data.max_seq_length, padding=pad)
        labels = [int(example.label == "positive") for example in examples]
        return [{**{k: encoded[k][n] for k in encoded}, "labels": label} for n, label in enumerate(labels)]

    transformers.set_seed(seed)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(resolve("demo"), num_labels=2)
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(str(folder), seed=seed, num_train_epochs=epochs, **RECIPE),
        train_dataset=features(data.train),
        data_collator=transformers.DataCollatorWithPadding(tokenizer, padding=padding, max_length=data.max_seq_length),
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    held_out = features(data.validation)
    said = trainer.predict(held_out).predictions.argmax(1)  # type: ignore[arg-type, union-attr]
    right = [bool(number == feature["labels"]) for number, feature in zip(said, held_out, strict=True)]
    return Trained(sum(right) / len(right), seconds)


CONTENDERS: dict[str, Callable[[Data, int, float, Path], Trained]] = {
    "bert_fast": ours,
    "transformers": partial(theirs, padding="longest"),
    "transformers, padded to max_seq_length": partial(theirs, padding="max_length"),
}


def compare(names: Sequence[str], data: str, seeds: Sequence[int], epochs: float) -> dict[str, list[Trained]]:
    """Run each contender with each seed, in turns; a first short run of each, which loads and compiles, is left out."""
    runs: dict[str, list[Trained]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the checkpoint has no weights for this head")
        short = Data(str(SHORT / "train.tsv"), str(SHORT / "validation.tsv"), MAX_SEQ_LENGTH["short"])
        files = mixed(Path(folder)) if data == "mixed" else short
        for number, seed in enumerate([None, *seeds]):
            for place, name in enumerate(names):
                of_run = Path(folder) / f"{number}-{place}"
                if seed is None:
                    CONTENDERS[name](files, 0, 0.1, of_run)
                else:
                    runs[name].append(CONTENDERS[name](files, seed, epochs, of_run))
                    print(f"{name}, seed {seed}: {runs[name][-1]}", flush=True)
    return runs


def table(runs: dict[str, list[Trained]]) -> str:
    """A line for each contender."""
    medians = {name: statistics.median(run.seconds for run in of_name) for name, of_name in runs.items()}
    fastest = medians[next(iter(medians))]
    width = max(map(len, runs))
    lines = [f"{'':{width}}  accuracy          seconds  against the first"]
    for name, of_name in runs.items():
        accuracies = [run.accuracy for run in of_name]
        spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
        score = f"{statistics.mean(accuracies):.3f} +- {spread:.3f}"
        lines.append(f"{name:{width}}  {score}  {medians[name]:9.2f}  {medians[name] / fastest:17.2f}")
    return "\n".join(lines)


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=list(MAX_SEQ_LENGTH), default="mixed")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each contender")
    parser.add_argument("--epochs", type=float, default=3, help="times through the training file")
    parser.add_argument("--batch_size", type=int, default=RECIPE["per_device_train_batch_size"], help="examples")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 products (autocast), of every contender")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads")
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS)[:2])
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    RECIPE.update(per_device_train_batch_size=arguments.batch_size, bf16=arguments.bf16)
    print(table(compare(arguments.contenders, arguments.data, range(arguments.seeds), arguments.epochs)))


if __name__ == "__main__":
    main()

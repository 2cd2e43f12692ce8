"""The data sets that are known by name: their labels, metrics, columns, files, and the options that fit them.

Labels stand in the order of the ids of published checkpoints, which is that of Hugging Face's `datasets`
(`datasets/glue/glue.py`, `conll2003.py`, `swag.py`, `imdb.py` of its repository); names are those of its `run_glue.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: role -> column. The roles of each kind are those of its reader.
Columns = Mapping[str, str]


@dataclass(frozen=True)
class Dataset:
    """What is known of a data set.

    Attributes:
        name: as `run_glue.py` spells it.
        kind: of task, as `bert_fast.tasks` names it.
        title: what it asks, in a few words.
        labels: names in the order of their ids; empty where there are none, or numbers.
        metrics: official ones, by the names of `bert_fast.tasks.metrics`; checkpoints are chosen by the first.
        splits: split -> names of its files, in the order in which they are looked for in the data set's folder.
        columns: role -> column, for each layout it is handed around in; the first whose texts a file has is its own.
        options: of the task, where they are not its defaults.
    """

    name: str
    kind: str
    title: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    splits: Mapping[str, tuple[str, ...]]
    columns: tuple[Columns, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


def _files(name: str, *official: str) -> tuple[str, ...]:
    """Official names, then those of Hugging Face's exports and of its Hub."""
    exports = (f"{name}{suffix}" for suffix in (".jsonl", ".json", ".csv", ".parquet", "-00000-of-00001.parquet"))
    return (*official, *exports)


def _glue(
    name: str,
    title: str,
    labels: tuple[str, ...],
    metrics: tuple[str, ...],
    *columns: tuple[str, ...],
    splits: Mapping[str, tuple[str, ...]] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Dataset:
    """One of GLUE; `columns` are (text, label) or (text, text_pair, label) of each layout."""
    standard = {
        "train": _files("train", "train.tsv"),
        "validation": _files("validation", "dev.tsv"),
        "test": _files("test", "test.tsv"),
    }
    roles = {2: ("text", "label"), 3: ("text", "text_pair", "label")}
    layouts = tuple(dict(zip(roles[len(layout)], layout, strict=True)) for layout in columns)
    options = {"max_seq_length": 128, **(options or {})}
    return Dataset(name, "classification", title, labels, metrics, splits or standard, layouts, options)


_SENTENCES = ("sentence1", "sentence2", "label")
_SQUAD_COLUMNS = ({"id": "id", "question": "question", "context": "context", "answers": "answers"},)
_SQUAD_OPTIONS = {
    "max_seq_length": 384,
    "doc_stride": 128,
    "max_query_length": 64,
    "n_best_size": 20,
    "max_answer_length": 30,
}


def _squad(name: str, title: str, version: str, **options: Any) -> Dataset:
    splits = {
        "train": _files("train", f"train-v{version}.json"),
        "validation": _files("validation", f"dev-v{version}.json"),
    }
    metrics = ("f1", "exact_match")
    return Dataset(
        name, "question_answering", title, (), metrics, splits, _SQUAD_COLUMNS, {**_SQUAD_OPTIONS, **options}
    )


_ENTITIES = ("PER", "ORG", "LOC", "MISC")

_ALL = (
    _glue(
        "cola",
        "is a sentence grammatical",
        ("unacceptable", "acceptable"),
        ("mcc",),
        ("sentence", "label"),
        splits={
            "train": _files("train", "train.tsv", "in_domain_train.tsv"),
            "validation": _files("validation", "dev.tsv", "in_domain_dev.tsv"),
            "test": _files("test", "test.tsv"),
        },
    ),
    _glue("sst2", "sentiment of a sentence", ("negative", "positive"), ("accuracy",), ("sentence", "label")),
    _glue(
        "mrpc",
        "do two sentences say the same",
        ("not_equivalent", "equivalent"),
        ("f1", "accuracy"),
        _SENTENCES,
        ("#1 String", "#2 String", "Quality"),
        splits={
            "train": _files("train", "train.tsv", "msr_paraphrase_train.txt"),
            "validation": _files("validation", "dev.tsv", "msr_paraphrase_train.txt"),
            "test": _files("test", "test.tsv", "msr_paraphrase_test.txt"),
        },
    ),
    _glue(
        "qqp",
        "do two questions ask the same",
        ("not_duplicate", "duplicate"),
        ("f1", "accuracy"),
        ("question1", "question2", "label"),
        ("question1", "question2", "is_duplicate"),
    ),
    _glue(
        "stsb",
        "similarity of two sentences, 0 to 5",
        (),
        ("pearson", "spearman"),
        _SENTENCES,
        ("sentence1", "sentence2", "score"),
        options={"problem": "regression"},
    ),
    _glue(
        "mnli",
        "does a premise entail a hypothesis",
        ("entailment", "neutral", "contradiction"),
        ("accuracy",),
        ("premise", "hypothesis", "label"),
        ("sentence1", "sentence2", "gold_label"),
        splits={
            "train": _files("train", "train.tsv", "multinli_1.0_train.txt"),
            "validation": _files("validation_matched", "dev_matched.tsv", "multinli_1.0_dev_matched.txt"),
            "validation_mismatched": _files(
                "validation_mismatched", "dev_mismatched.tsv", "multinli_1.0_dev_mismatched.txt"
            ),
            "test": _files("test_matched", "test_matched.tsv"),
            "test_mismatched": _files("test_mismatched", "test_mismatched.tsv"),
        },
    ),
    _glue(
        "qnli",
        "does a sentence hold the answer to a question",
        ("entailment", "not_entailment"),
        ("accuracy",),
        ("question", "sentence", "label"),
    ),
    _glue(
        "rte",
        "does a sentence entail another",
        ("entailment", "not_entailment"),
        ("accuracy",),
        _SENTENCES,
        ("premise", "hypothesis", "label"),
    ),
    _glue(
        "wnli",
        "does a sentence with its pronoun replaced follow",
        ("not_entailment", "entailment"),
        ("accuracy",),
        _SENTENCES,
    ),
    _squad("squad", "find the answer to a question in a paragraph", "1.1"),
    _squad("squad_v2", "the same, where there may be none", "2.0", version_2_with_negative=True),
    Dataset(
        "conll2003",
        "tokens",
        "persons, organisations, places and other names",
        ("O", *(f"{prefix}-{entity}" for entity in _ENTITIES for prefix in "BI")),
        ("f1", "precision", "recall", "accuracy"),
        {
            "train": _files("train", "eng.train", "train.txt"),
            "validation": _files("validation", "eng.testa", "valid.txt", "dev.txt"),
            "test": _files("test", "eng.testb", "test.txt"),
        },
        ({"words": "tokens", "tags": "ner_tags"}, {"words": "words", "tags": "tags"}),
        {"max_seq_length": 128},
    ),
    Dataset(
        "swag",
        "multiple_choice",
        "which of four endings goes on with a scene",
        (),
        ("accuracy",),
        {"train": _files("train"), "validation": ("val.csv", *_files("validation")), "test": _files("test")},
        (
            {
                "context": "sent1",
                "start": "sent2",
                "choices": "ending0,ending1,ending2,ending3",
                "label": "label",
            },
        ),
        {"max_seq_length": 128},
    ),
    Dataset(
        "imdb",
        "classification",
        "sentiment of a film review",
        ("neg", "pos"),
        ("accuracy",),
        {split: (f"{split}/pos", f"aclImdb/{split}/pos", "imdb.npz", *_files(split)) for split in ("train", "test")},
        ({"text": "text", "label": "label"}, {"text": "review", "label": "sentiment"}),
        {"max_seq_length": 512},
    ),
)

#: name -> what is known of it.
DATASETS: Mapping[str, Dataset] = {dataset.name: dataset for dataset in _ALL}

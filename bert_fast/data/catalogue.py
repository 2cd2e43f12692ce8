"""The data sets that are known by name: their labels, metrics, columns, files, and the options that fit them.

Labels stand in the order of the ids of published checkpoints, which is that of Hugging Face's `datasets`
(`datasets/glue/glue.py`, `conll2003.py`, `swag.py`, `imdb.py` of its repository); names are those of its `run_glue.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from bert_fast.data.classification import read_texts
from bert_fast.data.dataset import Dataset, Request
from bert_fast.data.examples import Examples
from bert_fast.data.glue import read_glue
from bert_fast.data.imdb import read_reviews
from bert_fast.data.multiple_choice import read_choices
from bert_fast.data.questions import read_questions
from bert_fast.data.sentences import read_text_tuples
from bert_fast.data.tables import open_table
from bert_fast.data.tokens import read_tokens


def _files(name: str, *official: str) -> tuple[str, ...]:
    """Official names, then those of Hugging Face's exports and of its Hub."""
    exports = (f"{name}{suffix}" for suffix in (".jsonl", ".json", ".csv", ".parquet", "-00000-of-00001.parquet"))
    return tuple(dict.fromkeys((*official, *exports)))


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
_SQUAD_COLUMNS = ({"question": "question", "context": "context", "answers": "answers"},)
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
            "train": _files("train", "train.tsv"),
            "validation": _files("validation_matched", "dev_matched.tsv"),
            "validation_mismatched": _files("validation_mismatched", "dev_mismatched.tsv"),
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
        {
            "train": _files("train", "train.csv"),
            "validation": _files("validation", "val.csv"),
            "test": _files("test", "test.csv"),
        },
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
        {split: (split, f"aclImdb/{split}", "imdb.npz", *_files(split)) for split in ("train", "test")},
        ({"text": "text", "label": "label"}, {"text": "review", "label": "sentiment"}),
        {"max_seq_length": 512},
    ),
)

#: name -> what is known of it.
DATASETS: Mapping[str, Dataset] = {dataset.name: dataset for dataset in _ALL}

Reader = Callable[..., Examples]


def _read_table(request: Request, **options: Any) -> Examples:
    return read_texts(open_table(request.path), request, **options)


#: kind -> how files of it are read, and the options that this has.
KINDS: Mapping[str, tuple[Reader, tuple[str, ...]]] = {
    "classification": (_read_table, ("problem", "label_delimiter")),
    "tokens": (read_tokens, ("iob1",)),
    "question_answering": (read_questions, ()),
    "multiple_choice": (read_choices, ()),
    "embeddings": (read_text_tuples, ("max_score",)),
}


def read(
    dataset_or_kind: str,
    path: str | Path,
    *,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    labelled: bool | None = None,
    **options: Any,
) -> Examples:
    """The examples of a file.

    Args:
        dataset_or_kind: a name of `DATASETS`, or a kind of task: "classification", "tokens", "question_answering",
            "multiple_choice", "embeddings".
        path: a csv, tsv, jsonl, json or parquet file, or one of the data set's own; for a data set also its folder.
        split: which file of the folder, as "train", "validation", "test", "validation_mismatched".
        columns: role -> column of the file, where they have other names than usual; the readers say which roles.
        labelled: True: an example without a label is an error; False: labels are not read; None: they are read where
            they are.
        options: of the kind: `problem` ("single", "multi", "regression") and `label_delimiter` for classification,
            `iob1` (whether tags are IOB1) for tokens, `max_score` (the score of equal texts) for embeddings.

    Returns:
        The examples in the order of the file, and how many were left out for which reason.

    Raises:
        ValueError: there is no such data set, kind, file in the folder or option; or the file is not what it should
            be: the message names the line, and what was expected.
        OSError: a file cannot be read.
    """
    dataset = DATASETS.get(dataset_or_kind)
    kind = dataset.kind if dataset else dataset_or_kind
    if kind not in KINDS:
        known = f"data sets: {', '.join(DATASETS)}; kinds: {', '.join(KINDS)}"
        raise ValueError(f"there is no data set and no kind of task {dataset_or_kind!r}; {known}")
    reader, known_options = KINDS[kind]
    if dataset is not None and kind == "classification":
        reader = read_reviews if dataset.name == "imdb" else read_glue
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in known_options:
            said = f"it has: {', '.join(known_options)}" if known_options else "it has none"
            raise ValueError(f"reading {kind} has no option {name!r}; {said}")
    path = Path(path)
    if path.is_dir():
        path = _in_folder(dataset, path, split)
    examples = reader(Request(path, split, columns or {}, labelled, dataset), **given)
    if not examples.examples:
        skipped = ", ".join(f"{count} left out ({reason})" for reason, count in examples.skipped.items())
        raise ValueError(f"{path} holds no examples{': ' if skipped else ''}{skipped}")
    return examples


def _in_folder(dataset: Dataset | None, folder: Path, split: str) -> Path:
    """The file of a split."""
    if dataset is None:
        raise ValueError(f"{folder} is a folder, expected a file")
    if dataset.name == "imdb" and (folder / "pos").is_dir():
        return folder
    names = dataset.splits.get(split)
    if names is None:
        raise ValueError(f"{dataset.name} has no split {split!r}; it has: {', '.join(dataset.splits)}")
    if (path := _found(names, folder)) is None:
        looked_for = ", ".join(names)
        raise ValueError(f"{folder} has no file of the split {split!r} of {dataset.name}; looked for: {looked_for}")
    return path


def _found(names: Iterable[str], folder: Path) -> Path | None:
    paths = (path for name in names for path in (folder / name, folder / f"{name}.gz"))
    return next((path for path in paths if path.exists()), None)


def splits_in(name: str, folder: str | Path) -> tuple[str, ...]:
    """The splits of a data set whose files are in a folder.

    Raises:
        ValueError: `name` is no data set, or the folder is not there or has nothing of it.
    """
    if name not in DATASETS:
        raise ValueError(f"{name} is no data set that has a folder; there are: {', '.join(DATASETS)}")
    found = tuple(split for split, names in DATASETS[name].splits.items() if _found(names, Path(folder)))
    if not found:
        names = [name for names in DATASETS[name].splits.values() for name in names]
        raise ValueError(f"{folder} is no folder with a file of {name}; looked for: {', '.join(names)}")
    return found

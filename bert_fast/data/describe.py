"""The catalogue and the examples of a file, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from bert_fast.data.catalogue import DATASETS
from bert_fast.data.examples import (
    ChoiceExample,
    Example,
    Examples,
    QuestionExample,
    SentencesExample,
    TextExample,
    TokensExample,
)

#: Labels that are counted one by one, the rest together.
MOST_LABELS = 20


def list_datasets() -> str:
    """A table of the catalogue: name, kind, metrics, labels."""
    rows = [("name", "kind", "metrics", "labels")]
    rows += [(d.name, d.kind, ", ".join(d.metrics), ", ".join(d.labels) or "-") for d in DATASETS.values()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def describe_dataset(name: str) -> str:
    """All that the catalogue says of a data set.

    Raises:
        ValueError: there is no such data set.
    """
    if name not in DATASETS:
        raise ValueError(f"there is no data set {name!r}; there are: {', '.join(DATASETS)}")
    dataset = DATASETS[name]
    lines = [
        f"{name}: {dataset.title}",
        f"  kind     {dataset.kind}",
        f"  labels   {', '.join(f'{index} {label}' for index, label in enumerate(dataset.labels)) or '-'}",
        f"  metrics  {', '.join(dataset.metrics)}",
        f"  options  {', '.join(f'{key} {value}' for key, value in dataset.options.items())}",
        "  columns  "
        + "; or ".join(", ".join(f"{role}={column}" for role, column in layout.items()) for layout in dataset.columns),
        "  files, the first that is there, .gz too:",
    ]
    width = max(map(len, dataset.splits))
    lines += [f"    {split.ljust(width)}  {', '.join(names)}" for split, names in dataset.splits.items()]
    return "\n".join(lines)


def describe_examples(found: Examples, num_shown: int = 3) -> str:
    """How many examples a file has, what their labels are, what was left out, and the first ones."""
    examples = found.examples
    lines = [f"{len(examples):,} examples", *_labels(examples)]
    lines += [f"left out: {count:,} ({reason})" for reason, count in found.skipped.items()]
    for example in examples[:num_shown]:
        lines += ["", f"id {example.id}", *(f"  {name:<8} {value}" for name, value in _fields(example))]
    return "\n".join(lines)


def _labels(examples: Sequence[Example]) -> list[str]:
    counts: Counter[str] = Counter()
    numbers: list[float] = []
    for example in examples:
        label = _label(example)
        if isinstance(label, float):
            numbers.append(label)
        else:
            counts.update(label)
    lines = []
    if numbers:
        mean = sum(numbers) / len(numbers)
        lines.append(f"scores: {min(numbers):g} to {max(numbers):g}, {mean:.3g} on average")
    if counts:
        told = [f"{label} {count:,}" for label, count in counts.most_common(MOST_LABELS)]
        told += [f"and {len(counts) - MOST_LABELS} others"] if len(counts) > MOST_LABELS else []
        lines.append(f"labels: {', '.join(told)}")
    return lines or ["labels: none"]


def _label(example: Example) -> float | Sequence[str]:
    """The number, or all names of classes, that an example is labelled with."""
    if isinstance(example, TokensExample):
        return example.tags or ()
    if isinstance(example, QuestionExample):
        return ["answer"] if example.answers else ["impossible"] if example.is_impossible else []
    value = example.score if isinstance(example, SentencesExample) else example.label
    if value is None or isinstance(value, (float, tuple)):
        return () if value is None else value
    return [str(value)]


def _fields(example: Example) -> Iterator[tuple[str, str]]:
    """(name, value) of what an example holds."""
    if isinstance(example, TokensExample):
        tags = example.tags or ("?",) * len(example.words)
        yield "words", " ".join(f"{word}/{tag}" for word, tag in zip(example.words, tags, strict=True))
    elif isinstance(example, QuestionExample):
        yield "question", example.question
        yield "context", example.context
        if example.answers or example.is_impossible:
            yield "answers", " | ".join(answer.text for answer in example.answers) or "impossible"
    elif isinstance(example, ChoiceExample):
        for index, (first, second) in enumerate(example.choices):
            mark = "*" if index == example.label else ""
            yield f"{index}{mark}", first if second is None else f"{first} | {second}"
    else:
        pair = example.text_pair if isinstance(example, TextExample) else None
        texts = example.texts if isinstance(example, SentencesExample) else (example.text, pair)
        yield from (("text", text) for text in texts if text is not None)
        value = example.score if isinstance(example, SentencesExample) else example.label
        if value is not None:
            yield "label", ", ".join(value) if isinstance(value, tuple) else str(value)

"""Predictions as the files that benchmarks and their scripts take."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from bert_fast.data.catalogue import DATASETS
from bert_fast.disk import text_written_at_once
from bert_fast.lines import decoded, json_value

#: GLUE's names of files by task; MNLI has one for each of its test sets, and AX is answered by a model of MNLI.
GLUE_FILES = {
    "cola": "CoLA.tsv",
    "sst2": "SST-2.tsv",
    "mrpc": "MRPC.tsv",
    "stsb": "STS-B.tsv",
    "qqp": "QQP.tsv",
    "mnli": "MNLI-m.tsv",
    "mnli_mismatched": "MNLI-mm.tsv",
    "ax": "AX.tsv",
    "qnli": "QNLI.tsv",
    "rte": "RTE.tsv",
    "wnli": "WNLI.tsv",
}
#: Those whose labels are written by name; the others' are numbers.
NAMED = frozenset({"mnli", "mnli_mismatched", "ax", "qnli", "rte"})
#: Data set whose labels a benchmark has that is none of the catalogue's.
LABELS_OF = {"mnli_mismatched": "mnli"}
#: What `write_submission` knows.
BENCHMARKS = (*GLUE_FILES, "squad", "squad_v2", "conll2003", "swag", "imdb")

Line = Mapping[str, Any]


def read_predictions(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a file that `finetune`, `evaluate` or `predict` left.

    Raises:
        ValueError: a line is no object with an `id`, or an id is there twice; the message names the line.
    """
    lines: list[dict[str, Any]] = []
    seen: dict[str, int] = {}
    with Path(path).open("rb") as file:
        for number, (where, text) in enumerate(decoded(file, str(path)), 1):
            line = json_value(text, where)
            if not isinstance(line, dict) or "id" not in line:
                raise ValueError(f"{where} is no prediction: it has no id")
            if (first := seen.setdefault(str(line["id"]), number)) != number:
                raise ValueError(f"{where} has the id {line['id']!r}, as line {first} has")
            lines.append(line)
    if not lines:
        raise ValueError(f"{path} has no predictions")
    return lines


def check_benchmark(name: str) -> None:
    """ValueError for a name that is none of `BENCHMARKS`."""
    if name not in BENCHMARKS:
        raise ValueError(f"the benchmark is {name!r}, expected one of {', '.join(BENCHMARKS)}")


def write_submission(benchmark: str, predictions: Sequence[Line], output_dir: str | Path) -> list[Path]:
    """Write what a benchmark takes.

    - GLUE: `CoLA.tsv` and so on, lines of `index` and `prediction`; labels are numbers or names as GLUE has them,
      STS-B's numbers are cut to 0..5.
    - SQuAD: `predictions.json`, id -> answer; for 2.0 also `na_prob.json`, id -> how likely there is no answer, the
      `--na-prob-file` of its script.
    - CoNLL-2003: `conll2003.txt`, a line of word, expected and predicted tag for each word, as `conlleval` reads it.
    - SWAG: `swag.csv`, row and `pred`. IMDB: `imdb.csv`, `id` and `sentiment`, 1 for a positive one.

    Args:
        benchmark: one of `BENCHMARKS`.
        predictions: in the order of the benchmark's file, as `read_predictions` gives them.
        output_dir: is made if it is not there.

    Returns:
        The files.

    Raises:
        ValueError: the benchmark is unknown, or a prediction is not one for it; the message names its id.
    """
    check_benchmark(benchmark)
    files = _files(benchmark, predictions)
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for name, write in files.items():
        with text_written_at_once(folder / name) as file:
            write(file)
    return [folder / name for name in files]


def _files(benchmark: str, predictions: Sequence[Line]) -> dict[str, Callable[[TextIO], object]]:
    """Name of each file -> what writes it; everything is checked before."""
    if benchmark in GLUE_FILES:
        rows = [(line["id"], _label(benchmark, line)) for line in predictions]
        return {GLUE_FILES[benchmark]: lambda file: _table(file, ("index", "prediction"), rows, "\t")}
    if benchmark.startswith("squad"):
        answers = {line["id"]: _field(line, "answer") for line in predictions}
        files: dict[str, Callable[[TextIO], object]] = {"predictions.json": lambda file: _json(file, answers)}
        if benchmark == "squad_v2":
            odds = {line["id"]: _probability(_field(line, "null_score")) for line in predictions}
            files["na_prob.json"] = lambda file: _json(file, odds)
        return files
    if benchmark == "conll2003":
        sentences = [_conll(line) for line in predictions]
        return {"conll2003.txt": lambda file: file.write("\n".join(sentences))}
    if benchmark == "swag":
        choices = [(line["id"], _field(line, "label")) for line in predictions]
        return {"swag.csv": lambda file: _table(file, ("", "pred"), choices, ",")}
    reviews = [(line["id"], _label(benchmark, line)) for line in predictions]
    return {"imdb.csv": lambda file: _table(file, ("id", "sentiment"), reviews, ",")}


def _field(line: Line, name: str) -> Any:
    if name not in line:
        raise ValueError(f"the prediction {line['id']!r} has no {name}, only {', '.join(line)}")
    return line[name]


def _label(benchmark: str, line: Line) -> str | int:
    label = _field(line, "label")
    if benchmark == "stsb":
        if not isinstance(label, int | float) or not math.isfinite(label):
            raise ValueError(f"the prediction {line['id']!r} is {label!r}, expected a number")
        return f"{min(max(label, 0.0), 5.0):.3f}"
    labels = DATASETS[LABELS_OF.get(benchmark, benchmark)].labels
    if label not in labels:
        raise ValueError(f"the prediction {line['id']!r} is {label!r}, expected one of {', '.join(labels)}")
    return str(label) if benchmark in NAMED else labels.index(label)


def _probability(log_odds: float) -> float:
    """1 / (1 + exp(-x)), which rises with the null score and so keeps the order of the thresholds."""
    return 0.5 * (1 + math.tanh(log_odds / 2))


def _conll(line: Line) -> str:
    """The lines of a sentence."""
    tags = _field(line, "tags")
    example = _field(line, "example")
    words, expected = example.get("words"), example.get("tags")
    if words is None or expected is None:
        raise ValueError(
            f"the prediction {line['id']!r} has no words with expected tags in its example, which conlleval compares "
            "with: evaluate writes them, predict does not"
        )
    return "".join(f"{w} {e} {t}\n" for w, e, t in zip(words, expected, tags, strict=True))


def _table(file: TextIO, header: Sequence[str], rows: Iterable[Sequence[Any]], delimiter: str) -> None:
    writer = csv.writer(file, delimiter=delimiter, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)


def _json(file: TextIO, value: Any) -> None:
    json.dump(value, file, ensure_ascii=False)
    file.write("\n")

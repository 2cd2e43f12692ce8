"""Questions on texts: SQuAD's JSON, and any file of rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from bert_fast.data.columns import Cells, find_columns, layouts_of
from bert_fast.data.dataset import Columns, Request
from bert_fast.data.examples import Answer, Examples, QuestionExample
from bert_fast.data.tables import format_of, load_json, open_table

LAYOUTS: tuple[Columns, ...] = (
    {"question": "question", "context": "context", "answer_start": "answer_start"},
    {"question": "question", "context": "context"},
)
TARGETS = ("answers", "answer")

NOT_IN_CONTEXT = "the answer is not in its context"
NOT_AT_ITS_PLACE = "the answer is not where its offset says"
ONE_OF_SEVERAL = "one of several answers is not in the context (the question stays)"
NO_ANSWER = "no answer, and not said to be impossible"


class _Question(NamedTuple):
    """A question as a file has it; `answers` are (text, place or None), None where the file does not speak of them."""

    where: str
    id: str
    question: str
    context: str
    answers: list[tuple[str, int | None]] | None
    is_impossible: bool | None


def read_questions(request: Request) -> Examples:
    """The questions of a file.

    Of an answer without a place the first occurrence counts. One without answers is impossible, unless the file says
    that it is not.

    What is learnt is where an answer is: of the split train, questions whose answers are not in their contexts are
    counted and left out, and so are answers. What is evaluated is what an answer says: of the other splits all answers
    of all questions count, as in SQuAD's scripts, and those that are not found have the place -1. (Its script for 2.0
    takes no answers as "impossible", too, whatever else the file says.)

    Args:
        request: roles of files of rows are `question`, `context`, `answers`, `answer_start`, `id`. Answers are
            `{"text": [...], "answer_start": [...]}`, a list of such answers, a list of texts, or a text.

    Raises:
        ValueError: something is missing, or two questions have one id; the message names the place.
    """
    questions = _read_nested(request) if format_of(request.path) == "json" else None
    skipped: Counter[str] = Counter()
    seen: dict[str, str] = {}
    examples = []
    for question in questions or _read_rows(request):
        if seen.setdefault(question.id, question.where) != question.where:
            raise ValueError(f"{question.where} has the id {question.id!r}, as {seen[question.id]} has")
        example = _example(question, request, skipped)
        if example is not None:
            examples.append(example)
    return Examples(tuple(examples), dict(skipped))


def _example(question: _Question, request: Request, skipped: Counter[str]) -> QuestionExample | None:
    where, name, text, context, answers, impossible = question
    labelled, is_learnt = request.labelled, request.split == "train"
    if labelled is False or (answers is None and not impossible):
        if labelled:
            raise ValueError(f"{where} has no answers")
        return QuestionExample(name, text, context)
    if impossible or (not answers and (impossible is None or not is_learnt)):
        return QuestionExample(name, text, context, is_impossible=True)
    if not answers:
        skipped[NO_ANSWER] += 1
        return None
    placed = [Answer(answer, _place(answer, start, context)) for answer, start in answers]
    found = tuple(answer for answer in placed if answer.start >= 0)
    if not is_learnt:
        return QuestionExample(name, text, context, tuple(placed))
    if found:
        skipped.update({ONE_OF_SEVERAL: 1} if len(found) < len(placed) else {})
        return QuestionExample(name, text, context, found)
    skipped[NOT_AT_ITS_PLACE if any(answer and answer in context for answer, _ in answers) else NOT_IN_CONTEXT] += 1
    return None


def _place(answer: str, start: int | None, context: str) -> int:
    """Where an answer begins, -1 if it is not there."""
    if not answer:
        return -1
    if start is None:
        return context.find(answer)
    return start if start >= 0 and context.startswith(answer, start) else -1


def _read_nested(request: Request) -> Iterator[_Question] | None:
    """SQuAD's own form; None for a list of flat objects."""
    value = load_json(request.path)
    data = value.get("data") if isinstance(value, dict) else None
    if not isinstance(data, list) or not data or not isinstance(data[0], dict) or "paragraphs" not in data[0]:
        return None
    return _walk(str(request.path), data)


def _walk(path: str, data: Sequence[Any]) -> Iterator[_Question]:
    for i, article in enumerate(data):
        for j, paragraph in enumerate(_get(article, "paragraphs", list, f"{path}, data[{i}]")):
            place = f"{path}, data[{i}].paragraphs[{j}]"
            context = _get(paragraph, "context", str, place)
            for k, qa in enumerate(_get(paragraph, "qas", list, place)):
                where = f"{place}.qas[{k}]"
                name, question = str(_get(qa, "id", (str, int), where)), _get(qa, "question", str, where)
                answers = _answers(qa["answers"], where) if qa.get("answers") is not None else None
                yield _Question(where, name, question, context, answers, qa.get("is_impossible"))


def _get(value: Any, key: str, kind: Any, where: str) -> Any:
    if not isinstance(value, dict) or key not in value:
        has = f"it has: {', '.join(map(repr, value))}" if isinstance(value, dict) else "it is no object"
        raise ValueError(f"{where} has no {key!r}; {has}")
    if not isinstance(value[key], kind):
        raise ValueError(f"{where}: {key!r} is a {type(value[key]).__name__}")
    return value[key]


def _read_rows(request: Request) -> Iterator[_Question]:
    table = open_table(request.path)
    layouts, targets = layouts_of(request.dataset, "answers") if request.dataset else (LAYOUTS, TARGETS)
    columns = find_columns(table, request, layouts, "answers", targets)
    cells = Cells(table, columns, ("answer_start",) if request.labelled else ("answer_start", "answers"))
    for number, name, row in cells.rows():
        where = table.where(number)
        answers = _answers(cells.get(row, "answers", number), where) if "answers" in cells else None
        start = cells.get(row, "answer_start", number)
        if answers and start not in (None, ""):
            answers = [(answers[0][0], _integer(start, where))]
        impossible = row.get("is_impossible")
        yield _Question(
            where,
            name,
            cells.text(row, "question", number),
            cells.text(row, "context", number),
            answers,
            impossible if isinstance(impossible, bool) else None,
        )


def _answers(value: Any, where: str) -> list[tuple[str, int | None]]:
    """(text, place or None) of each answer, in any of the forms that files have."""
    if isinstance(value, str) and value[:1] in ("{", "["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return [(value, None)]
    if value is None or value == "":
        return []
    if isinstance(value, str):
        return [(value, None)]
    if isinstance(value, dict):
        texts, starts = value.get("text"), value.get("answer_start")
        if isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts):
            value = [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]
        else:
            value = [value]
    answers = []
    for answer in value if isinstance(value, list) else [None]:
        answer = {"text": answer} if isinstance(answer, str) else answer
        if not isinstance(answer, dict) or not isinstance(answer.get("text"), str):
            raise ValueError(f'{where}: an answer is {answer!r}, expected {{"text": ..., "answer_start": ...}}')
        start = answer.get("answer_start")
        answers.append((answer["text"], None if start is None else _integer(start, where)))
    return answers


def _integer(value: Any, where: str) -> int:
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{where}: the place of an answer is {value!r}, expected a number of characters") from None

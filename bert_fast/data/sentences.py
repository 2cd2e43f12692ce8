"""Texts whose vectors are to be near each other: pairs, triplets, pairs with a score."""

from __future__ import annotations

import math

from bert_fast.data.columns import Cells, find_columns
from bert_fast.data.dataset import Columns, Request
from bert_fast.data.examples import Examples, SentencesExample
from bert_fast.data.tables import open_table

LAYOUTS: tuple[Columns, ...] = (
    {"anchor": "anchor", "positive": "positive", "negative": "negative"},
    {"anchor": "anchor", "positive": "positive"},
    {"anchor": "sentence1", "positive": "sentence2"},
    {"anchor": "text", "positive": "text_pair"},
)
TARGETS = ("score", "similarity")


def read_text_tuples(request: Request, *, max_score: float = 1.0) -> Examples:
    """The pairs or triplets of a file.

    Args:
        request: roles are `anchor`, `positive`, `negative`, `score`, `id`. A score is read where there is one, and
            never asked for.
        max_score: the score of texts that mean the same, 5 in STS; scores are divided by it.

    Raises:
        ValueError: a column is missing, or a score is no number, or not between -1 and 1 when it is divided.
    """
    if not (math.isfinite(max_score) and max_score > 0):
        raise ValueError(f"max_score is {max_score}, expected a number above 0")
    table = open_table(request.path)
    wanted = Request(request.path, request.split, request.columns, False if request.labelled is False else None)
    cells = Cells(table, find_columns(table, wanted, LAYOUTS, "score", TARGETS))
    roles = [role for role in ("anchor", "positive", "negative") if role in cells]
    examples = []
    for number, name, row in cells.rows():
        texts = tuple(cells.text(row, role, number) for role in roles)
        score = None
        if "score" in cells:
            value = cells.get(row, "score", number)
            try:
                score = float(value) / max_score
            except (TypeError, ValueError, OverflowError):
                raise cells.wrong("score", number, value, "a number") from None
            if not -1 <= score <= 1:
                raise cells.wrong("score", number, value, f"a number from {-max_score:g} to {max_score:g}, max_score")
        examples.append(SentencesExample(name, texts, score))
    return Examples(tuple(examples), dict(table.skipped))

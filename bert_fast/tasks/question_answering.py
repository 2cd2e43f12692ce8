"""The part of a context that answers a question, or that there is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bert_fast.data.examples import Answer, QuestionExample
from bert_fast.tasks._batches import CHUNK, rows_of_each, softmax
from bert_fast.tasks._spans import Frame, Window, best_spans, null_span, window_bounds
from bert_fast.tasks._task import Features, Output, Prediction, Task, check_examples
from bert_fast.tasks.metrics import best_thresholds, squad_scores
from bert_fast.tokenization import Tokenizer


@dataclass
class QuestionAnswering(Task):
    """Answers as SQuAD's (Devlin et al., 2018, sections 4.2 and 4.3), by the rules of Google's `run_squad.py`.

    A context that is too long for the model is read in windows, and the likeliest answer of all of them is given. Where
    an answer begins and ends is kept in characters, so that it is always a part of the context as it was given.

    Attributes:
        max_seq_length: tokens of a question and a window, special tokens included.
        doc_stride: tokens from the beginning of a window to that of the next one. (transformers' `run_qa.py` takes its
            option of this name as the number of tokens that two windows share.)
        max_query_length: tokens of a question; what is longer is cut off, and counted.
        n_best_size: how many starts and ends of each window are combined, and how many answers a prediction has.
        max_answer_length: tokens of an answer.
        version_2_with_negative: whether a context may have no answer, as in SQuAD 2.0.
        null_score_diff_threshold: by how much "there is no answer" must be likelier than the best answer to be given.
    """

    kind: ClassVar[str] = "question_answering"
    head: ClassVar[str] = "question_answering"

    max_seq_length: int = 384
    doc_stride: int = 128
    max_query_length: int = 64
    n_best_size: int = 20
    max_answer_length: int = 30
    version_2_with_negative: bool = False
    null_score_diff_threshold: float = 0.0

    def __post_init__(self) -> None:
        for name in ("max_seq_length", "doc_stride", "max_query_length", "n_best_size", "max_answer_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")

    @property
    def main_metric(self) -> str:
        """F1 of the words of an answer."""
        return "f1"

    def learn(self, examples: Sequence[Any]) -> None:
        """See `Task`; there is nothing to learn, but all must have an answer in their context or be known to have none.

        Raises:
            ValueError: one has not.
        """
        check_examples(examples, QuestionExample)
        for example in examples:
            self._answer(example)

    def _answer(self, example: QuestionExample) -> Answer | None:
        """The answer to learn, None for "there is no answer"."""
        if example.is_impossible:
            if not self.version_2_with_negative:
                raise ValueError(f"question {example.id} has no answer: set version_2_with_negative to learn that, too")
            return None
        if not example.answers:
            raise ValueError(f"question {example.id} has no answer, and is not said to have none")
        answer = example.answers[0]
        found = example.context[answer.start : answer.start + len(answer.text)] if answer.start >= 0 else ""
        if not answer.text.strip() or found != answer.text:
            raise ValueError(
                f"the answer {answer.text!r} to question {example.id} is not at character {answer.start} of its "
                f"context, which has {found!r} there"
            )
        return answer

    def config(self) -> dict[str, Any]:
        """See `Task`; a score for the start and one for the end."""
        return {"id2label": {0: "LABEL_0", 1: "LABEL_1"}, "problem_type": None}

    def features(self, examples: Sequence[Any], tokenizer: Tokenizer, *, labelled: bool) -> Features:
        """See `Task`; a feature for each window, whose extra is the `Window`.

        With labels, `start_positions` and `end_positions` of the first answer; both are 0, [CLS], where it is not whole
        in the window, or there is none.
        """
        frame = Frame.of(tokenizer)
        limit = min(self.max_seq_length, tokenizer.model_max_length or self.max_seq_length)
        if limit <= self.max_query_length + frame.num_special:
            raise ValueError(
                f"max_seq_length is {limit}, which leaves no room for a context beside a question of max_query_length "
                f"{self.max_query_length} and {frame.num_special} special tokens"
            )
        inputs: list[dict[str, Any]] = []
        owners: list[int] = []
        windows: list[Window] = []
        num_truncated = 0
        for start in range(0, len(examples), CHUNK):
            chunk = examples[start : start + CHUNK]
            questions = _encode([example.question for example in chunk], tokenizer)
            contexts = _encode([example.context for example in chunk], tokenizer)
            for number, example in enumerate(chunk, start):
                question, (context, offsets) = questions[example.question][0], contexts[example.context]
                num_truncated += len(question) > self.max_query_length
                question = question[: self.max_query_length]
                target = self._target(example, offsets) if labelled else None
                column = len(frame.before) + len(question) + len(frame.between)
                room = limit - frame.num_special - len(question)
                for first, stop in window_bounds(len(context), room, self.doc_stride):
                    feature: dict[str, Any] = frame.join(question, context[first:stop])
                    if labelled:
                        places = [0, 0]
                        if target is not None and first <= target[0] and target[1] < stop:
                            places = [column - first + token for token in target]
                        feature["start_positions"], feature["end_positions"] = places
                    inputs.append(feature)
                    owners.append(number)
                    windows.append(Window(column, first, offsets[first:stop]))
        return Features(inputs, np.array(owners, np.int64), windows, num_truncated)

    def _target(self, example: QuestionExample, offsets: NDArray[np.int64]) -> tuple[int, int] | None:
        """First and last token of the answer in the context; None for "there is no answer"."""
        answer = self._answer(example)
        if answer is None:
            return None
        touched = (offsets[:, 0] < answer.start + len(answer.text)) & (offsets[:, 1] > answer.start)
        tokens = touched.nonzero()[0]
        if not len(tokens):
            raise ValueError(f"the answer {answer.text!r} to question {example.id} has no token")
        return int(tokens[0]), int(tokens[-1])

    def outputs(self, model: nn.Module, batch: Mapping[str, Any]) -> list[Output]:
        """See `Task`; logits of the start and of the end, (num_tokens,) each."""
        output = model(**batch)
        both = torch.stack([output.start_logits, output.end_logits], dim=-1)
        return [(rows[:, 0], rows[:, 1]) for rows in rows_of_each(both, batch)]

    def predictions(self, examples: Sequence[Any], features: Features, outputs: Sequence[Output]) -> list[Prediction]:
        """See `Task`.

        Each has its `answer`, "" for none, where it is in the context, `start` to `end` in characters, and its `score`,
        a probability among those of `n_best`. With `version_2_with_negative` also `null_score`, the score of "there is
        no answer" minus that of `best_answer`, which is the best one whatever that score.
        """
        bounds = np.searchsorted(features.owners, np.arange(len(examples) + 1))
        said = []
        for example, start, stop in zip(examples, bounds, bounds[1:], strict=False):
            said.append(self._prediction(example, features.extras[start:stop], outputs[start:stop]))
        return said

    def _prediction(self, example: QuestionExample, windows: Sequence[Window], outputs: Sequence[Output]) -> Prediction:
        null = null_span(outputs) if self.version_2_with_negative else None
        sizes = {"n_best_size": self.n_best_size, "max_answer_length": self.max_answer_length}
        spans = best_spans(example.context, windows, outputs, **sizes, null=null)
        scores = softmax(np.array([span.score for span in spans])).tolist() if spans else []
        n_best = [
            {
                "answer": span.text(example.context),
                "start": span.start,
                "end": span.end,
                "score": score,
                "start_logit": span.start_logit,
                "end_logit": span.end_logit,
            }
            for span, score in zip(spans, scores, strict=True)
        ]
        # Of the likeliest starts and ends no two may fit: nothing is said then, with no confidence.
        nothing = {"answer": "", "start": None, "end": None, "score": 0.0}
        best: dict[str, Any] = next((entry for entry in n_best if entry["answer"]), nothing)
        chosen, negative = best, {}
        if null is not None:
            difference = null.score - (best["start_logit"] + best["end_logit"] if best is not nothing else 0.0)
            negative = {"null_score": difference, "best_answer": best["answer"]}
            if difference > self.null_score_diff_threshold or best is nothing:
                chosen = next(entry for entry in n_best if not entry["answer"])
        return {"id": example.id, **{name: chosen[name] for name in nothing}, **negative, "n_best": n_best}

    def metrics(self, examples: Sequence[Any], predictions: Sequence[Prediction]) -> dict[str, float]:
        """See `Task`; as SQuAD's scripts, over the questions whose answers are known, or known not to be.

        Raises:
            ValueError: an id is there twice, or a prediction is for none of the questions.
        """
        _check_ids("question", [example.id for example in examples])
        _check_ids("prediction", [prediction["id"] for prediction in predictions])
        known = {
            example.id: [] if example.is_impossible else [answer.text for answer in example.answers]
            for example in examples
            if example.answers or example.is_impossible
        }
        unknown = {example.id for example in examples} - set(known)
        said = {p["id"]: p for p in predictions if p["id"] not in unknown}
        answers = {id: prediction["answer"] for id, prediction in said.items()}
        scores = squad_scores(known, answers, version_2_with_negative=self.version_2_with_negative)
        if self.version_2_with_negative and said.keys() == known.keys():
            best = {id: prediction["best_answer"] for id, prediction in said.items()}
            scores |= best_thresholds(known, best, {id: prediction["null_score"] for id, prediction in said.items()})
        return scores


def _encode(texts: Sequence[str], tokenizer: Tokenizer) -> dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Of each text, once: its tokens, (num_tokens,), and their characters, (num_tokens, 2)."""
    different = list(dict.fromkeys(texts))
    tokens, offsets = tokenizer.encode_offsets(different)
    ends = tokens.lengths.cumsum()
    return {
        text: (tokens.input_ids[start:end], offsets[start:end])
        for text, start, end in zip(different, ends - tokens.lengths, ends, strict=True)
    }


def _check_ids(what: str, ids: Sequence[str]) -> None:
    seen: set[str] = set()
    for id in ids:
        if id in seen:
            raise ValueError(f"there are two {what}s with the id {id!r}")
        seen.add(id)

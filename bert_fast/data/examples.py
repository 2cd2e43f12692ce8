"""An example of each kind of task, as the readers of files give it and the tasks take it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TextExample:
    """A text, or a pair of texts, and what is to be said of it.

    Attributes:
        id: unique in its file.
        text, text_pair: the pair is None for a single text.
        label: the name of a class; a number, for regression; the names of all classes that apply, where several may;
            None where it is not known.
    """

    id: str
    text: str
    text_pair: str | None = None
    label: str | float | tuple[str, ...] | None = None


@dataclass(frozen=True)
class TokensExample:
    """Words, and a tag for each.

    Attributes:
        id: unique in its file.
        words: (num_words,).
        tags: (num_words,), as B-PER, I-PER and O; None where they are not known.
    """

    id: str
    words: tuple[str, ...]
    tags: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Answer:
    """A part of a context: `context[start : start + len(text)] == text`, in characters.

    In evaluation `start` may be -1, for an answer that is not found in its context, but counts as right all the same.
    """

    text: str
    start: int


@dataclass(frozen=True)
class QuestionExample:
    """A question, and the text that holds its answer.

    Attributes:
        id: as the file has it.
        question, context: texts.
        answers: one in training; all that count as right in evaluation; empty where there is none, or none is known.
        is_impossible: whether it is known that the context has no answer (SQuAD 2.0).
    """

    id: str
    question: str
    context: str
    answers: tuple[Answer, ...] = ()
    is_impossible: bool = False


@dataclass(frozen=True)
class ChoiceExample:
    """Several texts or pairs of texts, one of which is right.

    Attributes:
        id: unique in its file.
        choices: (num_choices,) pairs of texts; the second one is None for single texts.
        label: number of the right one; None where it is not known.
    """

    id: str
    choices: tuple[tuple[str, str | None], ...]
    label: int | None = None


@dataclass(frozen=True)
class SentencesExample:
    """Texts whose vectors are to be near each other, or not.

    Attributes:
        id: unique in its file.
        texts: two (anchor, positive), or three with a negative one.
        score: how near two texts are to be, between -1 and 1; None where they are simply to be near.
    """

    id: str
    texts: tuple[str, ...]
    score: float | None = None


Example = TextExample | TokensExample | QuestionExample | ChoiceExample | SentencesExample


@dataclass(frozen=True)
class Examples:
    """What a file had.

    Attributes:
        examples: in the order of the file, all of one kind.
        skipped: reason -> how many were left out for it, as "the answer is not in its context".
    """

    examples: tuple[Example, ...]
    skipped: dict[str, int]

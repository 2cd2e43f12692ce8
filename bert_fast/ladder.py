"""What becomes of a word that WordPiece finds no pieces for: the steps between that and [UNK].

1. Sub-words: WordPiece's own longest matches. Only a word that they do not cover comes further.
2. Characters: the word is spelled, each character as the token or the ##-piece that the vocabulary has.
3. Extension: `bert_fast.vocabulary.extension` changes the vocabulary itself, before any text is read.
4. Entities: a dictionary of the caller's says in other words what the vocabulary has none for.
5. [UNK], counted by `TokenBatch.num_unknown`: in the place of the whole word, or of the characters that are missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers.models import WordPiece

from bert_fast.lines import decoded

#: What a tokenizer does with a word that it has no pieces for.
POLICIES = ("unk", "characters")


@dataclass(frozen=True)
class Tokens:
    """The tokens of a text, by the names that the library's `Encoding` has for them."""

    ids: list[int]
    type_ids: list[int]
    overflowing: bool

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class _Token:
    id: int
    type_id: int
    sequence: int | None  # of the text or the pair, None for a special token around them


class Ladder:
    """The steps below sub-words, for the texts that need them.

    Args:
        backend: a WordPiece tokenizer that neither pads nor truncates.
        spell: whether words are spelled (step 2). A run of characters that the vocabulary lacks is one [UNK].
        entities: mention -> what to read instead (step 4). A mention may be several words. It is found in a text
            as the tokenizer normalises both, where one of its words would else be, or hold, an [UNK]; the longest wins.

    Raises:
        ValueError: the backend is no WordPiece tokenizer; a mention or what replaces it is empty; two mentions are the
            same to the tokenizer and are replaced by different texts.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, spell: bool, entities: Mapping[str, str]) -> None:
        model = backend.model
        if not isinstance(model, WordPiece):
            raise ValueError(f"the tokenizer is a {type(model).__name__}, expected WordPiece")
        self._backend = backend
        self._vocab = backend.get_vocab()
        self._unk_token, self._prefix = model.unk_token, model.continuing_subword_prefix
        self._unk = self._vocab[self._unk_token]
        self._spell = spell
        self._entities: dict[tuple[str, ...], str] = {}
        for mention, replacement in entities.items():
            words = tuple(self._words(mention))
            if not words or not replacement.strip():
                raise ValueError(f"entity {mention!r} -> {replacement!r}: neither may be empty")
            if self._entities.setdefault(words, replacement) != replacement:
                raise ValueError(
                    f"entity {mention!r} is to be {replacement!r} and, as another mention that the tokenizer takes for "
                    f"the same, {self._entities[words]!r}"
                )
        self._most_words = max(map(len, self._entities), default=0)

    def climb(
        self,
        texts: Sequence[str | tuple[str, str]],
        encodings: Sequence[tokenizers.Encoding],
        max_length: int | None,
    ) -> list[tokenizers.Encoding | Tokens]:
        """The encodings, but for texts with an [UNK] what the ladder makes of them.

        Args:
            texts: texts or pairs.
            encodings: (num_texts,) of them, cut to `max_length`.
            max_length: the most tokens of a text; a pair loses tokens from its longer text first, as in the library.
        """
        return [
            self._climbed(text, max_length) if self._has_unknown(encoding) else encoding
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    def _has_unknown(self, encoding: tokenizers.Encoding) -> bool:
        """Also in what was cut off: with fewer tokens it may not have to be."""
        return self._unk in encoding.ids or any(self._unk in part.ids for part in encoding.overflowing)

    def _climbed(self, text: str | tuple[str, str], max_length: int | None) -> Tokens:
        parts = list(text) if isinstance(text, tuple) else [text]
        encoding = self._encode(parts)
        if self._entities:
            mapped = [self._mapped(part, encoding, sequence) for sequence, part in enumerate(parts)]
            if mapped != parts:
                parts, encoding = mapped, self._encode(mapped)
        tokens = []
        for id, type_id, sequence, (start, end) in zip(
            encoding.ids, encoding.type_ids, encoding.sequence_ids, encoding.offsets, strict=True
        ):
            spelled = [id]
            if self._spell and id == self._unk and sequence is not None:
                spelled = self._spelling(parts[sequence][start:end])
            tokens += [_Token(piece, type_id, sequence) for piece in spelled]
        kept = _cut(tokens, max_length)
        return Tokens([token.id for token in kept], [token.type_id for token in kept], len(kept) < len(tokens))

    def _encode(self, parts: list[str]) -> tokenizers.Encoding:
        return self._backend.encode(parts[0], parts[1] if len(parts) == 2 else None)

    def _spelling(self, text: str) -> list[int]:
        """The ids of the characters of a word, which the text spells before it is normalised."""
        if text == self._unk_token:
            return [self._unk]
        ids: list[int] = []
        for index, character in enumerate(self._normalized(text)):
            id = self._vocab.get(f"{self._prefix if index else ''}{character}", self._unk)
            if id != self._unk or ids[-1:] != [self._unk]:
                ids.append(id)
        return ids or [self._unk]

    def _mapped(self, text: str, encoding: tokenizers.Encoding, sequence: int) -> str:
        """The text, with what the dictionary has for the entities that are unknown in it."""
        spans: dict[int, tuple[int, int]] = {}
        unknown: set[int] = set()
        for id, word, part, (start, end) in zip(
            encoding.ids, encoding.word_ids, encoding.sequence_ids, encoding.offsets, strict=True
        ):
            if part != sequence or word is None:
                continue
            spans[word] = (spans.get(word, (start, end))[0], end)
            if id == self._unk and not (self._spell and self._unk not in self._spelling(text[start:end])):
                unknown.add(word)
        numbers = sorted(spans)
        words = [self._normalized(text[start:end]) for start, end in map(spans.__getitem__, numbers)]
        is_unknown = [number in unknown for number in numbers]
        pieces, done, first = [], 0, 0
        while first < len(words):
            count = self._match(words, is_unknown, first)
            if count:
                pieces += [text[done : spans[numbers[first]][0]], self._entities[tuple(words[first : first + count])]]
                done = spans[numbers[first + count - 1]][1]
            first += count or 1
        return " ".join([*pieces, text[done:]])

    def _match(self, words: list[str], is_unknown: list[bool], first: int) -> int:
        """How many words from the first one on are an entity of the dictionary with an unknown word; 0 for none."""
        for count in range(min(self._most_words, len(words) - first), 0, -1):
            if any(is_unknown[first : first + count]) and tuple(words[first : first + count]) in self._entities:
                return count
        return 0

    def _normalized(self, text: str) -> str:
        normalizer = self._backend.normalizer
        return (text if normalizer is None else normalizer.normalize_str(text)).strip()

    def _words(self, text: str) -> list[str]:
        text, pre_tokenizer = self._normalized(text), self._backend.pre_tokenizer
        return [word for word, _ in pre_tokenizer.pre_tokenize_str(text)] if pre_tokenizer else text.split()


def read_entities(path: str | Path) -> dict[str, str]:
    """A dictionary of entities from a file: on each line a mention, a tab, and what is read instead.

    Raises:
        ValueError: a line is not UTF-8, has not one tab, or repeats a mention; the message gives its number.
        OSError: the file cannot be read.
    """
    entities: dict[str, str] = {}
    for where, mention, replacement in _read_mentions(path):
        if not replacement:
            raise ValueError(f"{where} is {mention!r}, expected a mention, a tab, and what is read instead")
        if entities.setdefault(mention, replacement) != replacement:
            raise ValueError(f"{where} has {mention!r} again, for something else")
    return entities


def read_names(path: str | Path) -> list[str]:
    """The names of entities from such a file, whose lines need nothing after the mention here.

    Raises:
        ValueError: a line is not UTF-8 or has several tabs, or there is no name.
        OSError: the file cannot be read.
    """
    names = [mention for _, mention, _ in _read_mentions(path)]
    if not names:
        raise ValueError(f"{path} holds no names, one a line")
    return names


def _read_mentions(path: str | Path) -> Iterator[tuple[str, str, str]]:
    """Where, the mention, and what stands after the tab, if anything; blank lines mean nothing."""
    with open(path, "rb") as file:
        for where, line in decoded(file, str(path)):
            mention, _, replacement = (part.strip() for part in line.partition("\t"))
            if (replacement and not mention) or "\t" in replacement:
                raise ValueError(f"{where} is {line!r}, expected a mention, a tab, and what is read instead")
            if mention:
                yield where, mention, replacement


def _cut(tokens: list[_Token], max_length: int | None) -> list[_Token]:
    """At most so many tokens, special ones kept, the rest cut as the library's `longest_first` does."""
    if max_length is None or len(tokens) <= max_length:
        return tokens
    first, second = (sum(token.sequence == sequence for token in tokens) for sequence in (0, 1))
    room = max_length - (len(tokens) - first - second)
    short, long = min(first, second), max(first, second)
    long = short if short > room else max(short, room - short)
    if short + long > room:
        short, long = room // 2, room // 2 + room % 2
    left = {0: short, 1: long} if first <= second else {0: long, 1: short}
    kept = []
    for token in tokens:
        if token.sequence is not None:
            left[token.sequence] -= 1
        if token.sequence is None or left[token.sequence] >= 0:
            kept.append(token)
    return kept

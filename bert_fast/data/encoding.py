"""Sentences to tokens that know where words begin, for a tokenizer, a user's words or a list of names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import tokenizers
from numpy.typing import NDArray

from bert_fast.folders import read_json, resolve
from bert_fast.tokenization import SPECIAL_TOKENS, Tokenizer

#: The tokenizer of pre-training data, in their folder.
TOKENIZER = "tokenizer.json"

#: What a word is: what the tokenizer cuts text into, or what stands between spaces.
WORDS = ("tokenizer", "spaces")


@dataclass(frozen=True)
class TokenizerVocabulary:
    """A tokenizer, and its special tokens.

    Attributes:
        text: `tokenizer.json` as the tokenizers library writes it.
        size: number of tokens.
        ids: role -> id of the special tokens that it has: `cls_token`, `mask_token` and so on.
    """

    text: str
    size: int
    ids: dict[str, int]

    @classmethod
    def read(cls, model: str) -> TokenizerVocabulary:
        """Of a model: a folder, a Hub id, or `demo`.

        Raises:
            ValueError: there is no tokenizer, or it has not all of BERT's special tokens; the message names them.
        """
        folder = resolve(model)
        backend = Tokenizer.from_pretrained(folder).backend
        file = folder / "tokenizer_config.json"
        config = read_json(file) if file.is_file() else {}
        names = {role: config.get(role) or token for role, token in SPECIAL_TOKENS.items()}
        names = {role: name["content"] if isinstance(name, dict) else name for role, name in names.items()}
        ids = {role: backend.token_to_id(name) for role, name in names.items()}
        if missing := [names[role] for role, number in ids.items() if number is None]:
            raise ValueError(f"the tokenizer in {folder} lacks the special tokens {', '.join(missing)}")
        known = {role: number for role, number in ids.items() if number is not None}
        return cls(backend.to_str(), backend.get_vocab_size(), known)

    @property
    def special_token_ids(self) -> tuple[int, ...]:
        """What is never hidden: [CLS], [SEP], [PAD]."""
        return tuple(self.ids[role] for role in ("cls_token", "sep_token", "pad_token"))

    def digests(self) -> dict[str, str]:
        """SHA-256 of all of it, and of the tokens by rising id alone, which a model's embeddings have to match."""
        tokens = sorted(tokenizers.Tokenizer.from_str(self.text).get_vocab().items(), key=lambda item: item[1])
        vocabulary = json.dumps(tokens, ensure_ascii=False)
        return {
            "sha256": hashlib.sha256(self.text.encode()).hexdigest(),
            "vocabulary_sha256": hashlib.sha256(vocabulary.encode()).hexdigest(),
        }


class Encoded(NamedTuple):
    """Sentences as tokens.

    Attributes:
        tokens: (num_tokens,) int32 ids, laid end to end; of a token that continues a word `-1 - id`.
        lengths: (num_sentences,) int64, 0 for a sentence of which nothing is left.
    """

    tokens: NDArray[np.int32]
    lengths: NDArray[np.int64]


class Encoder:
    """Sentences -> `Encoded`. Text that reads like a special token is text, as in google-research/bert.

    Args:
        vocabulary: of the tokenizer.
        words: one of `WORDS`. `spaces` is for text that was cut into words before, as Chinese text can be.
        entities: names; their tokens are one word where they follow each other in a sentence and begin and end with
            words. Of names that overlap the first one counts, of those that begin together the longest.
        marked: whether it is said where words begin; without, every token begins one, and it is quicker.
    """

    def __init__(
        self, vocabulary: TokenizerVocabulary, *, words: str, entities: Sequence[str] = (), marked: bool = True
    ) -> None:
        self.backend = tokenizers.Tokenizer.from_str(vocabulary.text)
        self.backend.encode_special_tokens = True
        self.spaces, self.marked = words == "spaces", marked
        self.entities: dict[int, set[tuple[int, ...]]] = {}
        names = self.backend.encode_batch_fast(list(entities), add_special_tokens=False)
        for ids in (tuple(name.ids) for name in names):
            if len(ids) > 1:
                self.entities.setdefault(ids[0], set()).add(ids)

    def __call__(self, sentences: Sequence[str]) -> Encoded:
        """Tokenize, without [CLS] and [SEP]."""
        if not self.marked:
            encodings = self.backend.encode_batch_fast(sentences, add_special_tokens=False)
        elif self.spaces:
            cut = [sentence.split() for sentence in sentences]
            encodings = self.backend.encode_batch(cut, is_pretokenized=True, add_special_tokens=False)
        else:
            encodings = self.backend.encode_batch(sentences, add_special_tokens=False)
        lengths = np.fromiter(map(len, encodings), np.int64, len(encodings))
        tokens = np.fromiter(chain.from_iterable(e.ids for e in encodings), np.int32, int(lengths.sum()))
        if self.marked:
            words = np.fromiter(chain.from_iterable(e.word_ids for e in encodings), np.int64, len(tokens))
            continues = np.diff(words, prepend=-1) == 0
            continues[(lengths.cumsum() - lengths)[lengths > 0]] = False
            if self.entities:
                self._join(tokens, continues, lengths)
            tokens = np.where(continues, -1 - tokens, tokens)
        return Encoded(tokens, lengths)

    def _join(self, tokens: NDArray[np.int32], continues: NDArray[np.bool_], lengths: NDArray[np.int64]) -> None:
        """Make one word of each name, in `continues`."""
        firsts = np.isin(tokens, list(self.entities)) & ~continues
        ends = lengths.cumsum()
        done = 0
        for place in np.flatnonzero(firsts).tolist():
            if place < done:
                continue
            end = int(ends[np.searchsorted(ends, place, side="right")])
            names = self.entities[int(tokens[place])]
            for stop in sorted({place + len(name) for name in names}, reverse=True):
                begins = stop == end or (stop < end and not continues[stop])
                if begins and tuple(tokens[place:stop].tolist()) in names:
                    continues[place + 1 : stop] = True
                    done = stop
                    break

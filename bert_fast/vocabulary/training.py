"""WordPiece vocabularies from text. The tokenizers library finds the pieces; what it leaves to chance is fixed here."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import pre_tokenizers, trainers
from tokenizers.models import WordPiece

from bert_fast.folders import new_folder
from bert_fast.terminal import is_watched, progress_bar
from bert_fast.tokenization import SPECIAL_TOKENS, bert_backend, bert_normalizer

#: First in every vocabulary, in this order; [PAD] is 0, as BERT's configuration has it.
FIRST_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

PREFIX = "##"


@dataclass(frozen=True)
class TrainedVocabulary:
    """A trained vocabulary, and how text is prepared for it.

    Attributes:
        tokens: (vocab_size,) the special ones, single characters, characters inside a word (`##x`), then longer pieces
            in the order in which they were found; a token's place is its id.
        config: the contents of tokenizer_config.json.
        alphabet: the characters that have tokens, sorted.
        left_out: other characters of the text, and how often they were there: words with them become [UNK].
    """

    tokens: tuple[str, ...]
    config: dict[str, Any]
    alphabet: tuple[str, ...]
    left_out: dict[str, int]

    def backend(self) -> tokenizers.Tokenizer:
        """The tokenizer, as the tokenizers library has it."""
        return bert_backend({token: id for id, token in enumerate(self.tokens)}, self.config)

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json, vocab.txt, tokenizer_config.json and special_tokens_map.json into a new folder.

        The folder appears whole or not at all. transformers' `AutoTokenizer` and our `Tokenizer` read it.

        Raises:
            ValueError: `directory` is there already and not empty.
        """
        with new_folder(directory) as folder:
            self.backend().save(str(folder / "tokenizer.json"))
            (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in self.tokens), encoding="utf-8")
            _write_json(folder / "tokenizer_config.json", self.config)
            _write_json(folder / "special_tokens_map.json", SPECIAL_TOKENS)


def train(
    texts: Iterable[str],
    *,
    vocab_size: int = 30522,
    min_frequency: int = 2,
    limit_alphabet: int = 1000,
    lowercase: bool = True,
    strip_accents: bool | None = None,
    chinese_characters: bool = True,
    model_max_length: int = 512,
    show_progress: bool | None = None,
) -> TrainedVocabulary:
    """Find the WordPiece vocabulary of a text.

    Starting from single characters, the two pieces that are most often side by side inside a word are joined, again
    and again, until the vocabulary is full. (This is how the tokenizers library trains WordPiece; Google's own trainer
    was never published.) Every character of the alphabet gets two tokens, at the beginning and inside of a word, so
    that any word of these characters has pieces. Punctuation, and Chinese characters if each is a word of its own,
    get one.

    The same texts give the same vocabulary, in whatever order they come. The library alone does not: it numbers the
    characters inside words as it meets them in a hash table, and joins the pair of lower numbers where two are equally
    often. So here it is told their numbers before.

    Args:
        texts: read twice, so no iterator that is then at its end. Memory grows with the number of different words.
        vocab_size: the most tokens.
        min_frequency: how often two pieces must be side by side to be joined.
        limit_alphabet: the most characters, the most frequent ones; of equally frequent ones those of lower code point.
        lowercase, strip_accents, chinese_characters: as `do_lower_case`, `strip_accents` (None: as `lowercase`) and
            `tokenize_chinese_chars` of tokenizer_config.json.
        model_max_length: the most tokens of a text, for tokenizer_config.json.
        show_progress: None shows bars on a terminal.

    Raises:
        ValueError: the texts hold no character, or `vocab_size` has no room for the special tokens and the alphabet.
    """
    if iter(texts) is texts:
        raise ValueError("texts is an iterator, expected what can be read twice, as a list")
    config = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": lowercase,
        "strip_accents": strip_accents,
        "tokenize_chinese_chars": chinese_characters,
        "model_max_length": model_max_length,
        **SPECIAL_TOKENS,
    }
    backend = tokenizers.Tokenizer(WordPiece({}, unk_token=SPECIAL_TOKENS["unk_token"]))
    backend.normalizer = bert_normalizer(config)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    shown = partial(progress_bar, texts, unit=" lines", show=show_progress)
    counts = count_characters(shown(what="counting characters"), backend)
    if not counts:
        raise ValueError("there is no text to train a vocabulary on")
    ranked = sorted(counts, key=lambda character: (-counts[character], character))
    alphabet = sorted(ranked[:limit_alphabet])
    inside = [f"{PREFIX}{character}" for character in alphabet if _continues(character, backend)]
    first = [*FIRST_TOKENS, *inside]
    if vocab_size < len(first) + len(alphabet):
        raise ValueError(
            f"vocab_size is {vocab_size}, but the {len(FIRST_TOKENS)} special tokens and the alphabet of "
            f"{len(alphabet)} characters take {len(first) + len(alphabet)}: raise it, or lower limit_alphabet"
        )
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=first,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=is_watched() if show_progress is None else show_progress,
    )
    backend.train_from_iterator(shown(what="counting words"), trainer)
    found = backend.get_vocab()
    longer = sorted(set(found) - {*first, *alphabet}, key=found.__getitem__)
    return TrainedVocabulary(
        (*FIRST_TOKENS, *alphabet, *inside, *longer),
        config,
        tuple(alphabet),
        {character: counts[character] for character in ranked[limit_alphabet:]},
    )


def count_characters(texts: Iterable[str], backend: tokenizers.Tokenizer) -> Counter[str]:
    """How often each character is in the words of the texts, after normalisation. Memory does not grow.

    BERT's normaliser treats each character by itself, so each different one is normalised once.
    """
    raw: Counter[str] = Counter()
    for text in texts:
        raw.update(text)
    counts: Counter[str] = Counter()
    for character, count in raw.items():
        for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(character)):
            for part in word:
                counts[part] += count
    return counts


def _continues(character: str, backend: tokenizers.Tokenizer) -> bool:
    """Whether a word may have the character after its first one."""
    words = backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(f"a{character}"))
    return [word for word, _ in words] == [f"a{character}"]


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

"""The words of a text as the tokenizer of a checkpoint sees them, and how often each is there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import tokenizers

if TYPE_CHECKING:
    from bert_fast.tokenization import Tokenizer

#: Different stretches of text without a space that are collected before they are cut into words.
MOST_CHUNKS = 1 << 16


def tokenizer_of(path_or_id: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint, a sentence-transformers folder, or a folder that has nothing else; Hub id; `demo`.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    from bert_fast.folders import resolve
    from bert_fast.tokenization import Tokenizer

    folder = resolve(path_or_id)
    if not (folder / "modules.json").is_file():
        return Tokenizer.from_pretrained(folder)
    from bert_fast.embedder import Recipe  # takes seconds to import, as it needs torch

    recipe = Recipe.read(folder)
    return Tokenizer.from_pretrained(recipe.transformer, lowercase=recipe.do_lower_case)


def count_words(texts: Iterable[str], backend: tokenizers.Tokenizer) -> Counter[str]:
    """How often each word is in the texts; memory grows with the number of different words only.

    A word is what the tokenizer looks up in its vocabulary as one: normalised, cut at spaces and punctuation. Special
    tokens that are spelled out in a text are words like any other.
    """
    chunks: Counter[str] = Counter()
    words: Counter[str] = Counter()
    for text in texts:
        chunks.update(text.split(" "))  # no word reaches over a space, so that one is looked at once for many
        if len(chunks) > MOST_CHUNKS:  # Chinese has no spaces: chunks are lines there
            _add_words(words, chunks, backend)
            chunks.clear()
    _add_words(words, chunks, backend)
    return words


def _add_words(words: Counter[str], chunks: Counter[str], backend: tokenizers.Tokenizer) -> None:
    for chunk, count in chunks.items():
        for word in split(chunk, backend):
            words[word] += count


def split(text: str, backend: tokenizers.Tokenizer) -> list[str]:
    """The words of a text, normalised."""
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    if backend.pre_tokenizer is None:
        return text.split()
    return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]

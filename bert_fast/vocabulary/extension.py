"""Words of a domain into the WordPiece vocabulary of a model, with rows of their own in its embedding table.

They become part of the vocabulary itself. Tokens that are *added* to a tokenizer instead are looked for before anything
else, in the middle of words too: "halyards" is then "halyard" and a word "s", not "##s".
"""

from __future__ import annotations

import json
import shutil
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers.models import WordPiece

from bert_fast.folders import CONFIG_FILE, new_folder, read_json, resolve
from bert_fast.terminal import progress_bar
from bert_fast.vocabulary.words import split, tokenizer_of

if TYPE_CHECKING:
    from torch import Tensor

#: Tensors with a row, or a number, for each token, by the ends of their names.
TABLES = (
    "word_embeddings.weight", "predictions.decoder.weight", "predictions.decoder.bias", "predictions.bias",
    "generator_lm_head.weight", "generator_lm_head.bias",
)  # fmt: skip

#: Families whose tables those are.
MODEL_TYPES = ("bert", "electra")

#: What the copy of a checkpoint leaves out: weights in other forms, which have the old vocabulary.
OTHER_WEIGHTS = ("onnx", "openvino", "*.onnx", "*.h5", "*.msgpack", "*.ot", ".*")

#: And what tells of the run that made it: states of its training, its data as ids, its curves and predictions.
OF_THE_RUN = ("checkpoint-*", "generator", "data", "metrics.*", "predictions_*", "report.html")


@dataclass(frozen=True)
class Extension:
    """Which words a vocabulary gets, and which it does not.

    Attributes:
        pieces: word, as the tokenizer normalises it -> the ids of the pieces it had, in the order of the new ids.
        refused: word, as it was given -> why it gets no token.
        first_id: id of the first new word: the size of the old vocabulary.
    """

    pieces: dict[str, tuple[int, ...]]
    refused: dict[str, str]
    first_id: int


@dataclass(frozen=True)
class Change:
    """A word whose tokens are others after an extension."""

    word: str
    count: int
    before: tuple[str, ...]
    after: tuple[str, ...]


def costly_words(
    counts: Mapping[str, int], backend: tokenizers.Tokenizer, num_words: int, min_frequency: int = 1
) -> list[str]:
    """The words that cost most: those whose own token would save most, `count * (pieces - 1)`.

    Args:
        counts: of each word, from `words.count_words`.
        backend: the tokenizer that cuts them into pieces.
        num_words: the most words.
        min_frequency: the least count of a word.

    Returns:
        Costliest first; of equally costly ones in alphabetical order. Words without a letter, and words that have no
        pieces, are left out.
    """
    model = backend.model
    gains: dict[str, int] = {}
    for word, count in progress_bar(counts.items(), what="weighing words", unit=" words"):
        if count >= min_frequency and any(map(str.isalpha, word)):
            gains[word] = count * (len(model.tokenize(word)) - 1)
    ranked = sorted((word for word, gain in gains.items() if gain > 0), key=lambda word: (-gains[word], word))
    return ranked[:num_words]


def plan(backend: tokenizers.Tokenizer, words: Iterable[str]) -> Extension:
    """Which of the words can get a token.

    A word must be one word to the tokenizer, not in the vocabulary yet, and have pieces, as its vector is their mean.

    Raises:
        ValueError: the tokenizer is not WordPiece, or its ids have gaps.
    """
    model = backend.model
    if not isinstance(model, WordPiece):
        raise ValueError(f"the tokenizer is a {type(model).__name__}; only WordPiece vocabularies can be extended")
    vocab = backend.get_vocab()
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise ValueError(f"the ids of the {len(vocab)} tokens are not the numbers from 0 to {len(vocab) - 1}")
    pieces: dict[str, tuple[int, ...]] = {}
    refused: dict[str, str] = {}
    for given in words:
        normalized = split(given, backend)
        word = normalized[0] if len(normalized) == 1 else ""
        if not normalized:
            refused[given] = "nothing is left of it after normalisation"
        elif not word:
            refused[given] = f"the tokenizer takes it for {len(normalized)} words: {' '.join(normalized)}"
        elif word in vocab:
            refused[given] = "is in the vocabulary already" + (f", as {word}" if word != given else "")
        elif word in pieces:
            refused[given] = f"is given twice, as {word}"
        elif reason := _without_pieces(word, model, vocab):
            refused[given] = reason
        else:
            pieces[word] = tuple(token.id for token in model.tokenize(word))
    return Extension(pieces, refused, len(vocab))


def _without_pieces(word: str, model: WordPiece, vocab: Mapping[str, int]) -> str | None:
    """Why a word is [UNK]; None if it is not."""
    if [token.value for token in model.tokenize(word)] != [model.unk_token]:
        return None
    if len(word) > model.max_input_chars_per_word:
        return f"is longer than {model.max_input_chars_per_word} characters"
    missing = [
        character
        for index, character in enumerate(word)
        if (model.continuing_subword_prefix if index else "") + character not in vocab
    ]
    if not missing:
        return "has no pieces in the vocabulary"
    return f"has characters that the vocabulary lacks at their place: {' '.join(dict.fromkeys(missing))}"


def extended(backend: tokenizers.Tokenizer, words: Iterable[str]) -> tokenizers.Tokenizer:
    """A copy of the tokenizer with the words at the end of its vocabulary."""
    return tokenizers.Tokenizer.from_str(json.dumps(_with_words(json.loads(backend.to_str()), words)))


def _with_words(tokenizer: dict[str, Any], words: Iterable[str]) -> dict[str, Any]:
    """The contents of a tokenizer.json, changed in place."""
    vocab = tokenizer["model"]["vocab"]
    first = 1 + max((*vocab.values(), *(token["id"] for token in tokenizer["added_tokens"])))
    vocab.update({word: id for id, word in enumerate(words, first)})
    return tokenizer


def changes(
    counts: Mapping[str, int], before: tokenizers.Tokenizer, after: tokenizers.Tokenizer, words: Iterable[str]
) -> list[Change]:
    """Other words that the extension cuts differently, most frequent first.

    WordPiece takes the longest match from the left, so a new word is also taken where it only begins another one:
    with "halyard" in the vocabulary "halyards" is "halyard ##s", whatever it was before. What is left of the word may
    even have no pieces, and it becomes [UNK].
    """
    new, first, second = set(words), before.model, after.model
    found = []
    for word, count in progress_bar(counts.items(), what="looking for changes", unit=" words"):
        if word not in new:
            old, now = (tuple(token.value for token in model.tokenize(word)) for model in (first, second))
            if old != now:
                found.append(Change(word, count, old, now))
    return sorted(found, key=lambda change: (-change.count, change.word))


def extend(path_or_id: str | Path, words: Iterable[str], output: str | Path) -> Extension:
    """Write a copy of a checkpoint whose vocabulary has these words, too.

    The vector of a new word is the mean of the vectors of the pieces it had. So are its row of a decoder that is not
    tied to the embeddings, and its entry of the decoder's bias: a masked language model then scores it with the mean
    of its pieces' scores, neither first nor last among them before it is trained. Old ids and rows stay, bit for bit,
    and so do ids and vectors of every text that has none of the words, nor one that begins with them (`changes`).

    Args:
        path_or_id: a BERT or ELECTRA checkpoint or a sentence-transformers folder; a Hub id; or `demo`.
        words: as they are in a text; the tokenizer's normalisation applies.
        output: a new folder, which appears whole or not at all. It holds what the checkpoint's folder does, but for
            weights in other forms (ONNX and the like) and what only the run that made it needs, as its checkpoints;
            transformers and sentence-transformers load it.

    Returns:
        Which words got the ids from `first_id` on, and which were refused.

    Raises:
        ValueError: no word is left, the checkpoint or its tokenizer cannot be read or do not fit each other, or
            `output` is there already and not empty.
    """
    from bert_fast.config import BertConfig
    from bert_fast.embedder import Recipe
    from bert_fast.loading import WEIGHT_PATTERNS, WEIGHTS_FILE, read_state_dict
    from bert_fast.saving import write_weights

    folder = resolve(path_or_id)
    source = Recipe.read(folder).transformer
    backend = tokenizer_of(folder).backend
    extension = plan(backend, words)
    if not extension.pieces:
        reasons = "; ".join(f"{word} {reason}" for word, reason in list(extension.refused.items())[:3])
        raise ValueError("there is no word to add" + (f": {reasons}" if reasons else ""))
    config = read_json(source / CONFIG_FILE)
    if (model_type := config.get("model_type", "bert")) not in MODEL_TYPES:
        raise ValueError(f"model_type is {model_type!r}, expected one of {', '.join(MODEL_TYPES)}")
    vocab_size = config.get("vocab_size", BertConfig.vocab_size)
    if backend.get_vocab_size() > vocab_size:
        raise ValueError(
            f"the tokenizer of {source} has {backend.get_vocab_size()} tokens, but the model's vocab_size is "
            f"{vocab_size}"
        )
    state = _with_rows(read_state_dict(source), extension, vocab_size)
    ignored = shutil.ignore_patterns(*WEIGHT_PATTERNS, *OTHER_WEIGHTS, *OF_THE_RUN)
    with new_folder(output) as building:
        shutil.copytree(folder, building, dirs_exist_ok=True, ignore=ignored)
        for path in (building, *building.rglob("*")):  # a cache may be read-only
            path.chmod(path.stat().st_mode | stat.S_IWUSR)
        target = building / source.relative_to(folder)
        _write_tokenizer(source, target, backend, list(extension.pieces))
        config["vocab_size"] = max(vocab_size, extension.first_id + len(extension.pieces))
        (target / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_weights(state, target / WEIGHTS_FILE)
        shutil.copymode(target / CONFIG_FILE, target / WEIGHTS_FILE)  # safetensors lets only the owner read it
    return extension


def _with_rows(state: dict[str, Tensor], extension: Extension, vocab_size: int) -> dict[str, Tensor]:
    """The weights with the new words' rows: in the table's spare rows first, then after its end."""
    import torch

    tables = [name for name in state if name.endswith(TABLES)]
    if not any(name.endswith(TABLES[0]) for name in tables):
        raise ValueError(f"the checkpoint has no weights called {TABLES[0]}")
    result = dict(state)
    for name in tables:
        table = state[name]
        if len(table) != vocab_size:
            raise ValueError(f"{name} has {len(table)} rows, expected vocab_size, {vocab_size}")
        means = [table[list(ids)].double().mean(0) for ids in extension.pieces.values()]
        result[name] = torch.cat([table[: extension.first_id], torch.stack(means).to(table.dtype)])
        result[name] = torch.cat([result[name], table[len(result[name]) :]])
    return result


def _write_tokenizer(source: Path, target: Path, backend: tokenizers.Tokenizer, words: list[str]) -> None:
    """tokenizer.json if the checkpoint has one, and vocab.txt; the ids of both are the tokenizer's."""
    path = source / "tokenizer.json"
    if path.is_file():
        contents = json.dumps(_with_words(read_json(path), words), ensure_ascii=False)
        (target / path.name).write_text(contents, encoding="utf-8")
    vocab = backend.get_vocab()
    tokens = [*sorted(vocab, key=vocab.__getitem__), *words]
    (target / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")

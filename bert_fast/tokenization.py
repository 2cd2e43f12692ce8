"""Text to ragged token ids. The tokenizers library does the work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece

from bert_fast.folders import read_json
from bert_fast.ladder import POLICIES, Ladder

if TYPE_CHECKING:
    import torch

    from bert_fast.ragged import Ragged

#: A `model_max_length` from here on is transformers' way of writing that there is none.
NO_MAX_LENGTH = 10**9

#: Roles of BERT's special tokens, and what they are called where tokenizer_config.json does not say.
SPECIAL_TOKENS = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}


@dataclass(frozen=True)
class TokenBatch:
    """The tokens of several texts, one text after another.

    Attributes:
        input_ids, token_type_ids: (num_tokens,) int64.
        lengths: (batch_size,) int64, tokens of each text.
        truncated: (batch_size,) bool, whether the text lost tokens to `max_length`.
        unk_token_id: of [UNK], which stands for words or parts of them that have no token; None where there is none.
    """

    input_ids: NDArray[np.int64]
    token_type_ids: NDArray[np.int64]
    lengths: NDArray[np.int64]
    truncated: NDArray[np.bool_]
    unk_token_id: int | None = None

    @property
    def num_unknown(self) -> int:
        """How many of the tokens are [UNK]."""
        return 0 if self.unk_token_id is None else int(np.count_nonzero(self.input_ids == self.unk_token_id))

    @property
    def num_truncated(self) -> int:
        """How many of the texts lost tokens to `max_length`."""
        return int(self.truncated.sum())

    def select(self, indices: NDArray[np.int64]) -> TokenBatch:
        """The texts of these indices, in their order."""
        lengths = self.lengths[indices]
        starts = (self.lengths.cumsum() - self.lengths)[indices]
        tokens = np.arange(lengths.sum()) + np.repeat(starts - (lengths.cumsum() - lengths), lengths)
        return TokenBatch(
            self.input_ids[tokens], self.token_type_ids[tokens], lengths, self.truncated[indices], self.unk_token_id
        )

    def to_ragged(self, device: torch.device | str = "cpu") -> Ragged:
        """The batch as the fast BERT takes it."""
        import torch

        from bert_fast.ragged import Ragged

        cu_seqlens = np.zeros(len(self.lengths) + 1, np.int32)
        np.cumsum(self.lengths, out=cu_seqlens[1:])
        positions = np.arange(len(self.input_ids)) - np.repeat(cu_seqlens[:-1], self.lengths)
        return Ragged(
            input_ids=torch.from_numpy(self.input_ids).to(device),
            position_ids=torch.from_numpy(positions).to(device),
            token_type_ids=torch.from_numpy(self.token_type_ids).to(device),
            cu_seqlens=torch.from_numpy(cu_seqlens).to(device),
            max_seqlen=int(self.lengths.max(initial=0)),
        )


class Tokenizer:
    """BERT's WordPiece tokenizer, without padding. Safe to call from several threads.

    Args:
        backend: what does the work; its own padding and truncation are ignored.
        model_max_length: the most tokens a text may have, special tokens included; None for no limit.
        unknown: what becomes of a word without pieces in the vocabulary: "unk", one [UNK]; or "characters", it is
            spelled, and only characters that the vocabulary lacks are [UNK].
        entities: mention -> what is read instead, where the mention would else be, or hold, an [UNK].

    Raises:
        ValueError: `unknown` is something else, or an entity is empty or contradicts another (`ladder.Ladder`).
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        model_max_length: int | None = None,
        *,
        unknown: str = "unk",
        entities: Mapping[str, str] | None = None,
    ) -> None:
        if unknown not in POLICIES:
            raise ValueError(f"unknown is {unknown!r}, expected one of {', '.join(POLICIES)}")
        self.backend = _clone(backend, None)
        self.model_max_length = model_max_length
        unk_token = getattr(self.backend.model, "unk_token", None)
        #: Id of [UNK]; None for a tokenizer that has no such token.
        self.unk_token_id = None if unk_token is None else self.backend.token_to_id(unk_token)
        self._ladder: Ladder | None = None
        if unknown != "unk" or entities:
            self._ladder = Ladder(self.backend, spell=unknown == "characters", entities=entities or {})
        self._truncating = lru_cache(maxsize=8)(lambda max_length: _clone(self.backend, max_length))

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        lowercase: bool = False,
        unknown: str = "unk",
        entities: Mapping[str, str] | None = None,
    ) -> Tokenizer:
        """Read a checkpoint's tokenizer: `tokenizer.json`, else `vocab.txt`; `tokenizer_config.json` beside either.

        Args:
            folder: the checkpoint.
            lowercase: lower-case the text first, whatever the files say.
            unknown, entities: as the class takes them.

        Raises:
            ValueError: no tokenizer is there, or its files cannot be read (the message names it); or as the class.
        """
        folder = Path(folder)
        config_file = folder / "tokenizer_config.json"
        config = read_json(config_file) if config_file.is_file() else {}
        if (folder / "tokenizer.json").is_file():
            try:
                backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            except Exception as error:  # what the library raises is a bare Exception
                raise ValueError(f"{folder / 'tokenizer.json'} is not a tokenizer: {error}") from error
            _apply_config(backend, config)
        elif (folder / "vocab.txt").is_file():
            backend = _from_vocab(folder / "vocab.txt", config)
        else:
            raise ValueError(f"{folder} holds no tokenizer: neither tokenizer.json nor vocab.txt")
        if lowercase:
            rest = [] if backend.normalizer is None else [backend.normalizer]
            backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *rest])
        max_length = config.get("model_max_length")
        limit = None if max_length is None or max_length >= NO_MAX_LENGTH else int(max_length)
        return cls(backend, limit, unknown=unknown, entities=entities)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return self.backend.get_vocab_size()

    def __call__(self, texts: Sequence[str] | Sequence[tuple[str, str]], max_length: int | None = None) -> TokenBatch:
        """Tokenize texts, or pairs of texts, with the special tokens around them.

        Args:
            texts: strings or pairs of strings. A lone surrogate, which UTF-8 cannot hold, counts as U+FFFD.
            max_length: the most tokens per text, special tokens included; never more than `model_max_length`. A pair
                loses tokens from its longer text first.

        Raises:
            ValueError: an element is not a string or a pair (the message gives its index and type), or `max_length`
                leaves no room beside the special tokens.
        """
        if isinstance(texts, str):
            raise ValueError("texts is one str, expected a sequence of them")
        inputs = [_checked(index, text) for index, text in enumerate(texts)]
        limit = self._limit(max_length, pairs=any(isinstance(text, tuple) for text in inputs))
        backend = self.backend if limit is None else self._truncating(limit)
        encodings: list[Any] = backend.encode_batch_fast(inputs)
        if self._ladder is not None:
            encodings = self._ladder.climb(inputs, encodings, limit)
        return _batch(encodings, self.unk_token_id)

    def encode_words(
        self, texts: Sequence[Sequence[str]], max_length: int | None = None
    ) -> tuple[TokenBatch, NDArray[np.int64]]:
        """Tokenize texts that are given as words, and say which word each token is of.

        Args:
            texts: the words of each text. A word may have no token at all, as one of control characters.
            max_length: as for `__call__`.

        Returns:
            The tokens, and (num_tokens,) int64, the number of the word in its text, -1 for a special token.

        Raises:
            ValueError: a word is not a string (the message gives the text's index and its type), `max_length` leaves no
                room, or the tokenizer has a ladder for unknown words, which reads texts.
        """
        if self._ladder is not None:
            raise ValueError("a tokenizer with unknown= or entities= does not take texts as words")
        inputs = []
        for index, words in enumerate(texts):
            if wrong := [word for word in words if not isinstance(word, str)]:
                raise ValueError(f"texts[{index}] has a word that is a {type(wrong[0]).__name__}, expected a str")
            inputs.append([_encodable(word) for word in words])
        limit = self._limit(max_length, pairs=False)
        backend = self.backend if limit is None else self._truncating(limit)
        encodings = backend.encode_batch(inputs, is_pretokenized=True)
        batch = _batch(encodings, self.unk_token_id)
        numbers = chain.from_iterable(encoding.word_ids for encoding in encodings)
        return batch, np.fromiter((-1 if n is None else n for n in numbers), np.int64, len(batch.input_ids))

    def encode_offsets(self, texts: Sequence[str]) -> tuple[TokenBatch, NDArray[np.int64]]:
        """Tokenize whole texts without special tokens, and say which characters each token is of.

        Returns:
            The tokens, and (num_tokens, 2) int64: token i is characters `offsets[i, 0]` to `offsets[i, 1]` of its text.

        Raises:
            ValueError: a text is not a string (the message gives its index and type), or the tokenizer has a ladder for
                unknown words, whose tokens are of no characters.
        """
        if self._ladder is not None:
            raise ValueError("a tokenizer with unknown= or entities= has no offsets")
        inputs = [_checked(index, text) for index, text in enumerate(texts)]
        encodings = self.backend.encode_batch(inputs, add_special_tokens=False)
        batch = _batch(encodings, self.unk_token_id)
        offsets = chain.from_iterable(chain.from_iterable(encoding.offsets for encoding in encodings))
        return batch, np.fromiter(offsets, np.int64, 2 * len(batch.input_ids)).reshape(-1, 2)

    def _limit(self, max_length: int | None, pairs: bool) -> int | None:
        """The most tokens of a text; ValueError if they leave no room beside the special ones."""
        limits = [limit for limit in (max_length, self.model_max_length) if limit is not None]
        special = self.backend.num_special_tokens_to_add(pairs)
        if limits and min(limits) <= special:
            raise ValueError(f"max_length is {min(limits)}, expected more than the {special} special tokens")
        return min(limits, default=None)


def _batch(encodings: Sequence[Any], unk_token_id: int | None) -> TokenBatch:
    lengths = np.fromiter((len(encoding) for encoding in encodings), np.int64, len(encodings))
    total = int(lengths.sum())
    return TokenBatch(
        input_ids=np.fromiter(chain.from_iterable(e.ids for e in encodings), np.int64, total),
        token_type_ids=np.fromiter(chain.from_iterable(e.type_ids for e in encodings), np.int64, total),
        lengths=lengths,
        truncated=np.fromiter((bool(encoding.overflowing) for encoding in encodings), np.bool_, len(encodings)),
        unk_token_id=unk_token_id,
    )


def _clone(backend: tokenizers.Tokenizer, max_length: int | None) -> tokenizers.Tokenizer:
    """A copy of its own, because truncation is a state of the backend and threads may differ in it."""
    clone = tokenizers.Tokenizer.from_str(backend.to_str())
    clone.no_padding()
    if max_length is None:
        clone.no_truncation()
    else:
        clone.enable_truncation(max_length, strategy="longest_first")
    return clone


def _checked(index: int, text: Any) -> str | tuple[str, str]:
    """The text or pair as the backend takes it; ValueError for anything else."""
    if isinstance(text, str):
        return _encodable(text)
    if isinstance(text, (tuple, list)) and len(text) == 2 and all(isinstance(part, str) for part in text):
        return _encodable(text[0]), _encodable(text[1])
    raise ValueError(f"texts[{index}] is a {type(text).__name__}, expected a str or a pair of them")


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _apply_config(backend: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
    """Where tokenizer_config.json differs from tokenizer.json on the normalisation, transformers goes by the former."""
    normalizer = backend.normalizer
    if isinstance(normalizer, normalizers.BertNormalizer):
        normalizer.lowercase = config.get("do_lower_case", normalizer.lowercase)
        normalizer.strip_accents = config.get("strip_accents", normalizer.strip_accents)
        normalizer.handle_chinese_chars = config.get("tokenize_chinese_chars", normalizer.handle_chinese_chars)


def _from_vocab(path: Path, config: dict[str, Any]) -> tokenizers.Tokenizer:
    """BERT's tokenizer over the vocabulary in a file of one token a line."""
    try:
        vocab = WordPiece.read_file(str(path))
    except Exception as error:  # what the library raises is a bare Exception
        raise ValueError(f"{path} is not a vocabulary: {error}") from error
    return bert_backend(vocab, config, name=str(path))


def bert_backend(
    vocab: dict[str, int], config: dict[str, Any], *, name: str = "the vocabulary"
) -> tokenizers.Tokenizer:
    """BERT's tokenizer, as the tokenizers library has it.

    Args:
        vocab: token -> id.
        config: the contents of a tokenizer_config.json; what it does not say is as in BERT, uncased.
        name: of the vocabulary, for the message of an error.

    Raises:
        ValueError: the vocabulary lacks [UNK], [CLS] or [SEP], or what `config` calls them.
    """
    special = {role: _content(config.get(role) or token) for role, token in SPECIAL_TOKENS.items()}
    missing = [special[role] for role in ("unk_token", "cls_token", "sep_token") if special[role] not in vocab]
    if missing:
        raise ValueError(f"{name} lacks the special tokens {', '.join(missing)}")
    backend = tokenizers.Tokenizer(WordPiece(vocab, unk_token=special["unk_token"]))
    backend.normalizer = bert_normalizer(config)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    cls_token, sep_token = special["cls_token"], special["sep_token"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls_token}:0 $A:0 {sep_token}:0",
        pair=f"{cls_token}:0 $A:0 {sep_token}:0 $B:1 {sep_token}:1",
        special_tokens=[(token, vocab[token]) for token in (cls_token, sep_token)],
    )
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens([token for token in special.values() if token in vocab])
    return backend


def bert_normalizer(config: dict[str, Any]) -> normalizers.Normalizer:
    """BERT's, with the options of a tokenizer_config.json."""
    return normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),
        lowercase=config.get("do_lower_case", True),
    )


def _content(token: str | dict[str, Any]) -> str:
    """A special token as tokenizer_config.json writes it: a string, or an object with its text under `content`."""
    return token["content"] if isinstance(token, dict) else token

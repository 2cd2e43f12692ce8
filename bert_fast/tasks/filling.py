"""Words for the masks of a text, from a model with a masked-language-model head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import decoders
from torch import Tensor

from bert_fast.batching import plan_batches
from bert_fast.families import model_class
from bert_fast.folders import read_json, resolve
from bert_fast.loading import build, parse_device, read_config, read_state_dict
from bert_fast.ragged import Ragged
from bert_fast.tokenization import SPECIAL_TOKENS, Tokenizer

#: Fewest ways to fill several masks that are kept while the next one is filled.
BEAM = 8

#: What the names of a masked-language-model head's weights have in them, in a BERT and in ELECTRA's generator.
PREDICTIONS = ("cls.predictions.transform", "generator_predictions")

#: Tokens of a run of the model, about.
RUN_TOKENS = 4096


@dataclass(frozen=True)
class Filling:
    """A way to fill one mask, or several at once.

    Attributes:
        tokens: of the vocabulary; one for each mask that is filled.
        score: their probability.
        text: with the masks filled, in the tokenizer's spelling.
    """

    tokens: tuple[str, ...]
    score: float
    text: str


@dataclass(frozen=True)
class Filled:
    """What is said of one text, best first.

    Attributes:
        masks: of each mask the words that fit, while the other masks stay hidden: p(word | text with all masks).
        together: ways to fill all of them, by the product of p(word i | text with the masks before i filled): a search
            from left to right that keeps the best few, so a better way may be missed. Empty for a single mask.
    """

    masks: tuple[tuple[Filling, ...], ...]
    together: tuple[Filling, ...]


class MaskFiller:
    """A masked language model over texts. Only the rows of the masks go through its head.

    Args:
        path_or_id: as `from_pretrained` takes it.
        dtype, device: as there; the device is a GPU if there is one.

    Raises:
        ValueError: the checkpoint has no masked-language-model head, or no [MASK] in its vocabulary.
    """

    def __init__(
        self,
        path_or_id: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.device = parse_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        folder = resolve(path_or_id)
        state = read_state_dict(folder)
        if not any(part in name for name in state for part in PREDICTIONS):
            raise ValueError(
                f"{path_or_id} has no masked-language-model head (no weights {' or '.join(PREDICTIONS)}), so it cannot "
                "say which words fit; a checkpoint that was pre-trained, and not made for vectors or labels, has one, "
                "and of an ELECTRA the generator"
            )
        config = read_config(folder)
        self.model: Any = build(model_class(config, "masked_lm"), config, state, dtype=dtype, device=self.device)
        self.tokenizer = Tokenizer.from_pretrained(folder)
        special = _special_ids(folder, self.tokenizer)
        if "mask_token" not in special:
            raise ValueError(f"the vocabulary of {path_or_id} has no mask token")
        self.mask_token_id = special["mask_token"]
        #: Tokens that are no words.
        self.special_token_ids = sorted(special.values())
        #: The most tokens of a text, special tokens included.
        self.max_length = int(self.model.config.max_position_embeddings)

    @property
    def mask_token(self) -> str:
        """How a mask is written."""
        return str(self.tokenizer.backend.id_to_token(self.mask_token_id))

    def fill(self, texts: Sequence[str], top_k: int = 5) -> list[Filled]:
        """The best `top_k` words for each mask, and the best ways to fill them all.

        Raises:
            ValueError: a text has no mask, or is longer than the model reads; the message has its number and it.
        """
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}, expected at least 1")
        rows = self.encode(texts)
        for index, row in enumerate(rows):
            if self.mask_token_id not in row:
                raise ValueError(f"text {index} has no {self.mask_token}: {texts[index]!r}")
        if not rows:
            return []
        top_k = min(top_k, int(self.model.config.vocab_size))
        filled: dict[int, Filled] = {}
        for numbers in plan_batches(np.array([len(row) for row in rows]), RUN_TOKENS):
            batch = [rows[number] for number in numbers]
            said = self.log_probabilities(batch).split([int((row == self.mask_token_id).sum()) for row in batch])
            for number, row, scores in zip(numbers, batch, said, strict=True):
                together = self._together(row, scores, top_k) if len(scores) > 1 else ()
                filled[int(number)] = Filled(self._each(row, scores, top_k), together)
        return [filled[index] for index in range(len(rows))]

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """Tokens of each text, (num_tokens,); ValueError for one that is longer than the model reads."""
        tokens = self.tokenizer(texts, self.max_length)
        if tokens.num_truncated:
            index = int(tokens.truncated.argmax())
            raise ValueError(f"text {index} has more than the {self.max_length} tokens that the model reads")
        return np.split(tokens.input_ids, tokens.lengths.cumsum()[:-1]) if len(tokens.lengths) else []

    @torch.inference_mode()
    def log_probabilities(
        self, rows: Sequence[NDArray[np.int64]], places: Sequence[NDArray[np.int64]] | None = None
    ) -> Tensor:
        """What may stand at some places of some texts: (num_places, vocab_size) float32 on the CPU, in their order.

        Args:
            rows: tokens of each text.
            places: numbers of tokens, of each text; None for those of its masks.
        """
        if places is None:
            places = [(row == self.mask_token_id).nonzero()[0] for row in rows]
        lengths = torch.tensor([len(row) for row in rows])
        starts = (lengths.cumsum(0) - lengths).tolist()
        wanted = np.concatenate([own + start for own, start in zip(places, starts, strict=True)])
        ids = torch.from_numpy(np.concatenate(rows)).to(self.device)
        hidden = self.model.bert.encode(Ragged.from_lengths(ids, lengths.to(self.device)))
        hidden = hidden[torch.from_numpy(wanted).to(self.device)]
        scores: Tensor = self.model.scores(hidden)
        return scores.float().log_softmax(1).cpu()

    def decode(self, ids: NDArray[np.int64]) -> str:
        """The text of tokens, without those at its ends that are no words."""
        ends = [index for index, token in enumerate(ids) if token == self.mask_token_id or not self._is_special(token)]
        inner = ids[ends[0] : ends[-1] + 1] if ends else ids[:0]
        return str(decoders.WordPiece().decode([self._token(token) for token in inner]))

    def _is_special(self, token: Any) -> bool:
        return int(token) in self.special_token_ids

    def _token(self, token: Any) -> str:
        """What a token is called; a model may have more of them than its tokenizer."""
        return str(self.tokenizer.backend.id_to_token(int(token)) or f"[{int(token)}]")

    def _each(self, row: NDArray[np.int64], scores: Tensor, top_k: int) -> tuple[tuple[Filling, ...], ...]:
        """Of one text, scores (num_masks, vocab_size)."""
        said = []
        for place, mask in zip((row == self.mask_token_id).nonzero()[0], scores, strict=True):
            best = mask.topk(top_k)
            ways = [(_with(row, place, token), value) for value, token in zip(*map(Tensor.tolist, best), strict=True)]
            said.append(tuple(self._filling(way, [place], value) for way, value in ways))
        return tuple(said)

    def _together(self, row: NDArray[np.int64], scores: Tensor, top_k: int) -> tuple[Filling, ...]:
        """Of one text, scores (num_masks, vocab_size)."""
        places, width = (row == self.mask_token_id).nonzero()[0], max(top_k, BEAM)
        beams = [(row, 0.0)]
        for number, place in enumerate(places):
            own = [np.array([place])] * len(beams)
            said = scores[:1] if number == 0 else self.log_probabilities([beam for beam, _ in beams], own)
            totals = said + torch.tensor([[score] for _, score in beams])
            best = totals.flatten().topk(min(width, totals.numel()))
            beams = [
                (_with(beams[index // said.shape[1]][0], place, index % said.shape[1]), value)
                for value, index in zip(*map(Tensor.tolist, best), strict=True)
            ]
        return tuple(self._filling(ids, places, value) for ids, value in beams[:top_k])

    def _filling(self, row: NDArray[np.int64], places: Any, log_score: float) -> Filling:
        return Filling(tuple(self._token(row[place]) for place in places), float(np.exp(log_score)), self.decode(row))


def _with(row: NDArray[np.int64], place: int, token: int) -> NDArray[np.int64]:
    row = row.copy()
    row[place] = token
    return row


def _special_ids(folder: Path, tokenizer: Tokenizer) -> dict[str, int]:
    """Role -> id of the special tokens that the vocabulary has."""
    file = folder / "tokenizer_config.json"
    config = read_json(file) if file.is_file() else {}
    ids: dict[str, int] = {}
    for role, usual in SPECIAL_TOKENS.items():
        named = config.get(role) or usual
        number = tokenizer.backend.token_to_id(named["content"] if isinstance(named, dict) else named)
        if number is not None:
            ids[role] = number
    return ids

"""CTranslate2, which removes padding as bert_fast does."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ctranslate2
import numpy as np
import torch
from ctranslate2.converters import TransformersConverter
from torch import Tensor
from transformers import BertTokenizer

from bert_fast.benchmarking import Encode

COMPUTE_TYPES = {"float32": "float32", "int8": "int8_float32"}


def build(model: Any, precision: str) -> Encode:
    """See `Peer.build`."""
    with TemporaryDirectory() as folder:
        source, converted = Path(folder) / "transformers", Path(folder) / "ctranslate2"
        _save(model, source)
        TransformersConverter(str(source)).convert(str(converted))
        encoder = ctranslate2.Encoder(
            str(converted),
            compute_type=COMPUTE_TYPES[precision],
            inter_threads=1,
            intra_threads=torch.get_num_threads(),
        )

    def encode(inputs: dict[str, Tensor]) -> Tensor:
        lengths = inputs["attention_mask"].sum(1).tolist()

        def ragged(padded: Tensor) -> list[list[int]]:
            return [row[:length] for row, length in zip(padded.tolist(), lengths, strict=True)]

        ids, types = ragged(inputs["input_ids"]), ragged(inputs["token_type_ids"])
        return torch.from_numpy(np.array(encoder.forward_batch(ids, token_type_ids=types).last_hidden_state))

    return encode


def _save(model: Any, folder: Path) -> None:
    """A folder as the converter wants it: with a vocabulary, and with what transformers 5 no longer writes."""
    model.config.position_embedding_type = "absolute"
    model.save_pretrained(folder)
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    tokens = (*special, *(str(token) for token in range(len(special), model.config.vocab_size)))
    BertTokenizer(vocab={token: index for index, token in enumerate(tokens)}).save_pretrained(folder)

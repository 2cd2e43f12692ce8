"""Tiny checkpoints with a vocabulary of whole words, which transformers and sentence-transformers load as well."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from bert_fast import BertConfig
from bert_fast.modules import HEADS
from bert_fast.tokenization import SPECIAL_TOKENS, Tokenizer

PAIRS = """
the ferry leaves at dawn|the boat goes out in the early morning
rain fell all night|it was wet until the morning
he cut the warm bread|the loaf was sliced by him
the road is closed by snow|snow has shut the way
she keeps old letters in a box|a box holds the letters of her past
the market is loud on sundays|there is much noise at the market each sunday
a cat sleeps by the stove|near the stove lies a cat
the clock stopped at ten|at ten the clock stood still
they sold the old boat|the boat was bought from them
the teacher asked for a map|a map was wanted by the teacher
a lamp burned in the mill|there was light in the mill
the lake is a day long|one day takes you around the lake
""".strip().splitlines()

SENTENCES = [text for pair in PAIRS for text in pair.split("|")]
WORDS = sorted({word for text in SENTENCES for word in text.split()})
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "##s", "."]


def write_tokenizer(folder: Path) -> None:
    """The files of a tokenizer that lower-cases."""
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "vocab.txt").write_text("\n".join(VOCAB) + "\n")
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 48, **SPECIAL_TOKENS}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    Tokenizer.from_pretrained(folder).backend.save(str(folder / "tokenizer.json"))


def config(**others: Any) -> BertConfig:
    """Two layers of width 32."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return BertConfig.from_dict({"vocab_size": len(VOCAB), "max_position_embeddings": 48, **shape, **others})


def model(head: str | None, **others: Any) -> Any:
    """The same random weights on every call, in evaluation mode; larger than usual, so that answers differ."""
    torch.manual_seed(7)
    made = HEADS[head](config(initializer_range=0.2, **others)).eval()
    return made


def save(folder: Path, head: str | None, **others: Any) -> Any:
    """A checkpoint folder with its tokenizer; the model of it."""
    made = model(head, **others)
    made.save_pretrained(folder)
    write_tokenizer(folder)
    return made

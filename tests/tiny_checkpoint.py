"""What the tests of tasks and recipes share: a tiny BERT with the demo's tokenizer."""

import shutil
from pathlib import Path

import torch

from bert_fast import BertConfig
from bert_fast.folders import resolve
from bert_fast.modules import BertModel
from bert_fast.saving import save_pretrained
from bert_fast.tokenization import Tokenizer


def tokenizer() -> Tokenizer:
    """BERT's own, of the demo."""
    found = Tokenizer.from_pretrained(resolve("demo"))
    found.model_max_length = None
    return found


def checkpoint(folder: Path, **fields) -> Path:
    """Two layers of width 32 with random weights, the same on every call, without dropout."""
    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 128}
    options |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(5)
    save_pretrained(BertModel(BertConfig(**{**options, **fields})), folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        shutil.copyfile(resolve("demo") / name, folder / name)
    return folder

"""What the tests of training share: a tiny model, a little text, and arguments that keep a run short."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bert_fast import BertConfig
from bert_fast.modules import BertForMaskedLM, BertForSequenceClassification
from bert_fast.training.arguments import TrainingArguments
from bert_fast.training.masking import MaskingCollator

TEXTS = """
The ferry leaves the harbour before the sun is up.
Nobody had told the cook that the guests would be late.
Rain fell on the tin roof all night long.
She keeps the letters in a box under the stairs.
Two boys carried the ladder across the wet field.
A small lamp burned in the window of the mill.
The bread was still warm when he cut it.
They sold the old boat and bought a newer one.
Under the bridge the water is slow and brown.
My aunt taught me the names of all the stars.
The clock in the hall stopped at ten past four.
He wrote the number on the back of his hand.
On Sundays the market is full of noise and colour.
The cat sleeps where the stove is warm.
A letter came from the city with no name on it.
When the snow melts the road will be open again.
The teacher asked why the map had no rivers.
We waited at the gate until the last bus had gone.
It takes a whole day to walk around the lake.
The baker and the smith had not spoken for years.
""".strip().splitlines()

WORDS = sorted({word for text in TEXTS for word in text.lower().replace(".", " .").split()})
PAD, CLS, SEP, MASK = range(4)
SPECIAL = [PAD, CLS, SEP]
VOCAB_SIZE = 4 + len(WORDS)


def examples(labelled: bool = False) -> list[dict[str, Any]]:
    """The texts as ids; labelled by whether they have more than ten words."""
    rows = []
    for text in TEXTS:
        ids = [4 + WORDS.index(word) for word in text.lower().replace(".", " .").split()]
        row: dict[str, Any] = {"input_ids": [CLS, *ids, SEP]}
        rows.append({**row, "labels": int(len(ids) > 10)} if labelled else row)
    return rows


def config(dropout: float = 0.1, **others: Any) -> BertConfig:
    """Two layers of width 32."""
    return BertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        **others,
    )


def masked_lm(dropout: float = 0.1) -> BertForMaskedLM:
    """The same weights on every call."""
    torch.manual_seed(7)
    return BertForMaskedLM(config(dropout))


def classifier(dropout: float = 0.1, **others: Any) -> BertForSequenceClassification:
    """The same weights on every call; two classes if nothing else is said."""
    torch.manual_seed(7)
    return BertForSequenceClassification(config(dropout, **others))


def masking(**others: Any) -> MaskingCollator:
    """Hides words of the texts, many, as there are few texts."""
    return MaskingCollator(
        vocab_size=VOCAB_SIZE, mask_token_id=MASK, special_token_ids=SPECIAL, mlm_probability=0.3, **others
    )


def arguments(output_dir: Path | str, **others: Any) -> TrainingArguments:
    """Four steps on the CPU, each one logged, nothing saved if nothing else is said."""
    options: dict[str, Any] = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "plot_metrics": False,  # it takes longer than the steps
        "use_cpu": True,
    }
    return TrainingArguments(str(output_dir), **{**options, **others})


def padded() -> list[dict[str, Any]]:
    """The labelled examples at one length, as transformers' default collator wants them."""
    rows = []
    for row in examples(labelled=True):
        missing = 16 - len(row["input_ids"])
        mask = [1] * len(row["input_ids"]) + [0] * missing
        rows.append({**row, "input_ids": row["input_ids"] + [PAD] * missing, "attention_mask": mask})
    return rows

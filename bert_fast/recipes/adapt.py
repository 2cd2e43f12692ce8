"""Masked language modelling on from a checkpoint, on text of a domain or of a task (Gururangan et al., 2020)."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bert_fast.folders import resolve
from bert_fast.loading import build, read_config, read_state_dict, save_pretrained
from bert_fast.tokenization import Tokenizer

#: One of so many pieces of text is held out, where no other text is given.
HELD_OUT = 20


@dataclass
class AdaptSettings:
    """What a run is told.

    Attributes:
        model_name_or_path: the checkpoint to go on from: a folder, a Hub id or `demo`.
        output_dir: the folder of the run, and of the model it leaves.
        train_file: text, as `bert_fast.data.text` reads it: a file or a folder, one sentence a line, a blank line
            between documents; or JSON lines.
        validation_file: text to measure the perplexity on; None holds out one of `HELD_OUT` pieces.
        text_field: key of the text in JSON lines.
        max_seq_length: tokens of a piece of text, special tokens included.
        mlm_probability: part of the tokens to predict.
        arguments: of `bert_fast.training.TrainingArguments`, by name.
        resume: go on from the last whole checkpoint of the folder.
    """

    model_name_or_path: str
    output_dir: str
    train_file: str | None = None
    validation_file: str | None = None
    text_field: str | None = None
    max_seq_length: int = 128
    mlm_probability: float = 0.15
    arguments: dict[str, Any] = field(default_factory=dict)
    resume: bool = False


def adapt(settings: AdaptSettings, texts: Sequence[str] | None = None) -> dict[str, float]:
    """Train the masked language model of a checkpoint on, and save it with its tokenizer, and its pooler if it has one.

    A piece of text is as many sentences of one document as fit. The masks are new in every epoch.

    Args:
        settings: what to do.
        texts: documents in place of `train_file`.

    Returns:
        `perplexity_before` and `perplexity`, of masked tokens of the text held out, and `pieces`, `tokens`, `steps`.

    Raises:
        ValueError: the settings, the text or the checkpoint are not right; the message names what.
    """
    import transformers

    from bert_fast.data.text import read_documents
    from bert_fast.modules import HEADS
    from bert_fast.reference import BertPooler
    from bert_fast.training import MaskingCollator, Trainer, TrainingArguments

    if texts is None and settings.train_file is None:
        raise ValueError("there is no text: give a train_file")
    output_dir, folder = Path(settings.output_dir), resolve(settings.model_name_or_path)
    config, tokenizer = read_config(folder), Tokenizer.from_pretrained(folder)
    if not 2 < settings.max_seq_length <= config.max_position_embeddings:
        raise ValueError(
            f"max_seq_length is {settings.max_seq_length}, expected from 3 to {config.max_position_embeddings}, the "
            "positions of the model"
        )

    def read(file: str) -> Iterator[list[str]]:
        return read_documents([file], text_field=settings.text_field)

    documents = [[text] for text in texts] if texts is not None else read(str(settings.train_file))
    train = pieces(documents, tokenizer, settings.max_seq_length)
    if settings.validation_file is not None:
        held_out = pieces(read(settings.validation_file), tokenizer, settings.max_seq_length)
    else:
        held_out, train = train[::HELD_OUT], [row for index, row in enumerate(train) if index % HELD_OUT]
    if not train or not held_out:
        raise ValueError(f"{settings.train_file or 'the texts of the task'}: too little text, {len(train)} pieces")

    defaults = {"save_strategy": "epoch", "save_total_limit": 1, "logging_steps": 0.05, "report_to": "none"}
    defaults |= {"max_tokens_per_batch": 4096, "learning_rate": 1e-4}
    args = TrainingArguments(str(output_dir), **{**defaults, **settings.arguments})
    transformers.set_seed(args.seed)
    state = read_state_dict(folder)
    model: Any = build(HEADS["masked_lm"], config, state, dtype="float32")
    pooler = {name.rpartition("pooler.")[2]: value for name, value in state.items() if "pooler." in name}
    if pooler:  # nothing here reads it, but a classifier will
        model.bert.pooler = BertPooler(config).requires_grad_(False)
        model.bert.pooler.load_state_dict(pooler)
    vocab = tokenizer.backend.get_vocab()
    special = [vocab[token] for token in ("[CLS]", "[SEP]", "[PAD]") if token in vocab]
    collator = MaskingCollator(
        vocab_size=config.vocab_size,
        mask_token_id=vocab["[MASK]"],
        special_token_ids=special,
        mlm_probability=settings.mlm_probability,
        seed=args.seed,
        max_position_embeddings=config.max_position_embeddings,
    )
    trainer = Trainer(model, args, data_collator=collator, train_dataset=train, eval_dataset=held_out)
    before = trainer.evaluate(metric_key_prefix="before")["before_loss"]
    trainer.train(settings.resume or None)
    after = trainer.evaluate()["eval_loss"]
    if trainer.is_world_process_zero():
        for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, output_dir / name)
        save_pretrained(model, output_dir)
    return {
        "perplexity_before": math.exp(before),
        "perplexity": math.exp(after),
        "pieces": len(train),
        "tokens": sum(len(row["input_ids"]) for row in train),
        "steps": trainer.state.global_step,
    }


def pieces(documents: Iterable[list[str]], tokenizer: Tokenizer, max_seq_length: int) -> list[dict[str, Any]]:
    """Texts of at most `max_seq_length` tokens, each of whole sentences of one document, unless one is longer itself.

    Returns:
        Of each `input_ids` (num_tokens,), with the special tokens around it.
    """
    room, rows = max_seq_length - 2, list[dict[str, Any]]()
    for sentences in filter(None, documents):
        batch = tokenizer(sentences)
        parts = np.split(batch.input_ids, batch.lengths.cumsum()[:-1])
        first, last = parts[0][:1], parts[0][-1:]
        waiting: list[Any] = []
        for part in parts:
            inner = part[1:-1]
            if waiting and sum(map(len, waiting)) + len(inner) > room:
                rows.append({"input_ids": np.concatenate([first, *waiting, last])})
                waiting = []
            while len(inner) > room:
                rows.append({"input_ids": np.concatenate([first, inner[:room], last])})
                inner = inner[room:]
            if len(inner):
                waiting.append(inner)
        if waiting:
            rows.append({"input_ids": np.concatenate([first, *waiting, last])})
    return rows

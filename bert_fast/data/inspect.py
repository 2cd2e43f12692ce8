"""What is in pre-training data, in words: a table of statistics, and instances with their masks."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from bert_fast.data.counters import Uniforms
from bert_fast.data.encoding import TOKENIZER
from bert_fast.data.masking import IGNORED_LABEL, Masking
from bert_fast.data.pretraining import ShardDataset

#: What the labels 0 and 1 of each objective mean.
LABELS = {"nsp": ("next", "random"), "sop": ("in order", "swapped")}


def statistics(folder: Path, manifest: dict[str, Any]) -> str:
    """A table of what the text had and what was made of it."""
    counts, options = manifest["statistics"], manifest["options"]
    instances, tokens = counts["num_instances"], counts["num_tokens"]
    size = sum(entry["size"] for entry in manifest["shards"])
    left_out = f"   ({counts['empty_documents']:,} without text left out)" if counts["empty_documents"] else ""
    rows = [
        ("documents", f"{counts['documents']:,}{left_out}"),
        ("sentences", f"{counts['sentences']:,}"),
        ("tokens", f"{counts['tokens']:,}"),
        ("of these [UNK]", f"{counts['unknown'] / counts['tokens']:.2%}"),
        ("instances", f"{instances:,}   ({options['dupe_factor']} times through the text)"),
        ("tokens of each", f"{tokens / instances:.1f}   ({tokens / instances / options['max_seq_length']:.1%} full)"),
    ]
    if options["masking"] == "static":
        rows.append(("to predict", f"{counts['num_predictions'] / tokens:.2%}   ({options['scheme']})"))
    else:
        rows.append(("to predict", f"drawn in training   ({options['scheme']})"))
    for label, name in enumerate(LABELS.get(options["objective"], ())):
        count = counts["num_label_1"] if label else instances - counts["num_label_1"]
        rows.append((f"label {label}, {name}", f"{count / instances:.1%}"))
    rows.append(("shards", f"{len(manifest['shards'])}   ({size / 1e6:,.2f} MB in {folder})"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}   {value}" for name, value in rows)


def instances(dataset: ShardDataset, count: int, width: int = 100) -> str:
    """Some instances, evenly spread, as text; a hidden token reads `what the model sees→what it has to say`.

    Where the masks are drawn in training, these are some that could be.
    """
    backend = tokenizers.Tokenizer.from_file(str(dataset.folder / TOKENIZER))
    options = dataset.manifest["options"]
    blocks = []
    for index in np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int).tolist():
        features = dataset[index]
        seen, labels = _masked(dataset, index, features)
        words = [str(backend.id_to_token(int(token))) for token in seen]
        for place in np.flatnonzero(labels != IGNORED_LABEL):
            words[place] += f"→{backend.id_to_token(int(labels[place]))}"
        title = f"instance {index}: {len(words)} tokens"
        if options["objective"] in LABELS:
            label = features["next_sentence_label"]
            title += f", label {label} ({LABELS[options['objective']][label]})"
        types = features["token_type_ids"]
        lines = [
            " ".join(word for word, kind in zip(words, types, strict=True) if kind == wanted)
            for wanted in sorted(set(types.tolist()))
        ]
        blocks.append("\n".join([title, *(textwrap.indent(textwrap.fill(line, width - 2), "  ") for line in lines)]))
    return "\n\n".join(blocks)


def _masked(dataset: ShardDataset, index: int, features: dict[str, Any]) -> tuple[Any, Any]:
    """What the model sees, and the labels."""
    ids = features["input_ids"].astype(np.int64)
    if "labels" in features:
        return ids, features["labels"]
    options, tokenizer = dataset.manifest["options"], dataset.manifest["tokenizer"]
    masking = Masking(
        vocab_size=tokenizer["vocab_size"],
        mask_token_id=tokenizer["ids"]["mask_token"],
        special_token_ids=[tokenizer["ids"][role] for role in ("cls_token", "sep_token", "pad_token")],
        scheme=options["scheme"],
        mlm_probability=options["mlm_probability"],
        max_predictions=options["max_predictions_per_seq"],
    )
    draw = Uniforms(options["seed"])
    draw.go_to(index)
    draws = draw.take(masking.numbers * len(ids)).reshape(masking.numbers, -1)
    return masking.hide(ids, np.array([len(ids)]), draws, features["word_ids"].astype(np.int64))

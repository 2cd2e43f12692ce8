"""What a model that is pre-trained knows of texts it has not seen: perplexity, and accuracy of the second task."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bert_fast import heads, losses
from bert_fast.electra import ElectraPretraining
from bert_fast.terminal import progress_bar
from bert_fast.training.batches import TokenBudgetSampler
from bert_fast.training.masking import IndexedDataset

Collate = Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Any]]


def held_out_scores(
    model: Any,
    examples: Any,
    collate: Collate,
    *,
    max_tokens: int,
    seed: int = 0,
    progress: bool | None = False,
    share: tuple[int, int] = (1, 0),
    total: Callable[[dict[str, float]], dict[str, float]] = dict,
) -> dict[str, float]:
    """Scores over all texts, each of them a mean over all tokens or pairs and not over batches.

    Args:
        model: a masked language model, with or without a second task, or ELECTRA's pair; left in the mode it was in.
        examples: features by index, and their number by `len`; `lengths`, where they have it, saves reading them all.
        collate: makes a batch, as the model takes it, with labels; its masks should not change from call to call.
        max_tokens: of a batch.
        seed: of what ELECTRA's generator samples. torch's generators are left as they were.
        progress: show a bar; None shows one on a terminal, for work of more than two seconds.
        share: how many processes share the texts, and which one this is.
        total: sums up numbers of all processes.

    Returns:
        masked_lm_loss, the mean negative log-likelihood of the hidden tokens, in nats; perplexity, e to the power of
        it; loss, what training makes small; masked_tokens, their number, and texts. Of a second task
        next_sentence_loss and next_sentence_accuracy; of ELECTRA's discriminator discriminator_loss,
        discriminator_accuracy over all tokens, discriminator_precision and discriminator_recall of the replaced ones,
        and replaced, their part.

    Raises:
        ValueError: no token is hidden in any text; a text is longer than `max_tokens`.
    """
    lengths = examples.lengths if hasattr(examples, "lengths") else [len(row["input_ids"]) for row in examples]
    sampler = TokenBudgetSampler(lengths, max_tokens, shuffle=False, num_replicas=share[0], rank=share[1])
    rows, device = IndexedDataset(examples), next(model.parameters()).device
    sums = Counter[str]()
    with _evaluating(model), _seeded(seed, device), torch.no_grad():
        for indexes in progress_bar(sampler, what="held out", unit=" batches", show=progress):
            batch = collate([rows[index] for index in indexes])
            inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
            sums.update(texts=len(indexes))
            sums.update(_sums(model, inputs))
    return _scores(model, Counter(total(dict(sums))))


def _sums(model: Any, inputs: dict[str, Any]) -> dict[str, float]:
    """What is added up over the batches; the loss with a divisor of 1 is a sum over the hidden tokens."""
    output = model(**inputs, num_items_in_batch=1, loss_only=True)
    sums = {"masked_tokens": float((inputs["labels"] != losses.IGNORED_LABEL).sum())}
    if isinstance(model, ElectraPretraining):
        found, replaced = output.logits > 0, output.replaced
        return sums | {
            "nll": float(output.generator_loss),
            "tokens": float(found.numel()),
            "discriminator": float(output.discriminator_loss) * found.numel(),
            "right": float((found == replaced).sum()),
            "found": float(found.sum()),
            "replaced": float(replaced.sum()),
            "hits": float((found & replaced).sum()),
        }
    if isinstance(model, heads.BertForPreTraining):
        logits, labels = output.seq_relationship_logits, inputs["next_sentence_label"]
        pairs = float(losses.cross_entropy(logits, labels, 1.0))
        return sums | {
            "nll": float(output.loss - model.pair_loss(logits, labels)),
            "pairs": float(labels.numel()),
            "pair_loss": pairs,
            "right": float((logits.argmax(-1) == labels).sum()),
        }
    return sums | {"nll": float(output.loss)}


def _scores(model: Any, sums: Counter[str]) -> dict[str, float]:
    if not sums["masked_tokens"]:
        raise ValueError(f"no token is hidden in any of the {int(sums['texts'])} texts that are held out")
    loss = sums["nll"] / sums["masked_tokens"]
    scores = {
        "loss": loss,
        "masked_lm_loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "masked_tokens": sums["masked_tokens"],
        "texts": sums["texts"],
    }
    if isinstance(model, ElectraPretraining):
        second = sums["discriminator"] / sums["tokens"]
        scores |= {
            "loss": loss + model.discriminator_weight * second,
            "discriminator_loss": second,
            "discriminator_accuracy": sums["right"] / sums["tokens"],
            "discriminator_precision": sums["hits"] / max(1, sums["found"]),
            "discriminator_recall": sums["hits"] / max(1, sums["replaced"]),
            "replaced": sums["replaced"] / sums["tokens"],
        }
    elif isinstance(model, heads.BertForPreTraining):
        second = sums["pair_loss"] / sums["pairs"]
        scores |= {
            "loss": loss + model.next_sentence_weight * second,
            "next_sentence_loss": second,
            "next_sentence_accuracy": sums["right"] / sums["pairs"],
        }
    return scores


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Within it torch draws from this seed; outside as if nothing had been drawn."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def padded(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A packed batch as (batch_size, longest) with an attention mask: what the plain definition takes.

    Tokens that are not there have the id, the type and the position 0, and no label.
    """
    cu_seqlens = batch["cu_seq_lens_q"].numpy()
    lengths, num_tokens = np.diff(cu_seqlens), int(cu_seqlens[-1])
    keep = torch.from_numpy(np.arange(lengths.max(initial=0)) < lengths[:, None])
    found: dict[str, Any] = {"attention_mask": keep.long()}
    for name, values in batch.items():
        if name in ("cu_seq_lens_q", "max_length_q"):
            continue
        if values.shape == (1, num_tokens):
            empty = losses.IGNORED_LABEL if name == "labels" else 0
            values = torch.full(keep.shape, empty).masked_scatter(keep, values[0])
        found[name] = values
    return found

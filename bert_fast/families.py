"""The kinds of checkpoints there are, by the `model_type` of their `config.json`: the only place that lists them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from bert_fast import electra, modules, reference
from bert_fast.config import BertConfig, ElectraConfig


@dataclass(frozen=True)
class Family:
    """What a kind of checkpoint is loaded as.

    Attributes:
        title: its name in a sentence.
        config: what its `config.json` holds.
        heads: the fast models by the name of their head; None is the model without one. `reference` has the plain ones
            by the same names of classes.
    """

    title: str
    config: type[BertConfig]
    heads: Mapping[str | None, type[nn.Module]]


FAMILIES = {
    "bert": Family("a BERT", BertConfig, modules.HEADS),
    "electra": Family("an ELECTRA", ElectraConfig, electra.HEADS),
}

#: What a checkpoint without a `model_type` is.
DEFAULT = BertConfig.model_type


def family(model_type: str) -> Family:
    """The family of this name; ValueError for one that is not there."""
    if model_type not in FAMILIES:
        raise ValueError(f"model_type is {model_type!r}; bert_fast knows: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def make_config(fields: Mapping[str, Any]) -> BertConfig:
    """The config of the contents of a `config.json`; ValueError for a family that is not there."""
    return family(fields.get("model_type", DEFAULT)).config.from_dict(dict(fields))


def model_class(config: BertConfig, head: str | None = None, *, plain: bool = False) -> Any:
    """The model of this config's family with a head, or without one.

    Args:
        config: of the checkpoint.
        head: one of the family's `heads`.
        plain: the one of `reference`, not the fast one.

    Raises:
        ValueError: the family has no such head.
    """
    known = family(config.model_type).heads
    if head not in known:
        names = ", ".join(name for name in known if name)
        raise ValueError(f"head is {head!r}, expected None or, for {config.model_type}, one of {names}")
    return getattr(reference, known[head].__name__) if plain else known[head]

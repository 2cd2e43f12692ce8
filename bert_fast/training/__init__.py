"""Training: batches by tokens, masking, optimisers, schedules, freezing, and the trainer that puts them together.

The names below come from transformers and accelerate, which the extra `[train]` installs; the modules for batches,
optimisers, schedules and freezing need torch alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

#: Public name -> the module that holds it, imported on first use.
_HOMES = {
    "CheckpointError": "bert_fast.training.checkpoints",
    "MaskingCollator": "bert_fast.training.masking",
    "PackingCollator": "bert_fast.training.batches",
    "Trainer": "bert_fast.training.trainer",
    "TrainingArguments": "bert_fast.training.arguments",
    "kept_memory": "bert_fast.training.memory",
}

__all__ = ["CheckpointError", "MaskingCollator", "PackingCollator", "Trainer", "TrainingArguments", "kept_memory"]

if TYPE_CHECKING:
    from bert_fast.training.arguments import TrainingArguments
    from bert_fast.training.batches import PackingCollator
    from bert_fast.training.checkpoints import CheckpointError
    from bert_fast.training.masking import MaskingCollator
    from bert_fast.training.memory import kept_memory
    from bert_fast.training.trainer import Trainer


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'bert_fast.training' has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        if error.name not in ("transformers", "accelerate"):
            raise
        raise ImportError(f'{name} needs {error.name}, which pip install "bert_fast[train]" brings') from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

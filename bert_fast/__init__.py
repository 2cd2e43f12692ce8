"""A fast BERT: a plain PyTorch definition, and fused Triton and C++ kernels that replace its steps."""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

#: Public name -> the module that holds it, imported on first use so that `import bert_fast` is quick.
_HOMES = {
    "BertConfig": "bert_fast.config",
    "Embedder": "bert_fast.embedder",
    "accelerate": "bert_fast.drop_in",
    "from_pretrained": "bert_fast.loading",
    "restore": "bert_fast.drop_in",
}

__all__ = ["BertConfig", "Embedder", "__version__", "accelerate", "from_pretrained", "restore"]

if TYPE_CHECKING:
    from bert_fast.config import BertConfig
    from bert_fast.drop_in import accelerate, restore
    from bert_fast.embedder import Embedder
    from bert_fast.loading import from_pretrained


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'bert_fast' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


def _one_thread_after_fork() -> None:
    """A forked child must not wait for OpenMP threads that only its parent has: PyTorch hangs there otherwise."""
    if torch := sys.modules.get("torch"):  # a process without it has no such threads, and its children need not load it
        torch.set_num_threads(1)


os.register_at_fork(after_in_child=_one_thread_after_fork)

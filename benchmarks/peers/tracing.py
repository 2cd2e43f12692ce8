"""What the peers that trace a model have in common."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from bert_fast.benchmarking import Case


class LastHiddenState(nn.Module):
    """A model with tensors for arguments, in the order of `Case.inputs`, and one tensor for a result."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """Each (batch_size, seq_len) int64 -> (batch_size, seq_len, hidden_size)."""
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        return outputs.last_hidden_state


def example(model: Any) -> dict[str, Tensor]:
    """Inputs to trace with: padded, so that the mask is in the trace."""
    return Case("example", (3, 5)).inputs(model.config.vocab_size)


@contextmanager
def quiet() -> Iterator[None]:
    """Without warnings: a tracer warns of each Python branch that it follows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield

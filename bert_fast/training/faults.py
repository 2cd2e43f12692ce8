"""What to say when the memory does not suffice."""

from __future__ import annotations

import torch

#: How errors for want of memory read, by whoever raises them.
_SIGNS = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is wanting, on a GPU or on the CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(sign in str(error) for sign in _SIGNS)


def out_of_memory(error: BaseException, step: int, batch: object, by_tokens: bool) -> RuntimeError:
    """The error to raise instead: which batch it was, and what would help.

    Args:
        error: what was raised.
        step: of the optimiser, counted from 1.
        batch: says what is in it.
        by_tokens: whether batches are made by tokens.
    """
    smaller = "max_tokens_per_batch" if by_tokens else "per_device_train_batch_size, or set max_tokens_per_batch"
    return RuntimeError(
        f"out of memory in step {step}, with a batch of {batch}. What helps: a smaller {smaller}, with more "
        "gradient_accumulation_steps to make up for it; bf16; activation_checkpointing; shorter texts. "
        f"({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    )

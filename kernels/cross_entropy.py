"""Cross-entropy of rows of logits in Triton, their gradient in their place: each program has one row.

The row is read twice: for the sum of its exponentials, and for its gradient, then from the second-level cache.
"""

# mypy: allow-untyped-defs, disable-error-code=assignment

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _logits(row_ptr, bias_ptr, classes, num_classes):
    """logits + bias, float32; -inf past the last class."""
    inside = classes < num_classes
    logits = tl.load(row_ptr + classes, mask=inside, other=float("-inf")).to(tl.float32)
    return logits + tl.load(bias_ptr + classes, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _cross_entropy_kernel(logits_ptr, bias_ptr, labels_ptr, losses_ptr, num_classes, BLOCK_N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * num_classes
    label = tl.load(labels_ptr + row)
    label_logit = tl.load(row_ptr + label).to(tl.float32) + tl.load(bias_ptr + label).to(tl.float32)

    # For each place of a block, the largest logit so far and the sum of exp(logit - largest).
    block = tl.arange(0, BLOCK_N)
    largest = tl.full((BLOCK_N,), -3.4e38, tl.float32)  # finite: -inf - -inf is NaN
    total = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, num_classes, BLOCK_N):
        logits = _logits(row_ptr, bias_ptr, first + block, num_classes)
        difference = logits - largest
        e = tl.exp2(-tl.abs(difference) * _LOG2_E)
        total = tl.where(difference > 0, total * e + 1.0, total + e)
        largest = tl.maximum(largest, logits)
    row_largest = tl.max(largest, axis=0)
    log2_total = tl.log2(tl.sum(total * tl.exp2((largest - row_largest) * _LOG2_E), axis=0))
    tl.store(losses_ptr + row, (row_largest - label_logit) + log2_total * _LN_2)

    for first in range(0, num_classes, BLOCK_N):
        classes = first + block
        logits = _logits(row_ptr, bias_ptr, classes, num_classes)
        softmax = tl.exp2((logits - row_largest) * _LOG2_E - log2_total)
        tl.store(row_ptr + classes, softmax - (classes == label).to(tl.float32), mask=classes < num_classes)


def cross_entropy_(logits: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each row, in nats; the logits become its gradient, softmax(logits + bias) - onehot(labels).

    Args:
        logits: (rows, classes), float32, float16 or bfloat16, contiguous; overwritten.
        bias: (classes,), logits' dtype or float32.
        labels: (rows,) int64, 0 to classes - 1; one outside makes the kernel read memory that is not the row's.

    Returns:
        (rows,) float32, computed in float32: logsumexp of logits + bias, less the label's.

    Raises:
        ValueError: logits is not contiguous.
    """
    if not logits.is_contiguous():
        raise ValueError(f"cross_entropy_: logits has strides {logits.stride()}, expected a contiguous tensor")
    num_rows, num_classes = logits.shape
    losses = logits.new_empty(num_rows, dtype=torch.float32)
    if logits.numel() == 0:
        return losses
    # A thread has 8 classes of a block: one 16-byte load of a 16-bit dtype. Long rows get more threads.
    num_warps = min(max(triton.next_power_of_2(num_classes) // 1024, 1), 16)
    with torch.cuda.device_of(logits):
        _cross_entropy_kernel[(num_rows,)](
            logits,
            bias.contiguous(),
            labels.contiguous(),
            losses,
            num_classes,
            BLOCK_N=256 * num_warps,
            num_warps=num_warps,
        )
    return losses

"""The gradient of LayerNorm(residual + dropout(x + bias)) in Triton: each program takes its share of the rows.

It reads what comes from above and what the forward kept, once, and adds up its rows' part in the gradients of the
vectors on the way; `sum_of_programs` adds up the programs'.
"""

# mypy: allow-untyped-defs, disable-error-code=assignment

import torch
import triton
import triton.language as tl
from torch import Tensor

from bert_fast.kernels.dropout import dropout_arguments, dropped_out
from bert_fast.kernels.residual_layer_norm import load_vector
from bert_fast.kernels.rows import blocks, sharing_programs, sum_of_programs


@triton.jit(do_not_specialize=["num_rows", "num_programs", "seed", "threshold"])
def _layer_norm_backward_kernel(
    grad_ptr,
    normalized_ptr,
    rstd_ptr,
    weight_ptr,
    dhidden_ptr,
    dx_ptr,
    sums_ptr,
    num_rows,
    num_programs,
    stride_row,
    stride_channel,
    seed,
    threshold,
    scale,
    DROPS_RESULT: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    block = tl.arange(0, BLOCK_N).to(tl.int64)[None, :]
    dweight, dlayer_norm_bias, dbias = (), (), ()
    for _ in tl.static_range(0, HIDDEN_SIZE, BLOCK_N):
        zeros = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        dweight, dlayer_norm_bias, dbias = dweight + (zeros,), dlayer_norm_bias + (zeros,), dbias + (zeros,)

    for tile in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_M), num_programs):
        rows = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
        in_rows = rows < num_rows
        rstd = tl.load(rstd_ptr + rows, mask=in_rows, other=0.0)
        grads, normalized = (), ()
        for start in tl.static_range(0, HIDDEN_SIZE, BLOCK_N):
            channels = start + block
            inside = in_rows & (channels < HIDDEN_SIZE)
            grad_at = grad_ptr + rows * stride_row + channels * stride_channel
            grad = tl.load(grad_at, mask=inside, other=0.0).to(tl.float32)
            if DROPS_RESULT:
                grad = dropped_out(grad, rows, channels, seed, threshold, scale)
            grads = grads + (grad,)
            normalized_at = normalized_ptr + rows * HIDDEN_SIZE + channels
            normalized = normalized + (tl.load(normalized_at, mask=inside, other=0.0).to(tl.float32),)

        # dhidden = rstd (g - mean(g) - normalized mean(g normalized)), g = grad weight
        sum_g, sum_gn = tl.zeros((BLOCK_M, BLOCK_N), tl.float32), tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in tl.static_range(0, HIDDEN_SIZE, BLOCK_N):
            g = grads[start // BLOCK_N] * load_vector(weight_ptr, start + block, rows, HIDDEN_SIZE)
            sum_g += g
            sum_gn += g * normalized[start // BLOCK_N]
        mean_g = tl.sum(sum_g, axis=1, keep_dims=True) / HIDDEN_SIZE
        mean_gn = tl.sum(sum_gn, axis=1, keep_dims=True) / HIDDEN_SIZE

        dweight_before, dlayer_norm_bias_before, dbias_before = dweight, dlayer_norm_bias, dbias
        dweight, dlayer_norm_bias, dbias = (), (), ()
        for start in tl.static_range(0, HIDDEN_SIZE, BLOCK_N):
            channels = start + block
            inside = in_rows & (channels < HIDDEN_SIZE)
            g = grads[start // BLOCK_N] * load_vector(weight_ptr, channels, rows, HIDDEN_SIZE)
            dhidden = (g - mean_g - normalized[start // BLOCK_N] * mean_gn) * rstd
            tl.store(dhidden_ptr + rows * HIDDEN_SIZE + channels, dhidden, mask=inside)
            dweight = dweight + (
                dweight_before[start // BLOCK_N] + grads[start // BLOCK_N] * normalized[start // BLOCK_N],
            )
            dlayer_norm_bias = dlayer_norm_bias + (dlayer_norm_bias_before[start // BLOCK_N] + grads[start // BLOCK_N],)
            if not DROPS_RESULT:
                dx = dropped_out(dhidden, rows, channels, seed, threshold, scale)
                if dx_ptr is not None:
                    tl.store(dx_ptr + rows * HIDDEN_SIZE + channels, dx, mask=inside)
                dbias = dbias + (dbias_before[start // BLOCK_N] + dx,)
            else:
                dbias = dbias + (dbias_before[start // BLOCK_N],)

    sums_ptr += tl.program_id(0).to(tl.int64) * HIDDEN_SIZE * (2 if DROPS_RESULT else 3)
    for start in tl.static_range(0, HIDDEN_SIZE, BLOCK_N):
        channels = start + block
        inside = channels < HIDDEN_SIZE
        tl.store(sums_ptr + channels, tl.sum(dweight[start // BLOCK_N], axis=0, keep_dims=True), mask=inside)
        tl.store(
            sums_ptr + HIDDEN_SIZE + channels,
            tl.sum(dlayer_norm_bias[start // BLOCK_N], axis=0, keep_dims=True),
            mask=inside,
        )
        if not DROPS_RESULT:
            tl.store(
                sums_ptr + 2 * HIDDEN_SIZE + channels,
                tl.sum(dbias[start // BLOCK_N], axis=0, keep_dims=True),
                mask=inside,
            )


def layer_norm_backward(
    grad: Tensor,
    normalized: Tensor,
    rstd: Tensor,
    weight: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    dhidden: Tensor,
    dx: Tensor | None,
    drops_result: bool,
) -> Tensor:
    """Write `dhidden`, the gradient of what is normalised, and `dx`, that after dropout, if it is given.

    `drops_result` says that dropout came after the LayerNorm and not before. Returns the gradients of weight,
    layer_norm_bias and, unless drops_result, bias: (2 or 3, hidden_size) in weight's dtype.
    """
    hidden_size, vectors = normalized.shape[-1], 2 if drops_result else 3
    if grad.numel() == 0:
        return weight.new_zeros((vectors, hidden_size))
    grad = grad.reshape(-1, hidden_size)
    num_rows = grad.shape[0]
    shape = blocks(num_rows, hidden_size)
    num_programs = sharing_programs(triton.cdiv(num_rows, shape["BLOCK_M"]), grad.device)
    sums = rstd.new_empty((num_programs, vectors, hidden_size))
    with torch.cuda.device_of(grad):
        _layer_norm_backward_kernel[(num_programs,)](
            grad,
            normalized.contiguous(),
            rstd.contiguous(),
            weight.contiguous(),
            dhidden,
            dx,
            sums,
            num_rows,
            num_programs,
            *grad.stride(),
            *dropout_arguments(dropout_p, seed),
            DROPS_RESULT=drops_result,
            HIDDEN_SIZE=hidden_size,
            **shape,
        )
    return sum_of_programs(sums, weight.dtype)


def residual_layer_norm_backward(
    grad: Tensor,
    normalized: Tensor,
    rstd: Tensor,
    weight: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    x_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `residual_layer_norm_train`'s result, computed in float32; the same bits every time.

    Args:
        grad: (..., hidden_size), the gradient of the result, in its dtype, any strides.
        normalized, rstd: as the forward returned them.
        weight: (hidden_size,).
        dropout_p, seed: the forward's.
        x_dtype: the dtype of x.

    Returns:
        dx, dbias, dresidual, dweight, dlayer_norm_bias: of the shapes and dtypes of what they are the gradients of. dx
        is dresidual, the very tensor, where they are equal.
    """
    dresidual = normalized.new_empty(normalized.shape)
    equal = dropout_p == 0 and x_dtype == dresidual.dtype
    dx = dresidual if equal else dresidual.new_empty(dresidual.shape, dtype=x_dtype)
    vectors = layer_norm_backward(
        grad, normalized, rstd, weight, dropout_p, seed, dresidual, None if equal else dx, drops_result=False
    )
    dweight, dlayer_norm_bias, dbias = vectors.unbind()
    return dx, dbias, dresidual, dweight, dlayer_norm_bias

"""Kernels alone: their inputs, and the contenders that run them, in processes of their own (`suite.bench_kernels`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from itertools import accumulate, cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import KernelCase
from benchmarks.processes import Spec
from bert_fast import ops
from bert_fast.benchmarking import Work, parse_case
from bert_fast.ops._dispatch import Op, Traits

HEAD_DIM = 64

#: Output features of `linear_gelu`, per input feature.
WIDER = 4

#: Rows of the word table: multilingual BERT's, several times any L2 at its width.
VOCAB_SIZE, MAX_POSITIONS, TYPES = 119_547, 512, 2

#: Sets of inputs that calls take in turn, so that none finds its own in a cache; the first and the third call of a
#: case, whose answers are compared (`worker.ANSWER_CALLS`), take the first.
SETS = 2

#: Every so many rows of an answer are compared.
STRIDE = 61

Arguments = tuple[Any, ...]


def op_of(case: KernelCase) -> Op:
    """The op that the case runs; not that of a gradient."""
    op: Op = import_module(f"bert_fast.ops.{case.op}").OP
    return op


def arguments(case: KernelCase, device: str, seed: int = 0) -> Arguments:
    """Random ones, in the order of the op's schema; the same for one seed on one kind of device."""
    generator = torch.Generator(device).manual_seed(seed)
    lengths, width = parse_case(case.case).lengths, case.width
    tokens = sum(lengths)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=getattr(torch, case.dtype))

    def ids(size: int) -> Tensor:
        return torch.randint(size, (tokens,), generator=generator, device=device)

    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    match case.op:
        case "attention":
            qkv = random(tokens, 3, width // HEAD_DIM, HEAD_DIM).unbind(1)  # as a fused projection leaves them
            return (*qkv, cu_seqlens, max(lengths), None, HEAD_DIM**-0.5, 0.0, None, None)
        case "attention_backward":
            qkv = random(tokens, 3, width // HEAD_DIM, HEAD_DIM).unbind(1)
            return (*qkv, cu_seqlens, max(lengths), random(tokens, width // HEAD_DIM, HEAD_DIM))  # and the gradient
        case "residual_layer_norm":
            return random(tokens, width), random(width), random(tokens, width), random(width), random(width), 1e-12, 0.0
        case "embedding_layer_norm":
            sizes = (VOCAB_SIZE, MAX_POSITIONS, TYPES)
            positions = torch.cat([torch.arange(length, device=device) for length in lengths])
            tables = [random(rows, width) for rows in sizes]
            return ids(VOCAB_SIZE), positions, ids(TYPES), *tables, random(width), random(width), 1e-12, 0.0, None
        case "bias_gelu":
            return random(tokens, width), random(width), "none"
        case "linear_gelu":
            return random(tokens, width), width**-0.5 * random(WIDER * width, width), random(WIDER * width), "none"
        case "pooling":
            return random(tokens, width), cu_seqlens, "mean"
    raise ValueError(f"op is {case.op!r}, expected one that arguments() knows")


def work(case: KernelCase) -> Work:
    """What a call does: floating-point operations of matrix products, and the bytes it must read and write.

    Of the embedding tables only the word table counts, the others stay in the cache; so do vectors everywhere.
    """
    batch = parse_case(case.case)
    tokens, row = batch.num_tokens, case.width * getattr(torch, case.dtype).itemsize
    flops, moved = 0, 0
    match case.op:
        case "attention":
            flops, moved = 4 * case.width * sum(n * n for n in batch.lengths), 4 * tokens * row
        case "attention_backward":  # five products for the forward's two
            flops, moved = 10 * case.width * sum(n * n for n in batch.lengths), 8 * tokens * row
        case "residual_layer_norm":
            moved = 3 * tokens * row
        case "embedding_layer_norm":
            moved = 2 * tokens * row + 3 * tokens * 8  # three int64 ids
        case "bias_gelu":
            moved = 2 * tokens * row
        case "linear_gelu":
            flops, moved = 2 * WIDER * tokens * case.width**2, (tokens * (1 + WIDER) + WIDER * case.width) * row
        case "pooling":
            moved = (tokens + len(batch.lengths)) * row
    return Work(case.op, case.name, case.dtype, tokens, batch.num_padded_tokens, flops, moved)


def truth(case: KernelCase, device: str) -> Tensor:
    """The rows that are compared, by the definition in float32, of the first set of inputs."""
    with _gradients(case):
        exact = [
            value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
            for value in arguments(case, device)
        ]
        if case.op == "attention_backward":
            return sample(case, _gradient_of_queries(case, exact, impl="reference")()).cpu()
        return sample(case, op_of(case).reference(*exact)).cpu()


def sample(case: KernelCase, answer: Tensor) -> Tensor:
    """Every `STRIDE`th row of an answer; that of padded attention is (batch_size, heads, seq_len, head_dim)."""
    if answer.dim() == 4:
        answer = answer.transpose(1, 2)[_mask(case, str(answer.device))]
    return answer[::STRIDE]


class Runner:
    """A contender: called with a case, it runs the next of its inputs."""

    def __init__(self, name: str, device: str) -> None:
        self.prepare, self.device = PREPARE[name], device
        self.case: KernelCase | None = None

    def __call__(self, case: KernelCase) -> Tensor:
        """Anything of the kernel's shape; the first call with a case object makes the inputs, and takes the first."""
        with _gradients(case):
            if case is not self.case:
                self.case = case
                sets = [arguments(case, self.device, seed) for seed in range(SETS)]
                self.calls = cycle([self.prepare(case, given) for given in sets])
            return next(self.calls)()


def _gradients(case: KernelCase) -> Any:
    """What a case runs under: inference mode, but for those that differentiate."""
    return torch.inference_mode(case.op != "attention_backward")


def _gradient(attend: Callable[..., Any], inputs: Sequence[Tensor], grad: Tensor) -> Callable[[], Tensor]:
    """The backward alone, again and again: it makes all three gradients, and that of the queries is compared."""
    leaves = [value.detach().requires_grad_() for value in inputs]
    out = attend(*leaves)
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)[0]


def _gradient_of_queries(case: KernelCase, given: Sequence[Any], **options: Any) -> Callable[[], Tensor]:
    """By the op, ragged, with its schedule; the mask of dropout is always the same."""
    *inputs, cu_seqlens, longest, grad = given
    schedule = None if options else ops.attention_schedule(inputs[0], cu_seqlens, longest)
    attend = partial(
        ops.attention,
        cu_seqlens=cu_seqlens,
        max_seqlen=longest,
        dropout_p=case.dropout_p,
        seed=torch.tensor(1) if case.dropout_p else None,
        schedule=schedule,
        **options,
    )
    return _gradient(attend, inputs, grad)


def _ours(case: KernelCase, given: Arguments) -> Callable[[], Tensor]:
    """The implementation itself, without the checks of its public function.

    Attention has its schedule, which a model makes once for all layers.
    """
    if case.op == "attention_backward":
        return _gradient_of_queries(case, given)
    traits = Traits(head_dim=HEAD_DIM) if case.op == "attention" else Traits()
    device = next(value.device.type for value in given if isinstance(value, Tensor))
    if case.op == "attention":
        q, _, _, cu_seqlens, longest, *_ = given
        given = (*given[:-1], ops.attention_schedule(q, cu_seqlens, longest))
    return partial(op_of(case).select(device, getattr(torch, case.dtype), traits).run, *given)


def _torch(case: KernelCase, given: Arguments) -> Callable[[], Tensor]:
    """PyTorch's own: the definition, operation after operation, but for the two that it has in one."""
    if case.op == "attention":
        mask = _mask(case, str(given[0].device))
        q, k, v = (_padded(t, mask).transpose(1, 2) for t in given[:3])
        keep = None if mask.all() else mask[:, None, None, :]
        return partial(F.scaled_dot_product_attention, q, k, v, attn_mask=keep)
    if case.op == "attention_backward":
        *inputs, _, _, grad = given
        mask = _mask(case, str(grad.device))
        keep = None if mask.all() else mask[:, None, None, :]
        q, k, v, padded = (_padded(t, mask).transpose(1, 2) for t in (*inputs, grad))
        return _gradient(partial(F.scaled_dot_product_attention, attn_mask=keep), (q, k, v), padded)
    if case.op == "pooling":
        hidden, cu_seqlens, _ = given
        return partial(torch.segment_reduce, hidden, "mean", offsets=cu_seqlens.long())
    return partial(op_of(case).reference, *given)


def _varlen(case: KernelCase, given: Arguments) -> Callable[[], Any]:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v, cu_seqlens, longest, *rest = given
    if case.op == "attention_backward":
        return _gradient(
            lambda q, k, v: varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest), (q, k, v), *rest
        )
    return partial(varlen_attn, q, k, v, cu_seqlens, cu_seqlens, longest, longest)


#: Contender -> what makes its call of a case and a set of inputs. The first is what ratios are to.
PREPARE: dict[str, Callable[[KernelCase, Arguments], Callable[[], Any]]] = {
    "torch": _torch,
    "varlen_attn": _varlen,
    "bert_fast": _ours,
}


def contenders(case: KernelCase, present: Sequence[str]) -> list[str]:
    """Of those present, the ones that have the op, and with dropout the mask that the definition has."""
    if case.dropout_p:
        return [name for name in present if name == "bert_fast"]
    return [name for name in present if name != "varlen_attn" or case.op.startswith("attention")]


def specs(device: str, with_varlen: bool) -> dict[str, Spec]:
    """How the processes make their contenders; `varlen_attn` runs on CUDA only."""
    names = [name for name in PREPARE if with_varlen or name != "varlen_attn"]
    return {name: Spec(partial(Runner, name, device), ("benchmarks.kernels",)) for name in names}


def _mask(case: KernelCase, device: str) -> Tensor:
    """(batch_size, longest) bool, True where a token is."""
    lengths = torch.tensor(parse_case(case.case).lengths, device=device)
    return torch.arange(int(lengths.max()), device=device) < lengths[:, None]


def _padded(rows: Tensor, mask: Tensor) -> Tensor:
    """(num_tokens, heads, head_dim) -> (batch_size, longest, heads, head_dim), zeros where no token is."""
    padded = rows.new_zeros(*mask.shape, *rows.shape[1:])
    padded[mask] = rows
    return padded

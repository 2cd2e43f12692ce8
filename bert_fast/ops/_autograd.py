"""How the ops are differentiated, eagerly and under `torch.compile`: one `autograd.Function` for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from bert_fast.ops._dispatch import Op, Selection


@dataclass(frozen=True)
class Gradient:
    """How the fused implementations of an op are differentiated.

    Both functions are given, first, what an `Impl.load_training` returned: the launchers of that implementation.

    Attributes:
        forward: (launchers, *args) -> (result, *saved): what the backward wants beside the arguments, as tensors. It
            runs with dropout too.
        backward: (launchers, grad, result, saved, args, needed) -> a gradient, or None, for each argument. `result` is
            None unless `reads_result`; a tensor that it does not read has the shape and dtype of the argument only.
        fake: (*args) -> empty tensors like those saved.
        reads: indices of the tensor arguments that the backward reads; the others are not kept alive.
        reads_result: whether it reads the result.
        serves: (*args) -> whether there is a fused gradient for them; otherwise the definition is recomputed.
    """

    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., Sequence[Tensor | None]]
    fake: Callable[..., tuple[Tensor, ...]] = lambda *args: ()
    reads: tuple[int, ...] = ()
    reads_result: bool = False
    serves: Callable[..., bool] = lambda *args: True


class Differentiable(torch.autograd.Function):
    """A fused forward, and its fused gradient; where there is none, that of the definition, which is recomputed.

    The results are the op's and, not differentiable, what its backward wants.
    """

    @staticmethod
    def forward(op: Op, selection: Selection, gradient: Gradient | None, *args: Any) -> tuple[Tensor, ...]:
        return op.run_training(selection, gradient, args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.op, ctx.selection, ctx.gradient, *args = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        _save(ctx, ctx.gradient, args, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *others: None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[3:]
        if grad is None:
            return (None, None, None, *(None for _ in needed))
        args, result, saved = _saved(ctx)
        if ctx.gradient is None:
            return (None, None, None, *_reference_backward(ctx.op, grad, args, needed))
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{ctx.op.name}: create_graph=True asks for gradients of gradients, for which the fused kernels keep "
                'too little; run the forward and the backward within bert_fast.ops.force("reference")'
            )
        launchers = ctx.selection.training
        return (None, None, None, *_fused_backward(ctx.gradient, launchers, grad, result, saved, args, needed))


def _fused_backward(
    gradient: Gradient,
    launchers: Any,
    grad: Tensor,
    result: Tensor | None,
    saved: Sequence[Tensor],
    args: Sequence[Any],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    grads = gradient.backward(launchers, grad, result, saved, args, needed)
    return [g if need else None for g, need in zip(grads, needed, strict=True)]


def _save(ctx: Any, gradient: Gradient | None, args: Sequence[Any], output: Sequence[Tensor]) -> None:
    """Keep for the backward what it reads: tensors as autograd wants them kept, the rest as it is."""
    tensors = [
        a if gradient is None or index in gradient.reads else a.new_empty(()).expand(a.shape)
        for index, a in enumerate(args)
        if isinstance(a, Tensor)
    ]
    ctx.others = [None if isinstance(a, Tensor) else a for a in args]
    ctx.is_tensor = [isinstance(a, Tensor) for a in args]
    ctx.has_result = gradient is not None and gradient.reads_result
    ctx.save_for_backward(*tensors, *(output if ctx.has_result else output[1:]))


def _saved(ctx: Any) -> tuple[list[Any], Tensor | None, tuple[Tensor, ...]]:
    """The arguments, the result if it is wanted, and what the forward saved."""
    tensors = iter(ctx.saved_tensors)
    args = [next(tensors) if t else other for t, other in zip(ctx.is_tensor, ctx.others, strict=True)]
    return args, next(tensors) if ctx.has_result else None, tuple(tensors)


def _reference_backward(op: Op, grad: Tensor, args: Sequence[Any], needed: Sequence[bool]) -> list[Tensor | None]:
    """Gradients of `op.reference` at `args`, one per argument, None where not `needed`."""
    wanted = [index for index, need in enumerate(needed) if need]

    def of_wanted(*tensors: Tensor) -> Tensor:
        full = list(args)
        for index, tensor in zip(wanted, tensors, strict=True):
            full[index] = tensor
        return op.reference(*full)

    # torch.func, not autograd.grad: inside a registered op the autograd dispatch keys are switched off.
    _, vjp, *_ = torch.func.vjp(of_wanted, *(args[index] for index in wanted))
    grads = iter(vjp(grad))
    return [next(grads) if need else None for need in needed]


def _differentiable(args: Sequence[Any]) -> list[bool]:
    return [isinstance(a, Tensor) and a.is_floating_point() for a in args]


def _owned(grads: Sequence[Tensor | None]) -> list[Tensor]:
    """Contiguous copies: a registered op may return no views, nor one tensor twice."""
    return [g.clone(memory_format=torch.contiguous_format) for g in grads if g is not None]


def _empty_gradients(args: Sequence[Any]) -> list[Tensor]:
    return [a.new_empty(a.shape) for a, need in zip(args, _differentiable(args), strict=True) if need]


def register(op: Op, schema: str, fake: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Register `bert_fast::<name>` and its backward by recomputation, opaque to `torch.compile`, and return the op."""

    def forward(*args: Any) -> Tensor:
        return op.run(op.selection_for(args), args)

    registered = torch.library.custom_op(f"bert_fast::{op.name}", forward, mutates_args=(), schema=schema)
    registered.register_fake(fake)

    def backward(grad: Tensor, *args: Any) -> list[Tensor]:
        return _owned(_reference_backward(op, grad, args, _differentiable(args)))

    registered_backward = torch.library.custom_op(
        f"bert_fast::{op.name}_backward",
        backward,
        mutates_args=(),
        schema=f"(Tensor grad, {_arguments(schema)}) -> Tensor[]",
    )
    registered_backward.register_fake(lambda grad, *args: _empty_gradients(args))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _save(ctx, None, inputs, (output,))

    def run_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        args, *_ = _saved(ctx)
        grads = iter(registered_backward(grad, *args))
        return tuple(next(grads) if need else None for need in _differentiable(args))

    registered.register_autograd(run_backward, setup_context=setup_context)
    return registered


def register_training(
    op: Op, gradient: Gradient, schema: str, fake: Callable[..., Tensor]
) -> Callable[..., list[Tensor]]:
    """Register `bert_fast::<name>_train`, the result and what its backward wants, and `<name>_train_backward`.

    A graph does not know which implementation will run, so what is saved must not depend on it: the definition, too,
    gives tensors like those of `gradient.fake`, zeros, which its backward, a recomputation, does not read.
    """

    def forward(*args: Any) -> list[Tensor]:
        selection = op.selection_for(args)
        fused = op.differentiates(selection, args)
        if fused is not None:
            return list(op.run_training(selection, fused, args))
        return [op.run(selection, args), *(saved.zero_() for saved in gradient.fake(*args))]

    name = f"bert_fast::{op.name}_train"
    registered = torch.library.custom_op(name, forward, mutates_args=(), schema=f"({_arguments(schema)}) -> Tensor[]")
    registered.register_fake(lambda *args: [fake(*args), *gradient.fake(*args)])

    def backward(grad: Tensor, result: Tensor, saved: list[Tensor], *args: Any) -> list[Tensor]:
        selection, needed = op.selection_for(args), _differentiable(args)
        if op.differentiates(selection, args) is None:
            return _owned(_reference_backward(op, grad, args, needed))
        return _owned(_fused_backward(gradient, selection.training, grad, result, saved, args, needed))

    registered_backward = torch.library.custom_op(
        f"{name}_backward",
        backward,
        mutates_args=(),
        schema=f"(Tensor grad, Tensor result, Tensor[] saved, {_arguments(schema)}) -> Tensor[]",
    )
    registered_backward.register_fake(lambda grad, result, saved, *args: _empty_gradients(args))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        ctx.others = [None if isinstance(a, Tensor) else a for a in inputs]
        ctx.is_tensor = [isinstance(a, Tensor) for a in inputs]
        ctx.has_result = True
        ctx.save_for_backward(*(a for a in inputs if isinstance(a, Tensor)), *output)

    def run_backward(ctx: Any, grads: list[Tensor]) -> tuple[Tensor | None, ...]:
        args, result, saved = _saved(ctx)
        found = iter(registered_backward(grads[0], result, list(saved), *args))
        return tuple(next(found) if need else None for need in _differentiable(args))

    registered.register_autograd(run_backward, setup_context=setup_context)
    return registered


def _arguments(schema: str) -> str:
    """What stands between the parentheses of a schema."""
    return schema[1 : schema.rindex("->")].strip().removesuffix(")")

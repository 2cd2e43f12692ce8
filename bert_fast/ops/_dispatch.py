"""Which implementation runs an op: a table, an ordered walk over it, and every refusal kept as a sentence.

An `Op` owns its plain definition (`reference`) and an ordered tuple of `Impl`s. The choice depends on the device, the
dtype and a few op-specific `Traits`; it is made once per combination and remembered.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

#: Name of the plain definition among the implementations of an op.
REFERENCE = "reference"

FORCE_VARIABLE = "BERT_FAST_IMPL"

_forced: str | None = os.environ.get(FORCE_VARIABLE) or None


class FallbackWarning(UserWarning):
    """A fused implementation was expected to run and could not; the plain definition runs instead."""


class Traits(NamedTuple):
    """What the choice depends on besides device and dtype."""

    head_dim: int = 0  # attention only
    bias: bool = False  # attention only
    dropout: bool = False
    forward_ad: bool = False  # forward-mode derivatives are wanted


def forward_ad_is_on() -> bool:
    """Whether tensors may carry tangents (torch.func.jvp, torch.autograd.forward_ad), which a fused kernel drops."""
    return forward_ad._current_level >= 0  # torch has no public name for it


@dataclass(frozen=True)
class Impl:
    """One fused implementation of an op.

    Attributes:
        name: "triton" or "cpp".
        device: device type it runs on, "cuda" or "cpu".
        dtypes: dtypes it takes.
        load: returns the callable; runs once, on first use; raises ImportError with the reason when it cannot.
        limits: why it refuses the given traits, or None.
        validates: it raises ValueError by itself for what the op's `check` refuses.
    """

    name: str
    device: str
    dtypes: tuple[torch.dtype, ...]
    load: Callable[[], Callable[..., Any]]
    limits: Callable[[Traits], str | None] = lambda traits: None
    validates: bool = False

    def refusal(self, device: str, dtype: torch.dtype, traits: Traits) -> str | None:
        """Why this implementation does not serve the call, or None when it does."""
        if device != self.device:
            return f"runs on {self.device}, not on {device}"
        if dtype not in self.dtypes:
            return f"takes {', '.join(str(d).removeprefix('torch.') for d in self.dtypes)}, not {dtype}".replace(
                "torch.", ""
            )
        if traits.dropout:
            return "has no dropout"
        if traits.forward_ad:
            return "has no forward-mode derivative"
        if reason := self.limits(traits):
            return reason
        try:
            self.load()
        except ImportError as error:
            return f"cannot be loaded: {error}"
        return None


@dataclass(frozen=True)
class Selection:
    """The outcome of a choice: the name and callable that run, and why each one before it was refused."""

    name: str
    run: Callable[..., Any]
    refusals: tuple[tuple[str, str], ...]
    validates: bool = False


class Op:
    """One step of BERT: its definition, its fused implementations, its autograd and its form for `torch.compile`.

    Args:
        name: name of the op; registered as `torch.ops.bert_fast.<name>`.
        schema: its arguments and result in the schema language of `torch.library`.
        reference: the plain definition; takes the arguments of the schema in order, any dtype, differentiable.
        fake: takes the same arguments and returns an empty result of the right shape and dtype.
        check: takes the same arguments and raises ValueError for what no implementation may see.
        impls: fused implementations, best first; each takes the same arguments.
        lead: index of the tensor argument whose device and dtype decide.
        traits: takes the same arguments and returns what else decides.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        reference: Callable[..., Tensor],
        fake: Callable[..., Tensor],
        check: Callable[..., None],
        impls: Sequence[Impl],
        lead: int = 0,
        traits: Callable[..., Traits] = lambda *args: Traits(),
    ) -> None:
        self.name = name
        self.reference = reference
        self.check = check
        self.impls = tuple(impls)
        self.lead = lead
        self.traits = traits
        self._selections: dict[tuple[Any, ...], Selection] = {}
        self._registered = _register(self, schema, fake)

    def __call__(self, *args: Any, impl: str | None = None, out: Tensor | None = None) -> Tensor:
        """Run the op on the best implementation, or on the one named; differentiable unless it writes into `out`."""
        if out is not None:
            return self._write(args, impl, out)
        if torch.compiler.is_compiling() and impl is None:
            return self.reference(*args) if self.traits(*args).dropout else self._registered(*args)
        selection = self._selection_for(args, impl)
        recorded = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
        if recorded and selection.name != REFERENCE:
            return _Differentiable.apply(self, selection, *args)
        return self._run(selection, args)

    def _selection_for(self, args: Sequence[Any], impl: str | None = None) -> Selection:
        lead, traits = args[self.lead], self.traits(*args)
        if forward_ad_is_on():
            traits = traits._replace(forward_ad=True)
        key = (lead.device.type, lead.dtype, traits, impl or _forced)
        selection = self._selections.get(key)
        if selection is None:
            self.check(*args)  # before anybody is told which implementation refuses such arguments
            selection = self.select(*key)
        return selection

    def _run(self, selection: Selection, args: Sequence[Any], **out: Tensor) -> Tensor:
        """Run checked arguments: a validating implementation looks at them itself, which takes less time."""
        if not selection.validates:
            self.check(*args)
            return selection.run(*args, **out)
        try:
            return selection.run(*args, **out)
        except ValueError:
            self.check(*args)  # raises the same in words that do not depend on the implementation
            raise

    def _write(self, args: Sequence[Any], impl: str | None, out: Tensor) -> Tensor:
        lead = args[self.lead]
        if (out.shape, out.dtype, out.device) != (lead.shape, lead.dtype, lead.device) or not out.is_contiguous():
            raise ValueError(
                f"{self.name}: out is {out.dtype} of shape {tuple(out.shape)} with strides {out.stride()} on "
                f"{out.device}, expected contiguous {lead.dtype} of shape {tuple(lead.shape)} on {lead.device}"
            )
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in (*args, out)):
            raise ValueError(f"{self.name}: out is given, but gradients are to be recorded")
        selection = self._selection_for(args, impl)
        if selection.name == REFERENCE:
            return out.copy_(self._run(selection, args))
        return self._run(selection, args, out=out)

    def select(self, device: str, dtype: torch.dtype, traits: Traits = Traits(), impl: str | None = None) -> Selection:
        """The implementation that serves `device` (a type: "cpu", "cuda"), `dtype` and `traits`.

        Raises:
            ValueError: `impl`, or the one forced by `force` or BERT_FAST_IMPL, is unknown or refuses.
        """
        wanted = impl or _forced
        key = (device, dtype, traits, wanted)
        selection = self._selections.get(key)
        if selection is None:
            selection = self._selections[key] = self._choose(device, dtype, traits, wanted)
        return selection

    def _choose(self, device: str, dtype: torch.dtype, traits: Traits, wanted: str | None) -> Selection:
        names = [i.name for i in self.impls] + [REFERENCE]
        if wanted is not None and wanted not in names:
            raise ValueError(f"{self.name} has no implementation {wanted!r}; it has: {', '.join(names)}")
        refusals: list[tuple[str, str]] = []
        for impl in self.impls:
            if wanted not in (None, impl.name):
                refusals.append((impl.name, f"{wanted} is forced"))
            elif reason := impl.refusal(device, dtype, traits):
                refusals.append((impl.name, reason))
            else:
                return Selection(impl.name, impl.load(), tuple(refusals), impl.validates)
        if wanted in (None, REFERENCE):
            if wanted is None:
                self._warn_of_refusals(device, dtype, refusals)
            return Selection(REFERENCE, self.reference, tuple(refusals))
        raise ValueError(f"{self.name}: {wanted} is forced but {dict(refusals)[wanted]}")

    def _warn_of_refusals(self, device: str, dtype: torch.dtype, refusals: list[tuple[str, str]]) -> None:
        """Say why no fused implementation runs where one exists for the device; a reason shared by ops is said once.

        float64 is the dtype of the truth: the plain definition is what a caller wants there.
        """
        for name, reason in refusals:
            if dtype != torch.float64 and any(i.name == name and i.device == device for i in self.impls):
                warn_of_fallback(
                    f"{name} {reason}; the plain PyTorch definition runs instead (`bert-fast doctor` says more)"
                )


_warned: set[str] = set()


def warn_of_fallback(sentence: str) -> None:
    """Warn, once per sentence, that something runs on the plain definition."""
    if sentence not in _warned:
        _warned.add(sentence)
        warnings.warn(f"bert_fast: {sentence}", FallbackWarning, stacklevel=3)


@contextmanager
def force(name: str | None) -> Iterator[None]:
    """Force every op of the process to the implementation `name` ("reference", "triton", "cpp"), or to none."""
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def forced() -> str | None:
    """The implementation that `force` or BERT_FAST_IMPL asks for."""
    return _forced


def extension() -> Any | None:
    """The module of the C++ kernels, or None where it cannot be imported."""
    try:
        from bert_fast import _C
    except ImportError:
        return None
    return _C


class _Differentiable(torch.autograd.Function):
    """A fused forward with the gradient of the definition: the backward recomputes the reference."""

    @staticmethod
    def forward(op: Op, selection: Selection, *args: Any) -> Tensor:
        return op._run(selection, args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.op, _, *args = inputs
        _save_arguments(ctx, args)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *_reference_backward(ctx.op, grad, _saved_arguments(ctx), ctx.needs_input_grad[2:]))


def _save_arguments(ctx: Any, args: Sequence[Any]) -> None:
    """Keep an op's arguments for its backward: tensors as autograd wants them kept, the rest as they are."""
    ctx.others = [None if isinstance(a, Tensor) else a for a in args]
    ctx.is_tensor = [isinstance(a, Tensor) for a in args]
    ctx.save_for_backward(*(a for a in args if isinstance(a, Tensor)))


def _saved_arguments(ctx: Any) -> list[Any]:
    saved = iter(ctx.saved_tensors)
    return [next(saved) if t else other for t, other in zip(ctx.is_tensor, ctx.others, strict=True)]


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


def _register(op: Op, schema: str, fake: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Register `bert_fast::<name>` and its backward, opaque to `torch.compile`, and return the op."""

    def forward(*args: Any) -> Tensor:
        return op._run(op._selection_for(args), args)

    registered = torch.library.custom_op(f"bert_fast::{op.name}", forward, mutates_args=(), schema=schema)
    registered.register_fake(fake)

    arguments = schema[: schema.rindex("->")].strip()
    backward_schema = f"(Tensor grad, {arguments[1:]} -> Tensor[]"

    def differentiable(args: Sequence[Any]) -> list[bool]:
        return [isinstance(a, Tensor) and a.is_floating_point() for a in args]

    def backward(grad: Tensor, *args: Any) -> list[Tensor]:
        grads = _reference_backward(op, grad, args, differentiable(args))
        return [g.clone() for g in grads if g is not None]  # a registered op may not return one tensor twice

    registered_backward = torch.library.custom_op(
        f"bert_fast::{op.name}_backward", backward, mutates_args=(), schema=backward_schema
    )

    @registered_backward.register_fake
    def _(grad: Tensor, *args: Any) -> list[Tensor]:
        return [torch.empty_like(a) for a, need in zip(args, differentiable(args), strict=True) if need]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _save_arguments(ctx, inputs)

    def run_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        args = _saved_arguments(ctx)
        grads = iter(registered_backward(grad, *args))
        return tuple(next(grads) if need else None for need in differentiable(args))

    registered.register_autograd(run_backward, setup_context=setup_context)
    return registered

"""Which implementation runs an op: a table, an ordered walk over it, and every refusal kept as a sentence.

An `Op` owns its plain definition (`reference`) and an ordered tuple of `Impl`s. The choice depends on the device, the
dtype and a few op-specific `Traits`; it is made once per combination and remembered.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bert_fast.checks import is_transformed
from bert_fast.ops._autograd import Differentiable, Gradient, register, register_training

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
    half: bool = False  # residual_layer_norm only: x is float16
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
        load_training: returns what has the launchers that the op's `Gradient` calls, if there is one.
    """

    name: str
    device: str
    dtypes: tuple[torch.dtype, ...]
    load: Callable[[], Callable[..., Any]]
    limits: Callable[[Traits], str | None] = lambda traits: None
    validates: bool = False
    load_training: Callable[[], Any] | None = None

    def refusal(self, device: str, dtype: torch.dtype, traits: Traits) -> str | None:
        """Why this implementation does not serve the call, or None when it does."""
        if device != self.device:
            return f"runs on {self.device}, not on {device}"
        if dtype not in self.dtypes:
            return f"takes {', '.join(str(d).removeprefix('torch.') for d in self.dtypes)}, not {dtype}".replace(
                "torch.", ""
            )
        if traits.dropout and self.load_training is None:
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
    training: Any = None


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
        gradient: how implementations with launchers for training are differentiated. The gradient of others is that of
            the reference, by recomputation.
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
        gradient: Gradient | None = None,
    ) -> None:
        self.name = name
        self.reference = reference
        self.check = check
        self.impls = tuple(impls)
        self.lead = lead
        self.traits = traits
        self.gradient = gradient
        self._selections: dict[tuple[Any, ...], Selection] = {}
        self._registered = register(self, schema, fake)
        self._registered_training = None if gradient is None else register_training(self, gradient, schema, fake)

    def __call__(self, *args: Any, impl: str | None = None, out: Tensor | None = None) -> Tensor:
        """Run the op on the best implementation, or on the one named; differentiable unless it writes into `out`."""
        if out is not None:
            return self._write(args, impl, out)
        recorded = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
        if torch.compiler.is_compiling() and impl is None:
            dropout = self.traits(*args).dropout
            if self._registered_training is not None and (recorded or dropout):
                return self._registered_training(*args)[0]
            return self.reference(*args) if dropout else self._registered(*args)
        selection = self.selection_for(args, impl)
        if recorded and selection.name != REFERENCE:
            gradient = None if is_transformed() else self.differentiates(selection, args)
            return Differentiable.apply(self, selection, gradient, *args)[0]
        return self.run(selection, args)

    def differentiates(self, selection: Selection, args: Sequence[Any]) -> Gradient | None:
        """The fused gradient that serves these arguments, or None where the definition is recomputed."""
        gradient = self.gradient
        return gradient if gradient is not None and selection.training and gradient.serves(*args) else None

    def selection_for(self, args: Sequence[Any], impl: str | None = None) -> Selection:
        """The implementation that serves these arguments; `check` has seen them if it is a new kind of them."""
        lead, traits = args[self.lead], self.traits(*args)
        if forward_ad_is_on():
            traits = traits._replace(forward_ad=True)
        key = (lead.device.type, lead.dtype, traits, impl or _forced)
        selection = self._selections.get(key)
        if selection is None:
            self.check(*args)  # before anybody is told which implementation refuses such arguments
            selection = self.select(*key)
        return selection

    def run(self, selection: Selection, args: Sequence[Any], **out: Tensor) -> Tensor:
        """The result, on the implementation selected."""
        if selection.name != REFERENCE and self.traits(*args).dropout:
            return self.run_training(selection, self.differentiates(selection, args), args)[0]
        return self._checked(selection, selection.run, args, **out)

    def run_training(self, selection: Selection, gradient: Gradient | None, args: Sequence[Any]) -> tuple[Tensor, ...]:
        """The result, and what the backward wants: nothing without a fused gradient, which recomputes."""
        if gradient is not None:
            return self._checked(selection, partial(gradient.forward, selection.training), args)
        if self.traits(*args).dropout:
            return (self._checked(selection, self.reference, args),)
        return (self.run(selection, args),)

    def _checked(self, selection: Selection, run: Callable[..., Any], args: Sequence[Any], **out: Tensor) -> Any:
        """Run checked arguments: a validating implementation looks at them itself, which takes less time."""
        if not selection.validates:
            self.check(*args)
            return run(*args, **out)
        try:
            return run(*args, **out)
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
        selection = self.selection_for(args, impl)
        if selection.name == REFERENCE or self.traits(*args).dropout:
            return out.copy_(self.run(selection, args))
        return self.run(selection, args, out=out)

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
                training = impl.load_training() if impl.load_training else None
                return Selection(impl.name, impl.load(), tuple(refusals), impl.validates, training)
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


def triton_launchers(op: str, forward: str) -> SimpleNamespace:
    """Triton's launchers of an op in training: `forward`, and the op's backward."""
    backward = f"{op}_backward"
    launchers = SimpleNamespace()
    for module, name in ((op, forward), (backward, backward)):
        setattr(launchers, name, getattr(importlib.import_module(f"bert_fast.kernels.{module}"), name))
    return launchers

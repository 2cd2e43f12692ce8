"""Parameters that several processes share out (FSDP2, `fully_shard`), and the modules that bring them together."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn


def is_sharded(model: nn.Module) -> bool:
    """Whether some of its parameters are elsewhere now, so that the host has no address of them."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    return any(type(parameter) is not nn.Parameter for parameter in model.parameters())


def is_unit(module: nn.Module) -> bool:
    """Whether `fully_shard` was given this module: its parameters are whole from a call of it until it returns."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def plain_type(module: nn.Module) -> type[nn.Module]:
    """The class of a module before `fully_shard` put its own in front of it."""
    kind = type(module)
    return kind.__bases__[1] if is_unit(module) else kind


def is_own_hook(hook: Any) -> bool:
    """Whether it is what brings the parameters of a unit together, or lets go of them."""
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp")


def called(module: nn.Module, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`run`, which reads the module's parameters; of a unit, as a call of the module with `run` for its `forward`."""
    return (lambda *rows: _call(module, run, *rows)) if is_unit(module) else run


def _call(module: nn.Module, run: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    vars(module)["forward"] = run  # before that of its class
    try:
        # Not that of its class, which in transformers computes the original again where activations are not kept.
        result: Tensor = nn.Module.__call__(module, *rows)
        return result
    finally:
        del vars(module)["forward"]

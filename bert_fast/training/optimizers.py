"""Optimisers by name, and the groups of parameters that BERT gives them.

A gradient that is not finite makes its own parameter so, as with torch's optimisers, and under LAMB no other one:
whoever wants to skip such a step looks at the loss or the norm of the gradients before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bert_fast.training.parts import EMBEDDINGS, HEAD, POOLER, part_of, parts

#: What `torch.optim.AdamW` has a fused kernel for that is proven here.
_FUSED_DEVICES = frozenset({"cpu", "cuda"})


def parameter_groups(
    model: nn.Module, lr: float, *, weight_decay: float = 0.01, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """The parameters of a model that are trained, for an optimiser: no decay for biases and LayerNorm.

    With a `layer_decay` below 1 the rate falls from the head to the embeddings, as in ELECTRA (google-research/electra,
    model/optimization.py): of n layers, layer i of 0 to n - 1 gets lr * layer_decay^(n + 1 - i), the embeddings
    lr * layer_decay^(n + 2), the head lr. The pooler, which ELECTRA does not have, stands between: lr * layer_decay.

    Args:
        model: any; for a `layer_decay` below 1 one with the names of a Hugging Face BERT.
        lr: of the head.
        weight_decay: of all but biases and LayerNorm.
        layer_decay: between 0 and 1.

    Returns:
        Groups with `params`, `lr` and `weight_decay`, from the embeddings to the head; no group is empty.

    Raises:
        ValueError: no parameter requires a gradient, or `layer_decay` is impossible or does not fit the model.
    """
    if not 0.0 < layer_decay <= 1.0:
        raise ValueError(f"layer_decay is {layer_decay}, expected more than 0, at most 1")
    heights = {} if layer_decay == 1.0 else _heights(list(parts(model)))
    norms = {id(p) for module in model.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()}
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = id(parameter) not in norms and not name.endswith("bias")
            groups.setdefault((heights.get(part_of(name), 0), decays), []).append(parameter)
    if not groups:
        raise ValueError(f"no parameter of the {type(model).__name__} requires a gradient")
    return [
        {"params": groups[key], "lr": lr * layer_decay ** key[0], "weight_decay": weight_decay if key[1] else 0.0}
        for key in sorted(groups, reverse=True)
    ]


def _heights(names: list[str]) -> dict[str, int]:
    """How often the rate of a part is decayed."""
    layers = [name for name in names if name not in (EMBEDDINGS, POOLER, HEAD)]
    depths = {name: len(layers) + 1 - index for index, name in enumerate(layers)}
    return {**depths, EMBEDDINGS: len(layers) + 2, POOLER: 1, HEAD: 0}


class _MomentOptimizer(Optimizer):
    """Keeps running means of each gradient and of its square, in the dtype of the parameter."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        **others: Any,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0.0:
                raise ValueError(f"{name} is {value}, expected at least 0")
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas are {betas}, expected each at least 0, below 1")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **others})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step; parameters without a gradient are passed over, and get no state.

        Args:
            closure: computes the loss and its gradients first.

        Returns:
            What the closure does.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for params in _alike(group["params"]):
                means, squares = self._moments(params, group["betas"])
                updates = self._updates(params, means, squares, group)
                torch._foreach_add_(params, updates, alpha=-group["lr"])
        return loss

    def _moments(self, params: list[Tensor], betas: tuple[float, float]) -> tuple[list[Tensor], list[Tensor]]:
        """The running means with the present gradients in them."""
        grads: list[Any] = [parameter.grad for parameter in params]
        for parameter, grad in zip(params, grads, strict=True):
            if grad.layout != torch.strided:
                what = f"{grad.layout} one of a parameter {tuple(parameter.shape)}"
                raise RuntimeError(f"{type(self).__name__} takes dense gradients only, got a {what}")
            state = self.state[parameter]
            if not state:
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        means = [self.state[parameter]["exp_avg"] for parameter in params]
        squares = [self.state[parameter]["exp_avg_sq"] for parameter in params]
        torch._foreach_lerp_(means, grads, 1 - betas[0])
        torch._foreach_mul_(squares, betas[1])
        torch._foreach_addcmul_(squares, grads, grads, 1 - betas[1])
        return means, squares

    def _updates(
        self, params: list[Tensor], means: list[Tensor], squares: list[Tensor], group: dict[str, Any]
    ) -> list[Tensor]:
        """What is subtracted from the parameters, before the learning rate."""
        raise NotImplementedError


class BertAdam(_MomentOptimizer):
    """The Adam that BERT was trained with (google-research/bert, optimization.py), which corrects no bias.

    m = beta1 m + (1 - beta1) g, v = beta2 v + (1 - beta2) g^2, p = p - lr (m / (sqrt(v) + eps) + weight_decay p). The
    first steps are larger than Adam's, 3.2 times for these betas, which the warm-up makes good.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        betas, eps, weight_decay: as above.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay)

    def _updates(
        self, params: list[Tensor], means: list[Tensor], squares: list[Tensor], group: dict[str, Any]
    ) -> list[Tensor]:
        roots = torch._foreach_sqrt(squares)
        torch._foreach_add_(roots, group["eps"])
        updates = torch._foreach_div(means, roots)
        if group["weight_decay"]:
            torch._foreach_add_(updates, params, alpha=group["weight_decay"])
        return list(updates)


class LAMB(_MomentOptimizer):
    """Adam whose steps are as long as the parameter is large (You et al., 2019), for batches of thousands of texts.

    With m and v as in Adam, corrected for their bias, u = m / (sqrt(v) + eps) + weight_decay p and the trust ratio
    r = |p| / |u|: p = p - lr r u. As in NVIDIA's reference (apex, FusedLAMB) r is 1 where either norm is 0, and for
    parameters without weight decay, which biases and LayerNorm are. That reference also clips the gradients, to a
    global norm of 1; here that is for the caller to do.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        betas, eps, weight_decay: as above.
        max_trust_ratio: r is clipped to this; None for no limit, as in the reference.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        max_trust_ratio: float | None = None,
    ) -> None:
        if max_trust_ratio is not None and not max_trust_ratio > 0.0:
            raise ValueError(f"max_trust_ratio is {max_trust_ratio}, expected more than 0")
        super().__init__(params, lr, betas, eps, weight_decay, max_trust_ratio=max_trust_ratio)

    def _updates(
        self, params: list[Tensor], means: list[Tensor], squares: list[Tensor], group: dict[str, Any]
    ) -> list[Tensor]:
        steps = [self._count(parameter) for parameter in params]
        beta1, beta2 = group["betas"]
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, [(1 - beta2**step) ** 0.5 for step in steps])
        torch._foreach_add_(roots, group["eps"])
        updates = torch._foreach_div(means, roots)
        torch._foreach_div_(updates, [1 - beta1**step for step in steps])
        if group["weight_decay"]:
            torch._foreach_add_(updates, params, alpha=group["weight_decay"])
            torch._foreach_mul_(updates, _trust_ratios(params, updates, group["max_trust_ratio"]))
        return list(updates)

    def _count(self, parameter: Tensor) -> int:
        """The number of this step for a parameter; they differ where some were frozen for a while."""
        state = self.state[parameter]
        state["step"] = state.get("step", torch.zeros(())) + 1
        return int(state["step"])


def _trust_ratios(params: list[Tensor], updates: Iterable[Tensor], limit: float | None) -> list[Tensor]:
    lengths, steps = (torch.stack(torch._foreach_norm(list(tensors))) for tensors in (params, updates))
    ratios = torch.where((lengths > 0) & (steps > 0), lengths / steps, 1.0)
    return list((ratios if limit is None else ratios.clamp(max=limit)).unbind())


def _alike(params: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    """Those that have a gradient, by device and dtype, as the foreach operations want them."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for parameter in params:
        if parameter.grad is not None:
            groups.setdefault((parameter.device, parameter.dtype), []).append(parameter)
    return groups.values()


def adamw(
    params: Iterable[Any],
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.01,
) -> torch.optim.AdamW:
    """`torch.optim.AdamW` with BERT's eps and weight decay, in its fused form where all parameters are on CPU or CUDA.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        betas, eps, weight_decay: as in torch.
    """
    groups = [{**item, "params": list(item["params"])} if isinstance(item, dict) else item for item in params]
    tensors = [tensor for item in groups for tensor in (item["params"] if isinstance(item, dict) else [item])]
    fused = all(tensor.device.type in _FUSED_DEVICES for tensor in tensors)
    return torch.optim.AdamW(groups, lr, betas, eps, weight_decay, fused=fused)


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"adamw": adamw, "bert_adam": BertAdam, "lamb": LAMB}


def make_optimizer(name: str, params: Iterable[Any], lr: float, **options: Any) -> Optimizer:
    """An optimiser by name.

    Args:
        name: one of `OPTIMIZERS`.
        params: parameters, or groups of them, such as `parameter_groups` gives.
        lr: learning rate of the groups that have none of their own.
        options: what else the optimiser takes: betas, eps, weight_decay.

    Raises:
        ValueError: the name is unknown, or an option impossible.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer is {name!r}, expected one of {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name](params, lr=lr, **options)

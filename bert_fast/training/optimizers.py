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


def _listed(params: Iterable[Any]) -> list[Any]:
    """Parameters, or groups of them, that can be read twice."""
    return [{**item, "params": list(item["params"])} if isinstance(item, dict) else item for item in params]


def _is_fusible(groups: list[Any]) -> bool:
    tensors = (tensor for item in groups for tensor in (item["params"] if isinstance(item, dict) else [item]))
    return all(tensor.device.type in _FUSED_DEVICES for tensor in tensors)


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
    groups = _listed(params)
    return torch.optim.AdamW(groups, lr, betas, eps, weight_decay, fused=_is_fusible(groups))


class BertAdam(torch.optim.AdamW):
    """The Adam that BERT was trained with (google-research/bert, optimization.py), which corrects no bias.

    m = beta1 m + (1 - beta1) g, v = beta2 v + (1 - beta2) g^2, p = p - lr (m / (sqrt(v) + eps) + weight_decay p). The
    first steps are larger than Adam's, 3.2 times for these betas, which the warm-up makes good.

    It is torch's AdamW, fused as `adamw` is, with a count of steps so high that the corrections 1 - beta^step are 1.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        betas, eps, weight_decay: as above.
    """

    #: Where float32 stops counting; 0.99999 to this power is 0 beside 1.
    _STEPS = 2.0**24

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        groups = _listed(params)
        super().__init__(groups, lr, betas, eps, weight_decay, fused=_is_fusible(groups))

    def _init_group(self, group: dict[str, Any], *lists: Any) -> Any:
        fresh = [p for p in group["params"] if p.grad is not None and not self.state[p]]
        result = super()._init_group(group, *lists)
        for parameter in fresh:
            self.state[parameter]["step"].fill_(self._STEPS)
        return result


class LAMB(Optimizer):
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
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0.0:
                raise ValueError(f"{name} is {value}, expected at least 0")
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas are {betas}, expected each at least 0, below 1")
        if max_trust_ratio is not None and not max_trust_ratio > 0.0:
            raise ValueError(f"max_trust_ratio is {max_trust_ratio}, expected more than 0")
        options = {"betas": betas, "eps": eps, "weight_decay": weight_decay, "max_trust_ratio": max_trust_ratio}
        super().__init__(params, {"lr": lr, **options})

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
                updates = self._updates(params, [self._state(parameter) for parameter in params], group)
                if group["weight_decay"]:
                    torch._foreach_add_(updates, params, alpha=group["weight_decay"])
                    torch._foreach_mul_(updates, _trust_ratios(params, updates, group["max_trust_ratio"]))
                torch._foreach_add_(params, updates, alpha=-group["lr"])
        return loss

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        """m, v and the number of this step, which is the parameter's own: it may have been frozen for a while."""
        if parameter.grad is not None and parameter.grad.layout != torch.strided:
            got = f"a {parameter.grad.layout} one of a parameter {tuple(parameter.shape)}"
            raise RuntimeError(f"LAMB takes dense gradients only, got {got}")
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        return state

    def _updates(self, params: list[Tensor], states: list[dict[str, Tensor]], group: dict[str, Any]) -> list[Tensor]:
        """m / (sqrt(v) + eps), with the present gradients in m and v, both corrected for their bias."""
        grads: list[Any] = [parameter.grad for parameter in params]
        means, squares = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
        steps, (beta1, beta2) = [int(state["step"]) for state in states], group["betas"]
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, [(1 - beta2**step) ** 0.5 for step in steps])
        torch._foreach_add_(roots, group["eps"])
        updates = torch._foreach_div(means, roots)
        torch._foreach_div_(updates, [1 - beta1**step for step in steps])
        return list(updates)


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

"""act(x weight^T + bias), over weights packed once, in float32, bfloat16 or 8 bits; with a residual and a LayerNorm.

In 8 bits nothing is calibrated: each row of x and each row of the weights has a scale of its own, as in LLM.int8
(Dettmers et al., 2022), and each row of x a minimum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bert_fast.ops import _check
from bert_fast.ops._dispatch import Impl, Op

#: dtype of the packed weights, by precision.
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}

#: Columns of a panel, and what in_features is padded to.
PANEL = 32


@dataclass(frozen=True, eq=False, repr=False)
class PackedWeight:
    """A weight matrix and its bias, in the order in which the CPU's products read them, the same on every CPU.

    Made by `PackedWeight.pack`. It holds copies: what happens to the originals afterwards it does not see, and it gets
    no gradient. It can be copied, pickled and shared by threads.

    Attributes:
        panels: (ceil(out_features / 32), depth / group, 32, group), the values of 32 columns side by side, `group` of
            each at a time, with zeros up to whole panels: float32 (group 1), bfloat16 (2) or int8 (4); depth is
            in_features rounded up to 32.
        vectors: (3, columns) float32: the bias; and, for int8, the scale of each column and the sum of its weights.
        out_features, in_features: of the matrix.
    """

    panels: Tensor
    vectors: Tensor
    out_features: int
    in_features: int

    @classmethod
    def pack(cls, weight: Tensor, bias: Tensor | None = None, *, precision: str = "fp32") -> PackedWeight:
        """Pack the weights of a linear module.

        Args:
            weight: (out_features, in_features), floating point, on the CPU; taken as float32.
            bias: (out_features,), same dtype; zeros if None.
            precision: "fp32"; "bf16", rounded to nearest even; or "int8", where each row of `weight` is rounded to
                [-127, 127] times a scale of its own (NaN for a row that is not finite).

        Raises:
            ValueError: shapes, dtypes or devices do not match, the precision is unknown, or there are more
                in_features than 8-bit sums have room for (65,793).
            ImportError: the C++ extension is not there.
        """
        name = "PackedWeight.pack"
        _check.choice(name, "precision", precision, PRECISIONS)
        _check.same_kind(name, weight=weight, bias=bias)
        if weight.device.type != "cpu":
            raise ValueError(f"{name}: weight is on {weight.device}, expected cpu")
        if weight.dim() != 2 or weight.numel() == 0:
            raise ValueError(
                f"{name}: weight has shape {tuple(weight.shape)}, expected (out_features, in_features), neither 0"
            )
        if bias is None:
            bias = weight.new_zeros(weight.shape[0])
        _check.shape(name, "bias", bias, weight.shape[:1])
        from bert_fast._C import pack_weight

        panels, vectors = pack_weight(weight.detach().float(), bias.detach().float(), precision)
        return cls(panels, vectors, *weight.shape)

    @property
    def precision(self) -> str:
        """ "fp32", "bf16" or "int8"."""
        return next(name for name, dtype in PRECISIONS.items() if dtype == self.panels.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the packed weights and vectors take."""
        return self.panels.nbytes + self.vectors.nbytes

    def __repr__(self) -> str:
        return (
            f"PackedWeight(out_features={self.out_features}, in_features={self.in_features}, "
            f"precision={self.precision!r}, nbytes={self.nbytes})"
        )


def unpack(panels: Tensor, vectors: Tensor, out_features: int, in_features: int, dtype: torch.dtype) -> Tensor:
    """The weights as packed, (out_features, in_features), in `dtype`."""
    depth = panels.shape[1] * panels.shape[3]
    columns = panels.permute(0, 2, 1, 3).reshape(-1, depth)[:out_features, :in_features].to(dtype)
    return columns * vectors[1, :out_features, None].to(dtype) if panels.dtype == torch.int8 else columns


def quantize(x: Tensor) -> Tensor:
    """x as an 8-bit product reads it: each row as its minimum plus a byte times (maximum - minimum) / 255.

    The choice of bytes is made in float32 whatever x's dtype is; NaN where a row is not finite.
    """
    rows = x.float()
    minimum = rows.amin(-1, keepdim=True) + (0 * rows).sum(-1, keepdim=True)
    spread = rows.amax(-1, keepdim=True) - minimum
    scale = torch.where(spread > 0, spread / 255, 1.0)
    byte = ((rows - minimum) * (1 / scale)).round().clamp(0, 255)
    return byte.to(x.dtype) * scale.to(x.dtype) + minimum.to(x.dtype)


def reference(
    x: Tensor,
    panels: Tensor,
    vectors: Tensor,
    out_features: int,
    in_features: int,
    activation: str | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> Tensor:
    """The definition: what is rounded is rounded, and all else is done in x's dtype.

    The gradient passes through the rounding of x as if it were not there (in bf16, rounded, as a cast passes it), and
    none reaches the packed weights.
    """
    panels, vectors = panels.detach(), vectors.detach()
    if panels.dtype == torch.bfloat16:
        x = x.to(torch.bfloat16).to(x.dtype)
    elif panels.dtype == torch.int8:
        x = x + (quantize(x) - x).detach()
    weight = unpack(panels, vectors, out_features, in_features, x.dtype)
    hidden = F.linear(x, weight, vectors[0, :out_features].to(x.dtype))
    if activation is not None:
        hidden = ACTIVATIONS[activation](hidden)
    if residual is not None:
        hidden = hidden + residual
    if norm_weight is not None:
        hidden = F.layer_norm(hidden, hidden.shape[-1:], norm_weight, norm_bias, eps)
    return hidden


def check(
    x: Tensor,
    panels: Tensor,
    vectors: Tensor,
    out_features: int,
    in_features: int,
    activation: str | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> None:
    """ValueError for shapes, dtypes, devices or an epilogue that no implementation takes."""
    op = "linear"
    _check.same_kind(op, x=x, residual=residual, **{"layer_norm weight": norm_weight, "layer_norm bias": norm_bias})
    if x.dim() < 1 or x.shape[-1] != in_features:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected (..., {in_features})")
    for packed in (panels, vectors):
        if packed.device != x.device:
            raise ValueError(f"{op}: weight is on {packed.device} but x is on {x.device}")
    _check_packed(op, panels, vectors, out_features, in_features)
    if residual is not None:
        _check.shape(op, "residual", residual, (*x.shape[:-1], out_features))
    if (norm_weight is None) != (norm_bias is None):
        raise ValueError(f"{op}: one of norm_weight and norm_bias is given, expected both")
    for name, vector in (("layer_norm weight", norm_weight), ("layer_norm bias", norm_bias)):
        if vector is not None:
            _check.shape(op, name, vector, (out_features,))
    if norm_weight is not None and not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"{op}: eps is {eps}, expected a number from 0 on")
    if activation is not None:
        _check.choice(op, "activation", activation, ACTIVATIONS)
        if residual is not None or norm_weight is not None:
            raise ValueError(
                f"{op}: activation is {activation!r} with a residual or a LayerNorm, expected one or the other"
            )


def _check_packed(op: str, panels: Tensor, vectors: Tensor, out_features: int, in_features: int) -> None:
    """The tensors of a PackedWeight are as `PackedWeight.pack` makes them."""
    group = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 4}.get(panels.dtype)
    num_panels = -(-out_features // PANEL)
    depth = -(-in_features // PANEL) * PANEL
    if (
        group is None
        or vectors.dtype != torch.float32
        or min(out_features, in_features) < 1
        or panels.shape != (num_panels, depth // group, PANEL, group)
        or vectors.shape != (3, num_panels * PANEL)
        or not (panels.is_contiguous() and vectors.is_contiguous())
    ):
        raise ValueError(
            f"{op}: weight has panels of {panels.dtype} {tuple(panels.shape)} and vectors of {vectors.dtype} "
            f"{tuple(vectors.shape)}, which no packing of ({out_features}, {in_features}) gives"
        )


def fake(
    x: Tensor,
    panels: Tensor,
    vectors: Tensor,
    out_features: int,
    in_features: int,
    activation: str | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Shape and dtype of the result."""
    return x.new_empty((*x.shape[:-1], out_features))


def _load_cpp() -> Callable[..., Tensor]:
    from bert_fast._C import linear

    return linear


OP = Op(
    "linear",
    "(Tensor x, Tensor panels, Tensor vectors, int out_features, int in_features, str? activation,"
    " Tensor? residual, Tensor? norm_weight, Tensor? norm_bias, float eps) -> Tensor",
    reference=reference,
    fake=fake,
    check=check,
    impls=(Impl("cpp", "cpu", (torch.float32, torch.bfloat16), _load_cpp, validates=True),),
)


def linear(
    x: Tensor,
    weight: PackedWeight,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    layer_norm: tuple[Tensor, Tensor, float] | None = None,
    impl: str | None = None,
) -> Tensor:
    """activation(x weight^T + bias), or LayerNorm(x weight^T + bias + residual).

    A row of the result has the same bits alone and in any batch, at any number of threads. Sums are taken in float32,
    those of 8-bit integers exactly. In "bf16" a row of x is rounded to bfloat16 first, and so is the result of an
    activation; in "int8" a row of x is rounded to 256 steps from its minimum to its maximum, and one that holds a NaN
    or an infinity gives NaN.

    Args:
        x: (..., in_features), floating point.
        weight: the packed weights, on the same device.
        activation: "gelu" (erf), "gelu_tanh", "relu", or None; not with a residual or a LayerNorm.
        residual: (..., out_features) in x's dtype, added to the product.
        layer_norm: gain (out_features,), bias (out_features,) in x's dtype, and what is added to the variance: taken
            of the sum at the end, over the last dimension.
        impl: force "cpp" or "reference"; ValueError when it cannot serve the call.

    Returns:
        (..., out_features) in x's dtype, contiguous.

    Raises:
        ValueError: shapes, dtypes or devices do not match, or the epilogue is not one of those above.
    """
    norm_weight, norm_bias, eps = layer_norm if layer_norm is not None else (None, None, 1e-12)
    return OP(
        x,
        weight.panels,
        weight.vectors,
        weight.out_features,
        weight.in_features,
        activation,
        residual,
        norm_weight,
        norm_bias,
        eps,
        impl=impl,
    )

"""Encoders over packed weights, a copy of a model's: on a CPU (`cpu`) and on a GPU (`gpu`).

`serving` gives the encoder of a tree of modules, looks whether the modules or the parameters have changed since they
were packed, and packs again when they have.
"""

from __future__ import annotations

import importlib.util
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bert_fast import activation, ops
from bert_fast.checks import is_recorded, is_transformed
from bert_fast.encoder import projection
from bert_fast.engine.cpu import ACTIVATIONS, LINEAR_MODULES, PackedEngine, TorchEngine, embedding_tables, prefers_torch
from bert_fast.engine.fingerprint import fingerprint
from bert_fast.engine.gpu import MAX_HEAD_DIM, GpuEngine
from bert_fast.engine.projected import ProjectedEngine
from bert_fast.inputs import BertInputs, TableSizes
from bert_fast.ragged import Padding, Ragged
from bert_fast.sharding import is_sharded

#: What the products are computed in, by the type of the device. fp32 is exact to rounding; bf16 and fp16 round weights
#: and activations to bfloat16 and float16; int8 and fp8 (e4m3) quantise them to 8 bits. Sums, the statistics of
#: LayerNorm and the softmax are float in all of them. The residual stream is float on a CPU; on a GPU it has 16 bits in
#: all but fp32, as in a plain model of that dtype.
PRECISIONS = {"cpu": ("fp32", "bf16", "int8"), "cuda": ("fp32", "fp16", "bf16", "fp8")}

#: The precision of a model's own dtype.
PRECISION_OF = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}

#: The implementation of the ops that does on a device what its engine does.
_FUSED = {"cpu": "cpp", "cuda": "triton"}


def check_precision(precision: str | None, device: torch.device, free_originals: bool = False) -> None:
    """ValueError for a precision that the device has not, or for releasing what no precision was asked for."""
    here = PRECISIONS.get(device.type, ())
    if precision is not None and precision not in here:
        elsewhere = [name for name, known in PRECISIONS.items() if precision in known]
        hint = f"; it runs on {elsewhere[0]}" if elsewhere else ""
        raise ValueError(
            f"precision is {precision!r}, expected one of {', '.join(here) or '(none)'} on {device.type}{hint}"
        )
    if free_originals and precision is None:
        raise ValueError("free_originals is True without a precision: the packed weights would be all there is of them")


class Engine(Protocol):
    """Packed weights of an encoder, and forwards over them.

    Attributes:
        precision: one of `PRECISIONS` of its device.
    """

    precision: str

    def pack(self, inputs: BertInputs) -> tuple[Ragged, Padding]:
        """A padded batch without its padding, and the way back; ValueError if the inputs are not a batch."""

    def rows(self, ragged: Ragged, hidden_states: list[Tensor] | None = None) -> Tensor:
        """The rows of the last layer, (num_tokens, hidden_size); as `encoder.encode`.

        Args:
            ragged: on the CPU or on the engine's device. What is on the CPU need not wait for the device.
            hidden_states: if given, the embeddings and the rows of every layer are appended to it.

        Raises:
            ValueError: it is not a batch, or an id is outside its table.
        """

    def vectors(self, ragged: Ragged, modes: Sequence[str], normalize: bool) -> Tensor:
        """The pooled rows, float32 (batch_size, len(modes) * hidden_size), scaled to length 1 if asked for."""

    def padded(self, inputs: BertInputs, want_states: bool = False) -> tuple[Tensor, Tensor, list[Tensor]]:
        """A padded batch: the last hidden state, the first token kept of each row, and the hidden states if wanted.

        Returns:
            (batch_size, seq_len, hidden_size), zeros where the mask hides a token; (batch_size, hidden_size); and for
            the embeddings and each layer the same as the first.

        Raises:
            ValueError: the inputs are not a batch.
        """


@dataclass
class _Slot:
    """What is known of a tree of modules: as it was when its fingerprint was taken."""

    fingerprint: tuple[int, int]
    packed: Engine | None  # of the parameters as they are; made when it is first wanted
    serves: bool  # it may stand in for the modules as they are
    differentiable: bool  # a gradient may be wanted of them


_slots: weakref.WeakKeyDictionary[nn.Module, _Slot] = weakref.WeakKeyDictionary()
_lock = threading.RLock()


def serving(
    bert: Any, hidden_act: str, num_heads: int, obstacle: Callable[[], str | None] = lambda: None
) -> Engine | None:
    """The engine that runs a call of this model now, or None where the ops run it one by one.

    That is where somebody looks at the intermediate results (autograd, autocast, a compiler), where another
    implementation is forced, with dropout, for dtypes and activations that the engine has not, and for parameters that
    several processes share out (FSDP).

    The C++ extension takes the fingerprint of the tree, and is the engine of a CPU. Without it a CPU has no engine, and
    on a GPU the fingerprint is taken in Python, which takes the host longer than to start a captured forward.

    Args:
        bert: a tree with the names of a Hugging Face BERT.
        hidden_act, num_heads: as in `Engine`.
        obstacle: why the parameters alone do not say what the modules do, or None.

    Raises:
        ValueError: the weights were released, and the call needs them; or the GPU has not the dtype of the weights.
    """
    precision = vars(bert).get("bert_fast_precision")
    released = vars(bert).get("bert_fast_released", False)
    device_type = next(bert.parameters()).device.type
    runs = device_type == "cuda" or (device_type == "cpu" and ops.extension() is not None)
    if not runs or ops.forced() not in (None, _FUSED[device_type]) or _is_looked_at(device_type):
        check_not_released(bert, "it is compiled, differentiated or cast by somebody")
        return None
    if is_sharded(bert):
        check_not_released(bert, "its parameters are sharded over processes")
        if precision is not None:
            ops.warn_of_fallback(f"precision {precision!r} is left out: the parameters are sharded over processes")
        return None
    found = fingerprint(bert)
    with _lock:
        slot = _slots.get(bert)
        if slot is None or slot.fingerprint != found:
            slot = _slots[bert] = _look(bert, found, slot, hidden_act, num_heads, precision, obstacle)
        if released and not (slot.serves and slot.packed):
            _refuse_released("it has changed, or this is a copy of it")
        # A precision that was asked for is for inference; without one, whoever wants a gradient gets it.
        if not slot.serves or (precision is None and slot.differentiable and torch.is_grad_enabled()):
            return None
        if slot.packed is None:
            slot.packed = _pack(bert, hidden_act, num_heads, precision)
        return slot.packed


def _is_looked_at(device_type: str) -> bool:
    looked_at = is_transformed() or ops.forward_ad_is_on() or torch.is_autocast_enabled(device_type)
    return looked_at or torch.compiler.is_compiling() or is_recorded()


def _refuse_released(reason: str) -> None:
    raise ValueError(f"the model's weights were released (free_originals=True) and cannot be used as here: {reason}")


def _look(
    bert: Any,
    found: tuple[int, int],
    slot: _Slot | None,
    hidden_act: str,
    num_heads: int,
    precision: str | None,
    obstacle: Callable[[], str | None],
) -> _Slot:
    """Look at a tree that is new or has changed; its weights stay packed if they have not."""
    project = projection(bert)
    parts = (bert.embeddings, bert.encoder, *(() if project is None else (project,)))
    parameters = [parameter for part in parts for parameter in part.parameters()]
    width = TableSizes.of(bert.embeddings).embedding_size if project is None else project.weight.shape[0]
    differentiable = any(parameter.requires_grad for parameter in parameters)
    packed = slot.packed if slot is not None and slot.fingerprint[1] == found[1] else None
    serves = _is_servable(parameters, precision, hidden_act, width // num_heads) and obstacle() is None
    serves = serves and not any(
        isinstance(part, nn.Dropout) and part.training and part.p > 0 for part in bert.modules()
    )
    return _Slot(found, packed, serves, differentiable)


def _pack(bert: Any, hidden_act: str, num_heads: int, precision: str | None) -> Engine:
    parameter = bert.embeddings.word_embeddings.weight
    wanted = precision or PRECISION_OF[parameter.dtype]
    if parameter.is_cuda:
        return GpuEngine(bert, hidden_act, num_heads, wanted)
    if prefers_torch(wanted):
        return TorchEngine(bert, hidden_act, num_heads)
    kind = PackedEngine if projection(bert) is None else ProjectedEngine
    return kind(bert, hidden_act, num_heads, wanted)


def _is_servable(parameters: list[nn.Parameter], precision: str | None, hidden_act: str, head_dim: int) -> bool:
    """Whether there is an engine for parameters like these."""
    kinds = {(parameter.device, parameter.dtype) for parameter in parameters}
    if len(kinds) > 1:
        return False
    device, dtype = kinds.pop()
    if precision is not None and precision not in PRECISIONS[device.type]:
        ops.warn_of_fallback(f"precision {precision!r} does not run on {device.type}; the model runs in {dtype}")
        return False
    if device.type == "cpu":
        return dtype in (torch.float32, torch.bfloat16) and hidden_act in ACTIVATIONS
    has_kernels = head_dim <= MAX_HEAD_DIM and importlib.util.find_spec("triton") is not None
    return dtype in PRECISION_OF and hidden_act in activation.ACTIVATIONS and has_kernels


def set_precision(bert: Any, precision: str | None, find: Callable[[], Engine | None]) -> None:
    """Run `bert` in this precision from now on; None for that of its parameters.

    Args:
        find: gives the engine that serves the model once the precision is set.

    Raises:
        ValueError: the weights were released, or no engine serves the model in the precision; nothing has changed then.
    """
    check_not_released(bert, "their precision cannot be changed")
    before = vars(bert).get("bert_fast_precision")
    bert.bert_fast_precision = precision
    _slots.pop(bert, None)
    try:
        if precision is not None and find() is None:
            raise ValueError(
                f"precision is {precision!r}, but packed weights cannot serve the model as it is: they take BERTs in "
                f"float32 or bfloat16 on the CPU, with the activations {', '.join(ACTIVATIONS)} and the C++ extension, "
                f"or in float16 too on a GPU, with Triton and heads of up to {MAX_HEAD_DIM} channels; in eval mode, "
                "without replaced or hooked modules (`bert-fast doctor` says what is there)"
            )
    except ValueError:
        bert.bert_fast_precision = before
        _slots.pop(bert, None)
        raise


def forget(bert: Any) -> None:
    """Undo `set_precision` and give back the packed weights; ValueError if the weights were released."""
    check_not_released(bert, "their precision cannot be changed")
    vars(bert).pop("bert_fast_precision", None)
    _slots.pop(bert, None)


def check_not_released(bert: Any, reason: str) -> None:
    """ValueError, with the reason, if the weights of `bert` were released."""
    if vars(bert).get("bert_fast_released", False):
        _refuse_released(reason)


def release(bert: Any, keep: frozenset[int] = frozenset()) -> None:
    """Give back the memory of the parameters that the engine of `bert` has packed copies of.

    The weights of the linear modules and, unless the engine reads the very same, the embedding tables keep their shape
    and dtype, but hold nothing: NaN, for whoever reads them all the same. Parameters whose id is in `keep`, which
    somebody else reads too, stay.

    An engine must serve the model (`set_precision` sees to that).
    """
    with _lock:
        slot = _slots[bert]
        assert slot.packed is not None, "set_precision looked for it"
        bert.bert_fast_released = True
        packed = [layer.get_submodule(name).weight for layer in bert.encoder.layer for name in LINEAR_MODULES]
        if (project := projection(bert)) is not None:
            packed.append(project.weight)
        if slot.packed.precision != "fp32":
            packed += [table.weight for table in embedding_tables(bert.embeddings)]
        for parameter in packed:
            if id(parameter) not in keep:
                parameter.data = parameter.new_full((1, 1), torch.nan).expand(parameter.shape)
        bert.register_state_dict_pre_hook(_refuse_to_save)
        slot.fingerprint = fingerprint(bert)


def _refuse_to_save(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    _refuse_released("there is nothing to save")

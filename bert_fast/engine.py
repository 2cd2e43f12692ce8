"""The CPU's encoders over packed weights: the C++ one, embeddings to last hidden state in one call, and torch's
products where the CPU has a matrix unit that the C++ kernels do not use.

Packed weights are a copy. `serving` gives the encoder of a tree of modules, looks whether the modules or the parameters
have changed since they were packed, and packs again when they have.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert_fast import ops
from bert_fast.activation import GELU_FORMS
from bert_fast.checks import is_recorded
from bert_fast.encoder import encode, first_tokens
from bert_fast.inputs import BertInputs, TableSizes
from bert_fast.ragged import Ragged

#: What the products are computed in. fp32 is exact to rounding; bf16 rounds weights and activations to bfloat16; int8
#: quantises them to 8 bits. Sums, the residual stream, LayerNorm and the softmax are float in all of them.
PRECISIONS = ("fp32", "bf16", "int8")

#: A checkpoint's `hidden_act` as the C++ encoder names it.
ACTIVATIONS = {name: {"none": "gelu_erf", "tanh": "gelu_tanh"}[form] for name, form in GELU_FORMS.items()}
ACTIVATIONS["relu"] = "relu"

#: Modules of a layer whose weight and bias the C++ encoder takes, in its order.
LAYER_MODULES = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "attention.output.LayerNorm",
    "intermediate.dense",
    "output.dense",
    "output.LayerNorm",
)

LINEAR_MODULES = tuple(name for name in LAYER_MODULES if not name.endswith("LayerNorm"))


def check_precision(precision: str | None, free_originals: bool = False) -> None:
    """ValueError for an unknown precision, or for releasing what no precision was asked for."""
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}, expected one of {', '.join(PRECISIONS)}")
    if free_originals and precision is None:
        raise ValueError("free_originals is True without a precision: the packed weights would be all there is of them")


class Engine(Protocol):
    """Packed weights of an encoder, and forwards over them.

    Attributes:
        precision: one of `PRECISIONS`.
    """

    precision: str

    def rows(self, ragged: Ragged, hidden_states: list[Tensor] | None = None) -> Tensor:
        """The rows of the last layer, (num_tokens, hidden_size); as `encoder.encode`."""

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


class PackedEngine:
    """The C++ encoder.

    Args:
        bert: has `embeddings` and `encoder` with a Hugging Face checkpoint's names, float32 or bfloat16 on the CPU.
        hidden_act: one of `ACTIVATIONS`.
        num_heads: attention heads.
        precision: one of `PRECISIONS`.
    """

    def __init__(self, bert: Any, hidden_act: str, num_heads: int, precision: str) -> None:
        from bert_fast._C import Encoder

        self.precision = precision
        norm, layers = bert.embeddings.LayerNorm, bert.encoder.layer
        tables = [table.weight.detach() for table in embedding_tables(bert.embeddings)]
        self._dtype, self._sizes = tables[0].dtype, TableSizes.of(bert.embeddings)
        if precision != "fp32":  # fp32 reads the parameters themselves
            tables = [table.bfloat16() for table in tables]
        self._encoder = Encoder(
            precision=precision,
            activation=ACTIVATIONS[hidden_act],
            num_heads=num_heads,
            out_bfloat16=self._dtype == torch.bfloat16,
            word_embeddings=tables[0],
            position_embeddings=tables[1],
            token_type_embeddings=tables[2],
            norm_weight=norm.weight.detach(),
            norm_bias=norm.bias.detach(),
            norm_eps=norm.eps,
            layers=[_layer_tensors(layer) for layer in layers],
            layer_norm_eps=[(layer.attention.output.LayerNorm.eps, layer.output.LayerNorm.eps) for layer in layers],
        )

    def rows(self, ragged: Ragged, hidden_states: list[Tensor] | None = None) -> Tensor:
        """See `Engine`."""
        result = self._encoder.forward(*_ids(ragged), want_states=hidden_states is not None)
        if hidden_states is not None:
            hidden_states.extend(result.states)
        return result.rows

    def vectors(self, ragged: Ragged, modes: Sequence[str], normalize: bool) -> Tensor:
        """See `Engine`."""
        return self._encoder.forward(*_ids(ragged), want_rows=False, modes=list(modes), normalize=normalize).pooled

    def padded(self, inputs: BertInputs, want_states: bool = False) -> tuple[Tensor, Tensor, list[Tensor]]:
        """See `Engine`."""
        if inputs.input_ids is None or inputs.cu_seq_lens_q is not None:
            return _pad(self, inputs, self._sizes, want_states)
        ids = (inputs.input_ids, inputs.attention_mask, inputs.token_type_ids, inputs.position_ids)
        try:
            result = self._encoder.forward_padded(*ids, want_states=want_states, modes=["cls"])
        except ValueError:
            inputs.checked(self._sizes)  # raises the same in the words of the plain path
            raise
        return result.rows, result.pooled.to(self._dtype), result.states


class TorchEngine:
    """bf16 by torch's own products, which use a CPU's matrix unit (AMX).

    It runs the ops one by one over a bfloat16 copy of the modules. A text may then give other bits in another batch:
    torch chooses its product by the batch's size.

    Args:
        bert, hidden_act, num_heads: as in `PackedEngine`.
    """

    precision = "bf16"

    def __init__(self, bert: Any, hidden_act: str, num_heads: int) -> None:
        self._dtype, self._sizes = bert.embeddings.word_embeddings.weight.dtype, TableSizes.of(bert.embeddings)
        parts = {"embeddings": copy.deepcopy(bert.embeddings), "encoder": copy.deepcopy(bert.encoder)}
        self._tree = nn.ModuleDict(parts).bfloat16().requires_grad_(False)
        self._hidden_act, self._num_heads = hidden_act, num_heads

    def rows(self, ragged: Ragged, hidden_states: list[Tensor] | None = None) -> Tensor:
        """See `Engine`."""
        states: list[Tensor] | None = None if hidden_states is None else []
        rows = encode(self._tree, ragged, self._hidden_act, self._num_heads, states)
        if hidden_states is not None and states is not None:
            hidden_states.extend(state.to(self._dtype) for state in states)
        return rows.to(self._dtype)

    def vectors(self, ragged: Ragged, modes: Sequence[str], normalize: bool) -> Tensor:
        """See `Engine`."""
        rows = self.rows(ragged)
        vectors = torch.cat([ops.pooling(rows, ragged.cu_seqlens, mode=mode).float() for mode in modes], dim=1)
        return F.normalize(vectors, dim=1) if normalize else vectors

    def padded(self, inputs: BertInputs, want_states: bool = False) -> tuple[Tensor, Tensor, list[Tensor]]:
        """See `Engine`."""
        return _pad(self, inputs, self._sizes, want_states)


def prefers_torch(precision: str) -> bool:
    """Whether torch's products are faster here than packed ones: bf16 on a CPU with AMX."""
    return precision == "bf16" and torch.cpu.get_capabilities().get("amx_bf16", False)


def _pad(run: Engine, inputs: BertInputs, sizes: TableSizes, want_states: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    """`Engine.padded` by way of `rows`."""
    ragged, padding = inputs.checked(sizes).to_ragged()
    states: list[Tensor] = []
    rows = run.rows(ragged, states if want_states else None)
    return padding.pad(rows), first_tokens(rows, ragged), [padding.pad(state) for state in states]


def embedding_tables(embeddings: Any) -> list[nn.Embedding]:
    """The three tables of an embeddings module, in the order of the C++ encoder."""
    return [embeddings.word_embeddings, embeddings.position_embeddings, embeddings.token_type_embeddings]


def _ids(ragged: Ragged) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return ragged.input_ids, ragged.position_ids, ragged.token_type_ids, ragged.cu_seqlens


def _layer_tensors(layer: Any) -> list[Tensor]:
    modules = (layer.get_submodule(name) for name in LAYER_MODULES)
    return [tensor.detach() for module in modules for tensor in (module.weight, module.bias)]


@dataclass
class _Slot:
    """What is known of a tree of modules: as it was when its fingerprint was taken."""

    fingerprint: tuple[int, int]
    packed: Engine | None  # of the parameters as they are
    serves: bool  # it may stand in for the modules as they are
    differentiable: bool  # a gradient may be wanted of them


_slots: weakref.WeakKeyDictionary[nn.Module, _Slot] = weakref.WeakKeyDictionary()
_lock = threading.RLock()


def serving(
    bert: Any, hidden_act: str, num_heads: int, obstacle: Callable[[], str | None] = lambda: None
) -> Engine | None:
    """The engine that runs a call of this model now, or None where the ops run it one by one.

    That is where somebody looks at the intermediate results (autograd, autocast, a compiler), where another
    implementation is forced, on a GPU, with dropout, and for dtypes and activations that the engine has not.

    Args:
        bert: a tree with the names of a Hugging Face BERT.
        hidden_act, num_heads: as in `Engine`.
        obstacle: why the parameters alone do not say what the modules do, or None.

    Raises:
        ValueError: the weights were released, and the call needs them.
    """
    precision = vars(bert).get("bert_fast_precision")
    released = vars(bert).get("bert_fast_released", False)
    extension = ops.extension()
    if extension is None or ops.forced() not in (None, "cpp") or _is_looked_at():
        check_not_released(bert, "it is compiled, differentiated or cast by somebody")
        return None
    fingerprint = extension.fingerprint(bert)
    with _lock:
        slot = _slots.get(bert)
        if slot is None or slot.fingerprint != fingerprint:
            slot = _slots[bert] = _look(bert, fingerprint, slot, hidden_act, num_heads, precision, obstacle)
    if released and not (slot.serves and slot.packed):
        _refuse_released("it has changed, or this is a copy of it")
    # A precision that was asked for is for inference; without one, whoever wants a gradient gets it.
    if precision is None and slot.differentiable and torch.is_grad_enabled():
        return None
    return slot.packed if slot.serves else None


def _is_looked_at() -> bool:
    transformed = torch._C._functorch.peek_interpreter_stack() is not None  # torch.func; it has no public name
    looked_at = transformed or ops.forward_ad_is_on() or torch.is_autocast_enabled("cpu")
    return looked_at or torch.compiler.is_compiling() or is_recorded()


def _refuse_released(reason: str) -> None:
    raise ValueError(f"the model's weights were released (free_originals=True) and cannot be used as here: {reason}")


def _look(
    bert: Any,
    fingerprint: tuple[int, int],
    slot: _Slot | None,
    hidden_act: str,
    num_heads: int,
    precision: str | None,
    obstacle: Callable[[], str | None],
) -> _Slot:
    """Look at a tree that is new or has changed, and pack its weights if they have."""
    parameters = [*bert.embeddings.parameters(), *bert.encoder.parameters()]
    differentiable = any(parameter.requires_grad for parameter in parameters)
    packed: Engine | None = slot.packed if slot is not None and slot.fingerprint[1] == fingerprint[1] else None
    released = vars(bert).get("bert_fast_released", False)
    serves = _is_servable(bert, parameters, hidden_act) and obstacle() is None
    if serves and packed is None and not released:
        wanted = precision or {torch.float32: "fp32", torch.bfloat16: "bf16"}[parameters[0].dtype]
        if prefers_torch(wanted):
            packed = TorchEngine(bert, hidden_act, num_heads)
        else:
            packed = PackedEngine(bert, hidden_act, num_heads, wanted)
    return _Slot(fingerprint, packed, serves, differentiable)


def _is_servable(bert: Any, parameters: list[nn.Parameter], hidden_act: str) -> bool:
    kinds = {(parameter.device.type, parameter.dtype) for parameter in parameters}
    has_kind = kinds in ({("cpu", torch.float32)}, {("cpu", torch.bfloat16)})
    dropouts = (module for module in bert.modules() if isinstance(module, nn.Dropout))
    return has_kind and hidden_act in ACTIVATIONS and not any(part.training and part.p > 0 for part in dropouts)


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
    if precision is not None and find() is None:
        bert.bert_fast_precision = before
        raise ValueError(
            f"precision is {precision!r}, but packed weights cannot serve the model as it is: they take BERTs in "
            f"float32 or bfloat16 on the CPU, in eval mode, with the activations {', '.join(ACTIVATIONS)}, without "
            "replaced or hooked modules, and need the C++ extension (`bert-fast doctor` says whether it is there)"
        )


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
        if slot.packed.precision != "fp32":
            packed += [table.weight for table in embedding_tables(bert.embeddings)]
        for parameter in packed:
            if id(parameter) not in keep:
                parameter.data = torch.full((1, 1), torch.nan, dtype=parameter.dtype).expand(parameter.shape)
        bert.register_state_dict_pre_hook(_refuse_to_save)
        extension = ops.extension()
        assert extension is not None, "an engine runs"
        slot.fingerprint = extension.fingerprint(bert)


def _refuse_to_save(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    _refuse_released("there is nothing to save")

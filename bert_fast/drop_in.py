"""The drop-in: somebody's transformers or sentence-transformers model, run on the ops.

`accelerate` gives the `BertModel` inside another class, with another `forward`; its parameters, modules and everything
that looks at them stay what they were.
"""

from __future__ import annotations

import functools
import inspect
import sys
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bert_fast import engine, masked_lm, ops
from bert_fast.activation import ACTIVATIONS
from bert_fast.checks import is_recorded
from bert_fast.encoder import encode, encode_first, first_tokens
from bert_fast.inputs import BertInputs, TableSizes
from bert_fast.losses import IGNORED_LABEL, cross_entropy, divisor_of
from bert_fast.modules import obstacle
from bert_fast.ragged import Padding, Ragged

_MODELING = "transformers.models.bert.modeling_bert"

HOSTS = (
    "BertModel",
    "BertForPreTraining",
    "BertForMaskedLM",
    "BertForNextSentencePrediction",
    "BertForSequenceClassification",
    "BertForMultipleChoice",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
)

#: Those that read the pooler's output and nothing else of the encoder.
_POOLED_ONLY = ("BertForSequenceClassification", "BertForNextSentencePrediction", "BertForMultipleChoice")

#: With this argument they tell the `BertModel` so.
_POOLED_ONLY_ARGUMENT = "bert_fast_pooled_only"

#: Those that can do with the tokens that have a label, if the loss is all that is asked for.
_MASKED_LM = ("BertForMaskedLM", "BertForPreTraining")

#: Arguments of a call that change nothing in an encoder, and what transformers' collators pass beside `cu_seq_lens_q`.
_IGNORED = frozenset({"use_cache", "num_items_in_batch", "cu_seq_lens_k", "max_length_q", "max_length_k"})

#: Hooks of transformers' own that look at hidden states, which no call asks for that the ops serve, or have the inputs
#: of a layer that is computed again ask for gradients, which `encode` does.
_HARMLESS_HOOKS = ("transformers.utils.output_capturing", "transformers.modeling_utils")

#: transformers' own names for softmax attention, which the ops replace; somebody may register another function.
_ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")


def accelerate(model: nn.Module, *, precision: str | None = None, free_originals: bool = False) -> nn.Module:
    """Run a model's BERT on the fused ops, in place.

    The first call without gradients packs the weights of the encoder, a copy in the size of the precision, and runs on
    it from then on; it is packed again when the parameters change. On a GPU only what differs from the parameters is
    copied: the weights of query, key and value, which are joined, and in another precision than their own all of them.
    There a change goes unnoticed if it is written through `parameter.data`: call `accelerate` again then.

    On a GPU short batches run as CUDA graphs, recorded when their sizes, rounded up to a bucket, come for the second
    time. While one is recorded, no thread may wait for the whole device (`torch.cuda.synchronize`) or draw random
    numbers on it.

    The model keeps its class, signature, outputs, `state_dict` and the very same parameters. Two things differ from
    the plain path: positions that `attention_mask` hides come back as zeros, and the pooler reads the first token that
    the mask keeps (the first position, unless the batch is padded on the left). Calls that the ops do not serve, such
    as `output_attentions=True`, run the plain path; so does a model that is being exported or traced.

    It trains like the original. Dropout is drawn from torch's generator, another mask than the original would draw,
    with a probability rounded to a 256th. Gradients of gradients (`create_graph=True`) need
    `bert_fast.ops.force("reference")`, and say so. A model with a head takes one more argument: with `loss_only=True`
    it returns the loss alone, and a model for masked language modelling then computes only the tokens that have a
    label, and divides by `num_items_in_batch` where that is given.

    Args:
        model: a transformers `BertModel` or `BertFor*`, or a sentence-transformers `SentenceTransformer` or
            `CrossEncoder` that holds one.
        precision: of the encoder's products: "fp32", exact to rounding; "bf16"; on a CPU "int8"; on a GPU "fp16" and
            "fp8" (e4m3, from compute capability 8.9 on). The 8-bit ones need no calibration. The results keep the dtype
            of the parameters. A precision is for inference: without dropout the encoder then gives no gradients. None
            for that of the parameters, with gradients wherever they are wanted.
        free_originals: with a precision, release the weights that were packed: memory falls to the size of the
            precision. The model can then neither be saved nor trained, nor run anything but the packed weights.

    Returns:
        The same model.

    Raises:
        TypeError: the model is not one of these; the message lists them.
        ValueError: the model is one of these but is set up as something else than an encoder; the precision is unknown,
            or the model cannot run in it as it is (on this device, another dtype or activation, a replaced module).
    """
    berts = _berts(model)
    for bert in berts:
        _check_config(bert.config)
        engine.check_precision(precision, bert.device, free_originals)
    for bert in berts:
        bert.__class__ = _fast_class()
        engine.set_precision(bert, precision, partial(_engine, bert))
    for host in _hosts(model):
        plain: Any = _plain(type(host))
        host.__class__ = _fast_host_class(plain)
    if free_originals:
        for bert in berts:
            engine.release(bert, keep=_parameters_outside(model, bert))
    return model


def _parameters_outside(model: nn.Module, bert: Any) -> frozenset[int]:
    """Ids of the parameters that modules of the model outside the BERT's embeddings and encoder have."""
    inside = {id(module) for module in (*bert.embeddings.modules(), *bert.encoder.modules())}
    outside = (module for module in model.modules() if id(module) not in inside)
    return frozenset(id(parameter) for module in outside for parameter in module.parameters(recurse=False))


def restore(model: nn.Module) -> nn.Module:
    """Undo `accelerate`, in place, and return the model; one that is not accelerated stays as it is.

    Raises:
        TypeError: `accelerate` does not know the model.
        ValueError: its weights were released.
    """
    berts = _berts(model)
    for bert in berts:
        engine.forget(bert)
    for bert in berts:
        bert.__class__ = _fast_class().__base__
    for host in _hosts(model):
        host.__class__ = _plain(type(host))
    return model


def is_accelerated(model: nn.Module) -> bool:
    """Whether `accelerate` has been applied to the model or to a BERT inside it."""
    return any(type(bert) is _fast_class() for bert in _berts(model))


def _berts(model: nn.Module) -> list[Any]:
    """The transformers `BertModel`s of a model that `accelerate` knows."""
    modeling = sys.modules.get(_MODELING)
    if modeling is not None:
        classes = {modeling.BertModel, _fast_class()}
        if type(model) in classes:
            return [model]
        hosts = tuple(getattr(modeling, name) for name in HOSTS[1:])
        if isinstance(model, hosts) or _is_sentence_transformer(model):
            berts = [part for part in model.modules() if type(part) in classes]
            if berts:
                return berts
    raise TypeError(
        f"bert_fast.accelerate does not know {type(model).__module__}.{type(model).__name__}; it knows transformers' "
        f"{', '.join(HOSTS)}, and sentence-transformers' SentenceTransformer and CrossEncoder holding one of them"
    )


def _hosts(model: nn.Module) -> list[Any]:
    """transformers' own models with a head among the modules of a model, accelerated or not."""
    modeling = sys.modules.get(_MODELING)
    if modeling is None:
        return []
    known = {getattr(modeling, name) for name in HOSTS[1:]}
    return [part for part in model.modules() if _plain(type(part)) in known]


def _plain(kind: type[Any]) -> type[Any]:
    """transformers' own class of an accelerated one; any other class, a subclass that somebody wrote too, is itself."""
    plain: type[Any] = vars(kind).get("bert_fast_plain", kind)
    return plain


def _is_sentence_transformer(model: nn.Module) -> bool:
    library = sys.modules.get("sentence_transformers")
    return library is not None and isinstance(model, library.SentenceTransformer | library.CrossEncoder)


def _check_config(config: Any) -> None:
    if config.is_decoder or config.add_cross_attention:
        raise ValueError("the model is a decoder (is_decoder or add_cross_attention); bert_fast runs encoders")
    if config.hidden_act not in ACTIVATIONS:
        raise ValueError(f"hidden_act is {config.hidden_act!r}, expected one of {', '.join(ACTIVATIONS)}")


@functools.cache
def _fast_class() -> type[Any]:
    """transformers' `BertModel` with another `forward`.

    It goes by the same name and module, because transformers looks classes up by theirs (the `architectures` of a saved
    config, the registry of what `output_attentions` records); so pickling has to be told what to build.
    """
    plain = sys.modules[_MODELING].BertModel

    class FastBertModel(plain):  # type: ignore[misc, valid-type]
        @functools.wraps(plain.forward)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            pooled_only = kwargs.pop(_POOLED_ONLY_ARGUMENT, False)
            output = _forward(self, pooled_only, *args, **kwargs)
            if output is not None:
                return output
            engine.check_not_released(self, "the call is not one that packed weights serve")
            attention = self.config._attn_implementation
            if kwargs.get("cu_seq_lens_q") is not None and "flash" not in attention:
                raise ValueError(
                    f"the fast path does not serve this call, and transformers' {attention} attention does not read "
                    "cu_seq_lens_q: the sequences would see each other; pass them as a padded batch"
                )
            return plain.forward(self, *args, **kwargs)

        def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
            state = super().__reduce_ex__(protocol)[2]
            return _blank, (), state

    FastBertModel.__name__ = FastBertModel.__qualname__ = plain.__name__
    FastBertModel.__module__ = plain.__module__
    return FastBertModel


def _blank() -> Any:
    """An accelerated model without its state, for pickle and copy."""
    import transformers.models.bert.modeling_bert  # noqa: F401  a fresh process may not have it yet

    return object.__new__(_fast_class())


@functools.cache
def _fast_host_class(plain: Any) -> Any:
    """A transformers model with a head, whose `forward` takes `loss_only` too, as `heads.Head.forward` does."""

    signature = inspect.signature(plain.forward)

    class FastHost(plain):
        bert_fast_plain = plain

        @functools.wraps(plain.forward)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            loss_only = kwargs.pop("loss_only", False)
            if loss_only and plain.__name__ in _MASKED_LM:
                given = _bound(signature, args, kwargs)
                output = _masked_lm_loss(self, **given)
                return _plain_masked_lm_loss(plain, self, **given) if output is None else output
            if _reads_pooled_only(self, plain.__name__):
                kwargs[_POOLED_ONLY_ARGUMENT] = True
            output = plain.forward(self, *args, **kwargs)
            if not loss_only:
                return output
            if getattr(output, "loss", None) is None:
                raise ValueError("loss_only without labels, or with return_dict=False: there is no loss")
            return type(output)(loss=output.loss)

        def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
            state = super().__reduce_ex__(protocol)[2]
            return _blank_host, (plain.__name__,), state

    FastHost.__name__ = FastHost.__qualname__ = plain.__name__
    FastHost.__module__ = plain.__module__
    return FastHost


def _bound(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a `forward` by name."""
    given = signature.bind(None, *args, **kwargs).arguments
    given.pop("self")
    others = given.pop("kwargs", {})
    return {**given, **others}


def _blank_host(name: str) -> Any:
    """As `_blank`, of the model with a head of this name."""
    import transformers.models.bert.modeling_bert

    return object.__new__(_fast_host_class(getattr(transformers.models.bert.modeling_bert, name)))


def _masked_lm_loss(
    host: Any,
    labels: Tensor | None = None,
    next_sentence_label: Tensor | None = None,
    num_items_in_batch: Tensor | float | None = None,
    **inputs: Any,
) -> Any:
    """The output with the loss alone, from the tokens that have a label; None where the plain path has to run."""
    predictions, bert, has_pair = host.cls.predictions, host.bert, hasattr(host.cls, "seq_relationship")
    if labels is None or (has_pair and next_sentence_label is None) or masked_lm.obstacle(predictions.decoder):
        return None
    if bert._forward_hooks or bert._forward_pre_hooks:
        return None
    call = _call(bert, **inputs)
    if call is None or call.wants_states:
        return None
    packed, batch = call.packed, call.inputs.checked(TableSizes.of(bert.embeddings)).to_ragged()
    if packed is None and _obstacle(bert):
        return None
    rows = masked_lm.encode_labelled(bert, packed, bert.config, *batch, labels)
    loss = masked_lm.loss(predictions, rows, divisor_of(num_items_in_batch))
    relationship = host.cls.seq_relationship(bert.pooler(rows.first[:, None])) if has_pair else None
    return _loss_output(loss, relationship, next_sentence_label, call.return_dict)


def _plain_masked_lm_loss(
    plain: Any,
    host: Any,
    labels: Tensor | None = None,
    next_sentence_label: Tensor | None = None,
    num_items_in_batch: Tensor | float | None = None,
    return_dict: bool | None = None,
    **inputs: Any,
) -> Any:
    """The same from the logits of all tokens, which transformers' own `forward` gives: the same labels count."""
    has_pair = hasattr(host.cls, "seq_relationship")
    if labels is None or (has_pair and next_sentence_label is None):
        raise ValueError(f"loss_only without labels{' and next_sentence_label' if has_pair else ''}: there is no loss")
    output = plain.forward(host, **inputs, return_dict=True)
    mask = inputs.get("attention_mask")
    if mask is not None and mask.shape == labels.shape:
        labels = labels.masked_fill(mask == 0, IGNORED_LABEL)
    logits, relationship = (
        (output.prediction_logits, output.seq_relationship_logits) if has_pair else (output.logits, None)
    )
    loss = cross_entropy(logits, labels, divisor_of(num_items_in_batch))
    return_dict = host.config.return_dict if return_dict is None else return_dict
    return _loss_output(loss, relationship, next_sentence_label, return_dict)


def _loss_output(loss: Tensor, relationship: Tensor | None, next_sentence_label: Any, return_dict: bool) -> Any:
    """The output of the loss of masked tokens, and of that of the pairs where there are scores of them."""
    modeling = sys.modules[_MODELING]
    if relationship is None:
        output = modeling.MaskedLMOutput(loss=loss)
    else:
        pair_loss = cross_entropy(relationship, next_sentence_label, name="next_sentence_label")
        output = modeling.BertForPreTrainingOutput(loss=loss + pair_loss)
    return output if return_dict else output.to_tuple()


def _reads_pooled_only(host: Any, name: str) -> bool:
    """Whether nobody reads the rows that the `BertModel` of this host returns, but the pooler's output alone."""
    return name in _POOLED_ONLY and isinstance(host.bert, _fast_class()) and not host.bert._forward_hooks


@functools.cache
def _known_types(hidden_act: str) -> frozenset[type]:
    """The exact classes below a transformers `BertModel` that the ops replace."""
    from transformers.activations import ACT2FN

    names = ("Embeddings", "Encoder", "Layer", "Attention", "SelfAttention", "SelfOutput", "Intermediate", "Output")
    modeling = sys.modules[_MODELING]
    return frozenset({getattr(modeling, f"Bert{name}") for name in names} | {type(ACT2FN[hidden_act])})


class _Call(NamedTuple):
    """A call that the fast path serves."""

    inputs: BertInputs
    packed: engine.Engine | None  # None: the ops one by one
    wants_states: bool
    return_dict: bool


def _call(
    bert: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = None,
    return_dict: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> _Call | None:
    """What a call asks for, or None if the plain path must run it."""
    config = bert.config
    unserved = (inputs_embeds, encoder_hidden_states, encoder_attention_mask, past_key_values)
    states_asked = kwargs.pop("output_hidden_states", None)
    wants_states = _is_asked(config.output_hidden_states if states_asked is None else states_asked)
    asked = [config.output_attentions, *(value for name, value in kwargs.items() if name not in _IGNORED)]
    if input_ids is None or any(value is not None for value in unserved) or any(map(_is_asked, asked)):
        return None
    if is_recorded() or (attention_mask is not None and attention_mask.dim() > 2):
        return None
    packed = _engine(bert)
    if packed is None and wants_states:
        return None
    inputs = BertInputs(input_ids, attention_mask, token_type_ids, position_ids, cu_seq_lens_q=cu_seq_lens_q)
    return _Call(inputs, packed, wants_states, config.return_dict if return_dict is None else return_dict)


def _forward(bert: Any, pooled_only: bool, *args: Any, **kwargs: Any) -> Any:
    """The output of a call that the ops serve, or None for one that the plain path must run.

    With `pooled_only` the rows may be those of the first tokens alone.
    """
    call = _call(bert, *args, **kwargs)
    if call is None:
        return None
    if call.packed is None:
        result = _run_ops(bert, call.inputs, pooled_only)
    else:
        result = call.packed.padded(call.inputs, call.wants_states)
    if result is None:
        return None
    rows, first, states = result
    output = _output_class()(
        last_hidden_state=rows,
        pooler_output=None if bert.pooler is None else bert.pooler(first[:, None]),
        hidden_states=tuple(states) if call.wants_states else None,
    )
    return output if call.return_dict else output.to_tuple()


def _run_ops(bert: Any, inputs: BertInputs, pooled_only: bool) -> tuple[Tensor, Tensor, list[Tensor]] | None:
    """The same, without hidden states, from the ops one by one; None if they may not stand in for the modules."""
    batch = _ragged_batch(bert, inputs)
    if batch is None:
        return None
    ragged, padding = batch
    config = bert.config
    if pooled_only and ragged.input_ids.numel():
        first = encode_first(bert, ragged, config.hidden_act, config.num_attention_heads)
        return first[:, None], first, []
    rows = encode(bert, ragged, config.hidden_act, config.num_attention_heads)
    return padding.pad(rows), first_tokens(rows, ragged), []


@torch.compiler.disable
def _engine(bert: Any) -> engine.Engine | None:
    if bert.config._attn_implementation not in _ATTENTIONS:
        return None
    return engine.serving(bert, bert.config.hidden_act, bert.config.num_attention_heads, lambda: _obstacle(bert))


@torch.compiler.disable
def _ragged_batch(bert: Any, inputs: BertInputs) -> tuple[Ragged, Padding] | None:
    """The batch without its padding, or None if the ops may not stand in for the model's modules as they are now."""
    if reason := _obstacle(bert):
        ops.warn_of_fallback(f"transformers' own path runs instead of the fast one: {reason}")
        return None
    return inputs.checked(TableSizes.of(bert.embeddings)).to_ragged()


def _obstacle(bert: Any) -> str | None:
    attention = bert.config._attn_implementation
    if attention not in _ATTENTIONS:
        return f"its attention is {attention!r}"
    known = _known_types(bert.config.hidden_act)
    parts = (bert.embeddings, bert.encoder)
    reasons = (obstacle(part, known, _HARMLESS_HOOKS) for part in parts)
    return next(filter(None, reasons), None)


def _output_class() -> Any:
    return sys.modules[_MODELING].BaseModelOutputWithPoolingAndCrossAttentions


def _is_asked(value: Any) -> bool:
    """Whether an optional argument asks for anything; a selection of layers, `[0, -1]`, does."""
    return value is not None and value is not False

"""What the drop-in puts into transformers' models: classes whose `forward` runs on the ops."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bert_fast import engine, masked_lm, ops
from bert_fast.checks import is_recorded
from bert_fast.encoder import encode, encode_first, first_tokens, projection
from bert_fast.inputs import BertInputs, TableSizes
from bert_fast.losses import IGNORED_LABEL, cross_entropy, divisor_of
from bert_fast.modules import obstacle
from bert_fast.ragged import Padding, Ragged


@dataclass(frozen=True)
class Family:
    """A family of transformers' models over an encoder that the ops run.

    Attributes:
        modeling: the Python module of its classes, which is imported by whoever made a model.
        prefix: what the names of its classes begin with.
        heads: its models with a head, without the prefix.
        first_only: those that read nothing of the encoder but the pooler's output, or the rows of the first tokens.
        output: the class of what the encoder returns.
    """

    modeling: str
    prefix: str
    heads: tuple[str, ...]
    first_only: tuple[str, ...]
    output: str

    @property
    def hosts(self) -> tuple[str, ...]:
        """Names of its classes, that of the encoder first."""
        return (f"{self.prefix}Model", *(f"{self.prefix}{head}" for head in self.heads))


_TASKS = ("ForSequenceClassification", "ForMultipleChoice", "ForTokenClassification", "ForQuestionAnswering")

FAMILIES = (
    Family(
        "transformers.models.bert.modeling_bert",
        "Bert",
        ("ForPreTraining", "ForMaskedLM", "ForNextSentencePrediction", *_TASKS),
        ("ForSequenceClassification", "ForNextSentencePrediction", "ForMultipleChoice"),
        "BaseModelOutputWithPoolingAndCrossAttentions",
    ),
    Family(
        "transformers.models.electra.modeling_electra",
        "Electra",
        ("ForPreTraining", "ForMaskedLM", *_TASKS),
        ("ForSequenceClassification", "ForMultipleChoice"),
        "BaseModelOutputWithPastAndCrossAttentions",
    ),
)


def _family_of(plain: type[Any]) -> Family:
    """The family of a class of transformers' own."""
    return next(family for family in FAMILIES if family.modeling == plain.__module__)


#: With this argument a model with a head tells its encoder that it reads the first tokens only.
_FIRST_ONLY_ARGUMENT = "bert_fast_first_only"

#: Those that can do with the tokens that have a label, if the loss is all that is asked for.
_MASKED_LM = ("BertForMaskedLM", "BertForPreTraining")

#: Arguments of a call that change nothing in an encoder, and what transformers' collators pass beside `cu_seq_lens_q`.
_IGNORED = frozenset({"use_cache", "num_items_in_batch", "cu_seq_lens_k", "max_length_q", "max_length_k"})

#: Hooks of transformers' own that look at hidden states, which no call asks for that the ops serve, or have the inputs
#: of a layer that is computed again ask for gradients, which `encode` does.
_HARMLESS_HOOKS = ("transformers.utils.output_capturing", "transformers.modeling_utils")

#: transformers' own names for softmax attention, which the ops replace; somebody may register another function.
_ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")


@functools.cache
def fast_model_class(plain: Any) -> type[Any]:
    """transformers' `BertModel` or `ElectraModel` with another `forward`.

    It goes by the same name and module, because transformers looks classes up by theirs (the `architectures` of a saved
    config, the registry of what `output_attentions` records); so pickling has to be told what to build.
    """

    class FastModel(plain):
        bert_fast_plain = plain
        bert_fast_family = _family_of(plain)

        @functools.wraps(plain.forward)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            first_only = kwargs.pop(_FIRST_ONLY_ARGUMENT, False)
            output = _forward(self, first_only, *args, **kwargs)
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

    return _named_as(plain, FastModel, fast_model_class)


def _named_as(plain: Any, fast: Any, make: Callable[[Any], type[Any]]) -> Any:
    """`fast`, which `make` gives for `plain`, by the name and module of the latter, and pickled through `make`."""

    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        state = super(fast, self).__reduce_ex__(protocol)[2]
        return _blank, (make, plain.__module__, plain.__name__), state

    fast.__reduce_ex__ = reduce
    fast.__name__ = fast.__qualname__ = plain.__name__
    fast.__module__ = plain.__module__
    return fast


def _blank(make: Callable[[Any], type[Any]], module: str, name: str) -> Any:
    """An accelerated model without its state, for pickle and copy; a fresh process may not have the module yet."""
    return object.__new__(make(getattr(importlib.import_module(module), name)))


@functools.cache
def fast_host_class(plain: Any) -> Any:
    """A transformers model with a head, whose `forward` takes `loss_only` too, as `heads.Head.forward` does."""

    signature = inspect.signature(plain.forward)
    first_only = plain.__name__.removeprefix(_family_of(plain).prefix) in _family_of(plain).first_only

    class FastHost(plain):
        bert_fast_plain = plain

        @functools.wraps(plain.forward)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            loss_only = kwargs.pop("loss_only", False)
            if loss_only and plain.__name__ in _MASKED_LM:
                given = _bound(signature, args, kwargs)
                output = _masked_lm_loss(self, **given)
                return _plain_masked_lm_loss(plain, self, **given) if output is None else output
            if first_only and _tells_encoder(self):
                kwargs[_FIRST_ONLY_ARGUMENT] = True
            output = plain.forward(self, *args, **kwargs)
            if not loss_only:
                return output
            if getattr(output, "loss", None) is None:
                raise ValueError("loss_only without labels, or with return_dict=False: there is no loss")
            return type(output)(loss=output.loss)

    return _named_as(plain, FastHost, fast_host_class)


def _bound(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a `forward` by name."""
    given = signature.bind(None, *args, **kwargs).arguments
    given.pop("self")
    others = given.pop("kwargs", {})
    return {**given, **others}


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
    modeling = sys.modules[FAMILIES[0].modeling]
    if relationship is None:
        output = modeling.MaskedLMOutput(loss=loss)
    else:
        pair_loss = cross_entropy(relationship, next_sentence_label, name="next_sentence_label")
        output = modeling.BertForPreTrainingOutput(loss=loss + pair_loss)
    return output if return_dict else output.to_tuple()


def _tells_encoder(host: Any) -> bool:
    """Whether the encoder of this host is accelerated, and nobody else reads its rows.

    In ELECTRA's multiple choice the config says which row the head reads.
    """
    encoder, reads_first = host.base_model, getattr(host.config, "summary_type", "first") == "first"
    return reads_first and hasattr(encoder, "bert_fast_family") and not encoder._forward_hooks


@functools.cache
def _known_types(family: Family, hidden_act: str) -> frozenset[type]:
    """The exact classes below an encoder of transformers' that the ops replace."""
    from transformers.activations import ACT2FN

    names = ("Embeddings", "Encoder", "Layer", "Attention", "SelfAttention", "SelfOutput", "Intermediate", "Output")
    modeling = sys.modules[family.modeling]
    return frozenset({getattr(modeling, f"{family.prefix}{name}") for name in names} | {type(ACT2FN[hidden_act])})


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
    packed = engine_of(bert)
    if packed is None and wants_states:
        return None
    inputs = BertInputs(input_ids, attention_mask, token_type_ids, position_ids, cu_seq_lens_q=cu_seq_lens_q)
    return _Call(inputs, packed, wants_states, config.return_dict if return_dict is None else return_dict)


def _forward(bert: Any, first_only: bool, *args: Any, **kwargs: Any) -> Any:
    """The output of a call that the ops serve, or None for one that the plain path must run.

    With `first_only` the rows are those of the first tokens alone, (batch_size, 1, hidden_size).
    """
    call = _call(bert, *args, **kwargs)
    if call is None:
        return None
    if call.packed is None:
        result = _run_ops(bert, call.inputs, first_only)
    else:
        result = call.packed.padded(call.inputs, call.wants_states)
    if result is None:
        return None
    rows, first, states = result
    family, pooler = bert.bert_fast_family, getattr(bert, "pooler", None)
    output = getattr(sys.modules[family.modeling], family.output)(
        last_hidden_state=first[:, None] if first_only else rows,
        hidden_states=tuple(states) if call.wants_states else None,
        **({} if pooler is None else {"pooler_output": pooler(first[:, None])}),
    )
    return output if call.return_dict else output.to_tuple()


def _run_ops(bert: Any, inputs: BertInputs, first_only: bool) -> tuple[Tensor, Tensor, list[Tensor]] | None:
    """The same, without hidden states, from the ops one by one; None if they may not stand in for the modules."""
    batch = _ragged_batch(bert, inputs)
    if batch is None:
        return None
    ragged, padding = batch
    config = bert.config
    if first_only and ragged.input_ids.numel():
        first = encode_first(bert, ragged, config.hidden_act, config.num_attention_heads)
        return first[:, None], first, []
    rows = encode(bert, ragged, config.hidden_act, config.num_attention_heads)
    return padding.pad(rows), first_tokens(rows, ragged), []


@torch.compiler.disable
def engine_of(bert: Any) -> engine.Engine | None:
    """The packed weights that serve an accelerated encoder as it is now, or None."""
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
    known = _known_types(bert.bert_fast_family, bert.config.hidden_act)
    parts = (bert.embeddings, projection(bert), bert.encoder)
    reasons = (obstacle(part, known, _HARMLESS_HOOKS) for part in parts if part is not None)
    return next(filter(None, reasons), None)


def _is_asked(value: Any) -> bool:
    """Whether an optional argument asks for anything; a selection of layers, `[0, -1]`, does."""
    return value is not None and value is not False

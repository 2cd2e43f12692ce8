"""The fast BERT: the plain one's classes and parameters, run without padding by `encoder.encode`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bert_fast import engine, heads, masked_lm, ops, reference, sentence_embedding, sharding
from bert_fast.checks import is_recorded
from bert_fast.encoder import encode, encode_first, first_tokens
from bert_fast.inputs import BertInputs
from bert_fast.outputs import Encoded, LogitsOutput, ModelOutput, PreTrainingOutput
from bert_fast.ragged import Ragged

#: What `obstacle` lets the ops replace, besides the containers of a family.
LEAVES = frozenset({nn.Linear, nn.LayerNorm, nn.Embedding, nn.Dropout, nn.ModuleList})

#: Names of the classes whose modules `encoder.encode` calls where several processes share out their parameters.
CALLED = ("BertEmbeddings", "BertLayer")


def obstacle(module: nn.Module, known: frozenset[type], harmless_hooks: tuple[str, ...] = ()) -> str | None:
    """Why the ops may not stand in for the modules of this tree, or None.

    Somebody may have hooked a module, given it another `forward`, or put another in its place (LoRA, a quantised
    linear, a parametrisation), or parameters that the ops do not take: then only calling the modules themselves is
    right. Modules that `fully_shard` was given are called all the same if `encoder.encode` calls them (`CALLED`).

    Args:
        module: the tree.
        known: the exact types that the ops know how to replace, besides `LEAVES`.
        harmless_hooks: names of Python modules whose hooks may be left out.
    """
    stack, dtypes = [(module, False)], set()
    while stack:
        part, is_elsewhere = stack.pop()
        is_unit = sharding.is_unit(part) and sharding.plain_type(part).__name__ in CALLED
        kind = sharding.plain_type(part) if is_unit else type(part)
        if kind not in LEAVES and kind not in known:
            return f"a {type(part).__name__} stands in it"
        if "forward" in part.__dict__:
            return f"a {type(part).__name__} in it has a forward of its own"
        is_elsewhere = is_elsewhere or is_unit
        for name, parameter in part._parameters.items():
            if parameter is None or not (is_elsewhere or type(parameter) in (nn.Parameter, Tensor)):
                what = "no" if parameter is None else f"a {type(parameter).__name__} as"
                return f"a {type(part).__name__} in it has {what} {name}"
            dtypes.add(parameter.dtype)
        if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
            hooks = [*part._forward_pre_hooks.values(), *part._backward_hooks.values()]
            hooks += [*part._backward_pre_hooks.values(), *part._forward_hooks.values()]
            hooks = [hook for hook in hooks if not (is_unit and sharding.is_own_hook(hook))]
            if any(getattr(hook, "__module__", None) not in harmless_hooks for hook in hooks):
                return f"a {type(part).__name__} in it has a hook"
        stack.extend((child, is_elsewhere) for child in part._modules.values() if child is not None)
    if len(dtypes) > 1:
        return f"its parameters are of several dtypes: {', '.join(sorted(str(dtype) for dtype in dtypes))}"
    return None


_KNOWN = frozenset(
    {
        reference.BertEmbeddings,
        reference.BertEncoder,
        reference.BertLayer,
        reference.BertAttention,
        reference.BertSelfAttention,
        reference.BertIntermediate,
        reference.ResidualOutput,
        reference.BertPooler,
    }
)


class Pretrained(nn.Module):
    """Saving, and trading memory for time, for every class below."""

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the checkpoint folder that `bert_fast.from_pretrained` and transformers read; see `loading`."""
        from bert_fast.loading import save_pretrained

        save_pretrained(self, directory)

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """In training keep the input of each layer only, and compute the rest again in the backward.

        Args:
            activation_checkpointing_kwargs: of `torch.utils.checkpoint.checkpoint`; without re-entry if not given.
            every_n_layers: leave out all layers but each n-th.
            offload: to the memory of the host, which is not there: only False is legal.

        Raises:
            ValueError: `offload` is True, or `every_n_layers` is not positive.
        """
        if offload:
            raise ValueError("offload is True, but bert_fast's models keep the inputs of layers where they are")
        if every_n_layers < 1:
            raise ValueError(f"every_n_layers is {every_n_layers}, expected a positive number")
        options = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        for index, layer in enumerate(self._layers()):
            layer.gradient_checkpointing = index % every_n_layers == 0
            layer._gradient_checkpointing_func = partial(checkpoint, **options)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """`activation_checkpointing_enable` under its older name."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Keep the intermediate results again."""
        for layer in self._layers():
            layer.gradient_checkpointing = False

    def _layers(self) -> list[Any]:
        return [part for part in self.modules() if isinstance(part, reference.BertLayer)]


class BertModel(Pretrained, reference.BertModel):
    """The plain BERT's arguments, parameters and answers, computed without padding on the ops.

    Calls that the ops do not serve (`output_attentions`, `inputs_embeds`) and programs being recorded (`torch.export`)
    run the plain definition.
    """

    def encode(self, ragged: Ragged, hidden_states: list[Tensor] | None = None) -> Tensor:
        """The last layer's rows, (num_tokens, hidden_size), of a batch that has no padding; see `encoder.encode`."""
        return self._encode(self.engine(), ragged, hidden_states)

    def _encode(self, packed: engine.Engine | None, ragged: Ragged, hidden_states: list[Tensor] | None) -> Tensor:
        if packed is not None:
            return packed.rows(ragged, hidden_states)
        return encode(self, ragged, self.config.hidden_act, self.config.num_attention_heads, hidden_states)

    def engine(self) -> engine.Engine | None:
        """The encoder over packed weights that runs the model as it is now, or None; see `engine.serving`."""
        return engine.serving(self, self.config.hidden_act, self.config.num_attention_heads, self._obstacle)

    def encode_batch(self, inputs: BertInputs, pooled_only: bool = False) -> Encoded:
        """The hidden rows of a batch, one per token there is; with `pooled_only` perhaps of the first tokens only."""
        if inputs.output_attentions or inputs.inputs_embeds is not None or is_recorded():
            engine.check_not_released(self, "the call is not one that packed weights serve")
            return super().encode_batch(inputs, pooled_only)
        packed = self.engine()
        if packed is None and (reason := self._obstacle()):
            ops.warn_of_fallback(f"the plain definition runs instead of the fast one: {reason}")
            return super().encode_batch(inputs, pooled_only)
        if packed is None:
            ragged, padding = inputs.checked(self.config).to_ragged()
        else:
            ragged, padding = packed.pack(inputs)
        hidden_states: list[Tensor] | None = [] if inputs.output_hidden_states else None
        if pooled_only and packed is None and hidden_states is None and ragged.input_ids.numel():
            rows = first = encode_first(self, ragged, self.config.hidden_act, self.config.num_attention_heads)
        else:
            rows = self._encode(packed, ragged, hidden_states)
            first = first_tokens(rows, ragged)
        return Encoded(
            rows=rows,
            pad=padding.pad,
            keep=None if inputs.attention_mask is None else inputs.attention_mask != 0,
            pooler_output=None if self.pooler is None else self.pooler(first),
            cu_seqlens=inputs.cu_seq_lens_q,
            hidden_states=None if hidden_states is None else tuple(padding.pad(state) for state in hidden_states),
        )

    def encode_labelled(self, inputs: BertInputs, labels: Tensor) -> masked_lm.Labelled | None:
        """The rows that a masked-language-model loss reads, or None where the plain definition has to run."""
        if inputs.output_attentions or inputs.inputs_embeds is not None or is_recorded():
            return None
        packed = self.engine()
        if packed is None and self._obstacle():
            return None
        ragged, padding = inputs.checked(self.config).to_ragged()
        return masked_lm.encode_labelled(self, packed, self.config, ragged, padding, labels)

    def _obstacle(self) -> str | None:
        return obstacle(self.embeddings, _KNOWN) or obstacle(self.encoder, _KNOWN)


class BertForMaskedLM(Pretrained, heads.BertForMaskedLM):
    """The fast BERT with the masked-language-model head."""

    base = BertModel

    def loss(
        self, inputs: BertInputs, labels: Tensor | None, divisor: float | None, targets: dict[str, Tensor | None]
    ) -> ModelOutput:
        """The loss alone, from the tokens that have a label."""
        rows = _labelled(self, inputs, labels)
        if rows is None:
            return super().loss(inputs, labels, divisor, targets)
        return LogitsOutput(loss=masked_lm.loss(self.cls.predictions, rows, divisor))


class BertForNextSentencePrediction(Pretrained, heads.BertForNextSentencePrediction):
    """The fast BERT with the next-sentence head."""

    base = BertModel


class BertForPreTraining(Pretrained, heads.BertForPreTraining):
    """The fast BERT with both pre-training heads."""

    base = BertModel

    def loss(
        self, inputs: BertInputs, labels: Tensor | None, divisor: float | None, targets: dict[str, Tensor | None]
    ) -> ModelOutput:
        """The loss, from the first tokens and those that have a label."""
        rows, next_sentence = _labelled(self, inputs, labels), targets["next_sentence_label"]
        if rows is None or next_sentence is None:
            return super().loss(inputs, labels, divisor, targets)
        relationship = self.cls.seq_relationship(self.bert.pooler(rows.first))
        loss = masked_lm.loss(self.cls.predictions, rows, divisor)
        loss = loss + self.pair_loss(relationship, next_sentence)
        return PreTrainingOutput(loss, seq_relationship_logits=relationship)


def _labelled(head: Any, inputs: BertInputs, labels: Tensor | None) -> masked_lm.Labelled | None:
    """The rows that the loss of a masked-language-model head reads, or None where the plain way has to run."""
    if labels is None or masked_lm.obstacle(head.cls.predictions.decoder):
        return None
    rows: masked_lm.Labelled | None = head.bert.encode_labelled(inputs, labels)
    return rows


class BertForSequenceClassification(Pretrained, heads.BertForSequenceClassification):
    """The fast BERT with a classifier of texts."""

    base = BertModel


class BertForTokenClassification(Pretrained, heads.BertForTokenClassification):
    """The fast BERT with a classifier of tokens."""

    base = BertModel


class BertForQuestionAnswering(Pretrained, heads.BertForQuestionAnswering):
    """The fast BERT with a span head."""

    base = BertModel


class BertForMultipleChoice(Pretrained, heads.BertForMultipleChoice):
    """The fast BERT with a scorer of choices."""

    base = BertModel


class BertForSentenceEmbedding(Pretrained, sentence_embedding.BertForSentenceEmbedding):
    """The fast BERT with pooling. What it saves is a folder of sentence-transformers."""

    base = BertModel

    def pool(self, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        """One vector for each sequence."""
        return ops.pooling(tokens, cu_seqlens, mode=self.settings.pooling_mode)


#: The heads by the name `from_pretrained(head=...)` takes; None is the model without one.
HEADS: dict[str | None, type[nn.Module]] = {
    None: BertModel,
    "masked_lm": BertForMaskedLM,
    "next_sentence": BertForNextSentencePrediction,
    "pre_training": BertForPreTraining,
    "sequence_classification": BertForSequenceClassification,
    "token_classification": BertForTokenClassification,
    "question_answering": BertForQuestionAnswering,
    "multiple_choice": BertForMultipleChoice,
    "sentence_embedding": BertForSentenceEmbedding,
}

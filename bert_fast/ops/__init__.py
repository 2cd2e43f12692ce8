"""The steps of BERT, each with a plain definition and fused implementations for GPU (Triton) and CPU (C++)."""

from bert_fast.ops._dispatch import (
    FallbackWarning,
    Impl,
    Op,
    Selection,
    Traits,
    extension,
    force,
    forced,
    forward_ad_is_on,
    warn_of_fallback,
)
from bert_fast.ops._dropout import draw_seeds
from bert_fast.ops.attention import attention, attention_schedule
from bert_fast.ops.attention_probabilities import attention_probabilities
from bert_fast.ops.bias_gelu import bias_gelu
from bert_fast.ops.dense import dense
from bert_fast.ops.embedding_layer_norm import embedding_layer_norm
from bert_fast.ops.linear import PackedWeight, linear
from bert_fast.ops.linear_gelu import linear_gelu
from bert_fast.ops.masked_lm_loss import masked_lm_loss
from bert_fast.ops.pooling import pooling
from bert_fast.ops.residual_layer_norm import residual_layer_norm

__all__ = [
    "FallbackWarning",
    "Impl",
    "Op",
    "PackedWeight",
    "Selection",
    "Traits",
    "attention",
    "attention_probabilities",
    "attention_schedule",
    "bias_gelu",
    "dense",
    "draw_seeds",
    "embedding_layer_norm",
    "extension",
    "force",
    "forced",
    "forward_ad_is_on",
    "linear",
    "linear_gelu",
    "masked_lm_loss",
    "pooling",
    "residual_layer_norm",
    "warn_of_fallback",
]

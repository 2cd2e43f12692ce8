"""The drop-in: somebody's transformers or sentence-transformers model, run on the ops.

`accelerate` gives the `BertModel` or `ElectraModel` inside another class, with another `forward`; its parameters,
modules and everything that looks at them stay what they were.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from torch import nn

from bert_fast import engine
from bert_fast.activation import ACTIVATIONS
from bert_fast.drop_in_forward import FAMILIES, engine_of, fast_host_class, fast_model_class
from bert_fast.encoder import projection

#: transformers' classes that can be accelerated.
HOSTS = tuple(host for family in FAMILIES for host in family.hosts)


def accelerate(model: nn.Module, *, precision: str | None = None, free_originals: bool = False) -> nn.Module:
    """Run a model's BERT or ELECTRA on the fused ops, in place.

    The first call without gradients packs the weights of the encoder, a copy in the size of the precision, and runs on
    it from then on; it is packed again when the parameters change. On a GPU only what differs from the parameters is
    copied: the weights of query, key and value, which are joined, and in another precision than their own all of them.
    There a change goes unnoticed if it is written through `parameter.data`: call `accelerate` again then.

    On a GPU short batches run as CUDA graphs, recorded when their sizes, rounded up to a bucket, come for the second
    time. While one is recorded, no thread may wait for the whole device (`torch.cuda.synchronize`) or draw random
    numbers on it.

    The model keeps its class, signature, outputs, `state_dict` and the very same parameters. Two things differ from the
    plain path: positions that `attention_mask` hides come back as zeros, and the pooler, or what reads the first token
    in its place, reads the first one that the mask keeps (the first position, unless the batch is padded on the left).
    Calls that the ops do not serve, such as `output_attentions=True`, run the plain path; so does a model that is being
    exported or traced.

    It trains like the original. Dropout is drawn from torch's generator, another mask than the original would draw,
    with a probability rounded to a 256th. Gradients of gradients (`create_graph=True`) need
    `bert_fast.ops.force("reference")`, and say so. A model with a head takes one more argument: with `loss_only=True`
    it returns the loss alone, and a model for masked language modelling then computes only the tokens that have a
    label, and divides by `num_items_in_batch` where that is given (of BERT; ELECTRA's generator computes all).

    Args:
        model: a transformers `BertModel`, `BertFor*`, `ElectraModel` or `ElectraFor*`, or a sentence-transformers
            `SentenceTransformer` or `CrossEncoder` that holds one.
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
        plain: Any = _plain(type(bert))
        bert.__class__ = fast_model_class(plain)
        engine.set_precision(bert, precision, partial(engine_of, bert))
    for host in _hosts(model):
        plain = _plain(type(host))
        host.__class__ = fast_host_class(plain)
    if free_originals:
        for bert in berts:
            engine.release(bert, keep=_parameters_outside(model, bert))
    return model


def _parameters_outside(model: nn.Module, bert: Any) -> frozenset[int]:
    """Ids of the parameters that modules of the model outside the BERT's embeddings and encoder have."""
    parts = (bert.embeddings, projection(bert), bert.encoder)
    inside = {id(module) for part in parts if part is not None for module in part.modules()}
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
        bert.__class__ = _plain(type(bert))
    for host in _hosts(model):
        host.__class__ = _plain(type(host))
    return model


def is_accelerated(model: nn.Module) -> bool:
    """Whether `accelerate` has been applied to the model or to a BERT inside it."""
    return any(_plain(type(bert)) is not type(bert) for bert in _berts(model))


def _berts(model: nn.Module) -> list[Any]:
    """The transformers `BertModel`s and `ElectraModel`s of a model that `accelerate` knows."""
    encoders, hosts = _classes()
    if _plain(type(model)) in encoders:
        return [model]
    if isinstance(model, hosts) or _is_sentence_transformer(model):
        berts = [part for part in model.modules() if _plain(type(part)) in encoders]
        if berts:
            return berts
    raise TypeError(
        f"bert_fast.accelerate does not know {type(model).__module__}.{type(model).__name__}; it knows transformers' "
        f"{', '.join(HOSTS)}, and sentence-transformers' SentenceTransformer and CrossEncoder holding one of them"
    )


def _classes() -> tuple[tuple[type[Any], ...], tuple[type[Any], ...]]:
    """transformers' own encoders, and models with a head, of the families that somebody has imported."""
    loaded = [(sys.modules[family.modeling], family) for family in FAMILIES if family.modeling in sys.modules]
    classes = [[getattr(modeling, name) for name in family.hosts] for modeling, family in loaded]
    return tuple(own[0] for own in classes), tuple(kind for own in classes for kind in own[1:])


def _hosts(model: nn.Module) -> list[Any]:
    """transformers' own models with a head among the modules of a model, accelerated or not."""
    hosts = _classes()[1]
    return [part for part in model.modules() if _plain(type(part)) in hosts]


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

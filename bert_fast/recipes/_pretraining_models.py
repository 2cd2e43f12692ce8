"""The model that is pre-trained: a fresh one of some shape, or the one of a checkpoint; and how it is saved."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bert_fast import heads, loading, reference, saving
from bert_fast.config import BertConfig, ElectraConfig
from bert_fast.data.encoding import TokenizerVocabulary
from bert_fast.electra import ElectraPretraining
from bert_fast.families import make_config, model_class
from bert_fast.folders import copy_tokenizer, read_json, resolve

if TYPE_CHECKING:
    from bert_fast.recipes.pretrain import PretrainSettings

#: Layers and width of Google's models (google-research/bert; the small ones are Turc et al., 2019, arXiv:1908.08962).
#: Heads have 64 channels, the feed-forward block is four times as wide.
SHAPES = {
    "tiny": (2, 128),
    "mini": (4, 256),
    "small": (4, 512),
    "medium": (8, 512),
    "base": (12, 768),
    "large": (24, 1024),
}

#: Layers, width and width of the embeddings of ELECTRA's discriminators (Clark et al., 2020).
ELECTRA_SHAPES = {"electra-small": (12, 256, 128), "electra-base": (12, 768, 768), "electra-large": (24, 1024, 1024)}

#: The head of a BERT that learns an objective.
HEADS = {"mlm": "masked_lm", "nsp": "pre_training", "sop": "pre_training"}

#: How fresh weights are drawn: transformers' way, and Google's.
INITIALIZATIONS = ("normal", "truncated_normal")

#: Rows that a table of embeddings may have beyond the tokens: tables are padded to multiples of up to 128.
SPARE_ROWS = 127


def make_model(settings: PretrainSettings, vocabulary: TokenizerVocabulary) -> Any:
    """The model of these settings, in float32, with fresh weights where it has no others.

    Raises:
        ValueError: the shape is not known, the checkpoint is not right, or its embeddings do not fit the vocabulary.
    """
    model = _fresh(settings, vocabulary) if settings.model_name_or_path is None else _continued(settings)
    if isinstance(model, heads.BertForPreTraining):
        model.next_sentence_weight = settings.nsp_weight
    if isinstance(model, ElectraPretraining):
        model.discriminator_weight = settings.disc_weight
    _check_sizes(vocabulary, model.config, settings)
    return model


def _fresh(settings: PretrainSettings, vocabulary: TokenizerVocabulary) -> Any:
    if settings.initialization not in INITIALIZATIONS:
        known = ", ".join(INITIALIZATIONS)
        raise ValueError(f"initialization is {settings.initialization!r}, expected one of {known}")
    config = _config(settings, vocabulary)
    model: Any
    if isinstance(config, ElectraConfig):
        smaller = config.generator(settings.generator_hidden_size, settings.generator_layers)
        shapes = {"masked_lm": smaller, "pre_training": config}
        parts = (model_class(shape, head, plain=settings.plain)(shape) for head, shape in shapes.items())
        model = ElectraPretraining(*parts)
    else:
        model = model_class(config, HEADS[settings.objective], plain=settings.plain)(config)
    if settings.initialization == "truncated_normal":
        heads.initialize(model, config, truncated=True)
        for part in model.modules():  # once more, as a decoder that shares the table has no row for padding
            if isinstance(part, reference.BertEmbeddings):
                heads.initialize(part, config, truncated=True)
    return model


def _config(settings: PretrainSettings, vocabulary: TokenizerVocabulary) -> BertConfig:
    """The shape by name or from a file, with what the vocabulary says; the discriminator's for ELECTRA."""
    name, is_electra = settings.config_name, settings.objective == "electra"
    if name is None:
        raise ValueError("neither config_name nor model_name_or_path is given: there is no model to pre-train")
    fields: dict[str, Any]
    if name in SHAPES or (is_electra and name in ELECTRA_SHAPES):
        layers, width, *narrow = (ELECTRA_SHAPES if name in ELECTRA_SHAPES else SHAPES)[name]
        fields = {
            "num_hidden_layers": layers,
            "hidden_size": width,
            "num_attention_heads": width // 64,
            "intermediate_size": 4 * width,
        }
        if is_electra:
            fields["embedding_size"] = narrow[0] if narrow else width
        fields["vocab_size"] = vocabulary.size
    elif Path(name).exists():
        file = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
        fields = {name: value for name, value in read_json(file).items() if name not in ("architectures", "dtype")}
        if is_electra and fields.get("model_type") != "electra":
            fields = {"embedding_size": fields.get("hidden_size", BertConfig().hidden_size), **fields}
        fields.setdefault("vocab_size", vocabulary.size)
    else:
        known = [*SHAPES, *(ELECTRA_SHAPES if is_electra else ())]
        raise ValueError(f"config_name is {name!r}, expected {', '.join(known)}, or a config.json")
    if is_electra and settings.embedding_size is not None:
        fields["embedding_size"] = settings.embedding_size
    fields["pad_token_id"] = vocabulary.ids["pad_token"]
    config = make_config({**fields, "model_type": "electra"} if is_electra else fields)
    _check_family(settings, config, name)
    return config


def _continued(settings: PretrainSettings) -> Any:
    folder = resolve(str(settings.model_name_or_path))
    if settings.objective != "electra":
        return _loaded(settings, folder, HEADS[settings.objective])
    found = folder / "generator" if settings.generator_name_or_path is None else settings.generator_name_or_path
    if settings.generator_name_or_path is None and not Path(found).is_dir():
        raise ValueError(
            f"{folder} has no folder `generator`, and ELECTRA goes on with both: give generator_name_or_path"
        )
    return ElectraPretraining(_loaded(settings, resolve(found), "masked_lm"), _loaded(settings, folder, "pre_training"))


def _loaded(settings: PretrainSettings, folder: Path, head: str) -> Any:
    config = loading.read_config(folder)
    _check_family(settings, config, folder)
    kind = model_class(config, head, plain=settings.plain)
    return loading.build(kind, config, loading.read_state_dict(folder), dtype="float32")


def _check_family(settings: PretrainSettings, config: BertConfig, what: Any) -> None:
    expected = "electra" if settings.objective == "electra" else "bert"
    if config.model_type != expected:
        raise ValueError(
            f"model_type of {what} is {config.model_type!r}, but objective {settings.objective!r} is for {expected!r}"
        )


def _check_sizes(vocabulary: TokenizerVocabulary, config: BertConfig, settings: PretrainSettings) -> None:
    if not 0 <= config.vocab_size - vocabulary.size <= SPARE_ROWS:
        what = settings.model_name_or_path or settings.config_name
        raise ValueError(
            f"the tokenizer has {vocabulary.size} tokens, but the table of embeddings of {what} has "
            f"{config.vocab_size} rows: they do not belong together"
        )


def save(model: Any, tokenizer: Path, output_dir: Path) -> None:
    """Write the model and the files of its tokenizer, as transformers loads them.

    Of ELECTRA the discriminator is what the folder holds, and the generator with its tokenizer the one in `generator`.
    """
    folders = [output_dir]
    if isinstance(model, ElectraPretraining):
        model.save_pretrained(output_dir)
        folders.append(output_dir / "generator")
    else:
        saving.save_pretrained(model, output_dir)
    for folder in folders:
        copy_tokenizer(tokenizer, folder)


def describe(model: Any) -> dict[str, Any]:
    """Its parameters, each counted once, and its shape."""
    count = sum(parameter.numel() for parameter in model.parameters())
    return {"parameters": count, "configs": [dataclasses.asdict(shape) for shape in model.shapes]}

"""The shape of a BERT or an ELECTRA: Hugging Face's field names and defaults, checked when it is made."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from bert_fast.activation import ACTIVATIONS
from bert_fast.folders import read_json


@dataclass
class BertConfig:
    """Configuration of a BERT model (Devlin et al., 2018), as `config.json` of a Hugging Face checkpoint holds it.

    The defaults are BERT-base, uncased. Fields this class does not know are kept in `extra` and written back unchanged.

    Raises:
        ValueError: a field is impossible; the message names the field and its value.
    """

    #: What `config.json` calls the family.
    model_type: ClassVar[str] = "bert"

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    position_embedding_type: str = "absolute"
    classifier_dropout: float | None = None
    tie_word_embeddings: bool = True
    problem_type: str | None = None
    id2label: dict[int, str] = field(default_factory=lambda: {0: "LABEL_0", 1: "LABEL_1"})
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            self.id2label = {int(index): label for index, label in self.id2label.items()}
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"id2label is {self.id2label!r}, expected names by number") from error
        for name in (
            "vocab_size",
            "hidden_size",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
            "type_vocab_size",
        ):
            _require(isinstance(getattr(self, name), int) and getattr(self, name) > 0, self, name, "a positive integer")
        _require(
            isinstance(self.num_hidden_layers, int) and self.num_hidden_layers >= 0,
            self,
            "num_hidden_layers",
            "an integer >= 0",
        )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}"
            )
        _require(self.hidden_act in ACTIVATIONS, self, "hidden_act", f"one of {', '.join(ACTIVATIONS)}")
        _require(self.position_embedding_type == "absolute", self, "position_embedding_type", "'absolute'")
        _require(_is_number(self.layer_norm_eps) and self.layer_norm_eps > 0, self, "layer_norm_eps", "positive")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            probability = getattr(self, name)
            _require(_is_number(probability) and 0.0 <= probability <= 1.0, self, name, "a probability")
        _require(
            self.problem_type in (None, "regression", "single_label_classification", "multi_label_classification"),
            self,
            "problem_type",
            "regression, single_label_classification or multi_label_classification",
        )
        if self.pad_token_id is not None:
            is_id = isinstance(self.pad_token_id, int) and 0 <= self.pad_token_id < self.vocab_size
            _require(is_id, self, "pad_token_id", "inside the vocabulary")

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def embedding_size(self) -> int:
        """Width of the three tables of embeddings, and of word vectors given instead of ids."""
        return self.hidden_size

    @property
    def num_labels(self) -> int:
        """Width of a classification head: the number of entries of `id2label`."""
        return len(self.id2label)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BertConfig:
        """Build from the contents of a `config.json`; `num_labels` without `id2label` gives LABEL_0, LABEL_1, ..."""
        values = dict(values)
        model_type = values.pop("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(f"model_type is {model_type!r}, expected {cls.model_type!r}")
        known = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        num_labels = values.pop("num_labels", None)
        if values.get("id2label") is None:
            values.pop("id2label", None)
            if num_labels is not None:
                values["id2label"] = {index: f"LABEL_{index}" for index in range(num_labels)}
        extra = {key: value for key, value in values.items() if key not in known}
        return cls(**{key: value for key, value in values.items() if key in known}, extra=extra)

    @classmethod
    def from_json_file(cls, path: str | Path) -> BertConfig:
        """Read a `config.json`; ValueError when it is not a JSON object."""
        return cls.from_dict(read_json(Path(path)))

    def to_dict(self) -> dict[str, Any]:
        """The contents of a `config.json` that this class and transformers read back."""
        values = dataclasses.asdict(self)
        extra = values.pop("extra")
        return {
            **extra,
            **values,
            "model_type": self.model_type,
            "id2label": {str(index): label for index, label in self.id2label.items()},
            "label2id": {label: index for index, label in self.id2label.items()},
        }

    def get_text_config(self) -> BertConfig:
        """The part about text, which is all of it; transformers' trainer asks for it by this name."""
        return self

    def to_json_string(self) -> str:
        """`to_dict` as the text of a `config.json`, by transformers' name, which its callbacks use."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"


@dataclass
class ElectraConfig(BertConfig):
    """Configuration of an ELECTRA model, as `config.json` of a Hugging Face checkpoint holds it.

    The defaults are ELECTRA-small's discriminator. Embeddings narrower or wider than the layers are projected.

    `summary_...` say what scores the texts of multiple choice: act(dense(first token)), without dense where
    `summary_use_proj` is False and without act where `summary_activation` is None, then dropout.
    """

    model_type: ClassVar[str] = "electra"

    hidden_size: int = 256
    num_attention_heads: int = 4
    intermediate_size: int = 1024
    embedding_size: int = 128
    summary_type: str = "first"
    summary_use_proj: bool = True
    summary_activation: str | None = "gelu"
    summary_last_dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        is_width = isinstance(self.embedding_size, int) and self.embedding_size > 0
        _require(is_width, self, "embedding_size", "a positive integer")
        known = f"None or one of {', '.join(ACTIVATIONS)}"
        _require(
            not self.summary_activation or self.summary_activation in ACTIVATIONS, self, "summary_activation", known
        )
        probability = self.summary_last_dropout
        _require(_is_number(probability) and 0.0 <= probability <= 1.0, self, "summary_last_dropout", "a probability")

    def generator(self, hidden_size: float = 0.25, layers: float = 1.0) -> ElectraConfig:
        """The generator of this discriminator, as google-research/electra makes it: `get_generator_config`.

        Its heads have 64 channels, its feed-forward block four times its width; embeddings are the discriminator's.

        Args:
            hidden_size: part of the discriminator's width; 1/4 for small and large, 1/3 for base.
            layers: part of the discriminator's layers.

        Raises:
            ValueError: a part is not above 0 and at most 1.
        """
        for name, part in (("hidden_size", hidden_size), ("layers", layers)):
            if not 0 < part <= 1:
                raise ValueError(f"generator_{name} is {part}, expected above 0 and at most 1")
        width = max(1, round(self.hidden_size * hidden_size))
        return replace(
            self,
            hidden_size=width,
            num_hidden_layers=max(1, round(self.num_hidden_layers * layers)),
            num_attention_heads=next(n for n in range(max(1, width // 64), 0, -1) if width % n == 0),
            intermediate_size=4 * width,
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _require(condition: bool, config: BertConfig, name: str, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {getattr(config, name)!r}, expected {expected}")

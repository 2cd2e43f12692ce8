"""The texts of a pre-training run: shards as they are, or made of text on the way in; what is held out; the masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import ConcatDataset

from bert_fast import disk
from bert_fast.data import shards
from bert_fast.data.encoding import TokenizerVocabulary
from bert_fast.data.instances import Options
from bert_fast.data.pretraining import MANIFEST, ShardDataset
from bert_fast.data.text import find_files, read_documents
from bert_fast.recipes.held_out import padded
from bert_fast.training.batches import PackingCollator
from bert_fast.training.masking import MaskingCollator

if TYPE_CHECKING:
    from bert_fast.recipes.pretrain import PretrainSettings

#: Of the tokens to predict the model sees these parts as [MASK] and as any word; the rest stays.
MASKED, REPLACED = 0.8, 0.1
ELECTRA_MASKED, ELECTRA_REPLACED = 0.85, 0.0

#: Pairs that an objective needs, as the makers of shards call them.
PAIRS = {"mlm": "none", "nsp": "nsp", "sop": "sop", "electra": "none"}


@dataclass(frozen=True)
class Phase:
    """A part of a run.

    Attributes:
        max_seq_length: of its texts.
        fraction: of the run's steps.
        train_file: its shards or text; None for those of the run.
    """

    max_seq_length: int
    fraction: float
    train_file: str | None = None

    @classmethod
    def parse(cls, text: str) -> Phase:
        """From `LENGTH:FRACTION` or `LENGTH:FRACTION:FILE`, as a command line has it."""
        parts = text.split(":", 2)
        try:
            return cls(int(parts[0]), float(parts[1]), parts[2] if len(parts) == 3 else None)
        except (ValueError, IndexError):
            raise ValueError(f"phase is {text!r}, expected LENGTH:FRACTION or LENGTH:FRACTION:FILE") from None


class Texts(ConcatDataset[dict[str, Any]]):
    """The texts of all phases, one phase after the other; `lengths` (num_texts,) are their tokens."""

    @property
    def lengths(self) -> NDArray[np.int32]:
        """(num_texts,) tokens of each."""
        return np.concatenate([part.lengths for part in self.datasets])  # type: ignore[attr-defined]


@dataclass(frozen=True)
class PretrainingTexts:
    """What a run learns from, and what it is judged by.

    Attributes:
        phases: texts of each phase.
        held_out: those that it is judged by, or None.
        options: of the shards, of the first phase: how tokens are hidden.
    """

    phases: tuple[ShardDataset, ...]
    held_out: ShardDataset | None
    options: dict[str, Any]


def holds_out(settings: PretrainSettings) -> bool:
    """Whether the run has texts that it is judged by. Shards are not split: see `read_corpus`."""
    is_split = settings.validation_split_percentage > 0 and not _is_shards(settings.train_file)
    return settings.validation_file is not None or is_split


def read_corpus(
    settings: PretrainSettings, phases: Sequence[Phase], tokenizer: Path, vocabulary: TokenizerVocabulary
) -> PretrainingTexts:
    """Open the shards of all phases; make them below `output_dir/data` where text was given.

    Text without a `validation_file` is split by documents: every n-th one is held out. Shards are not split, as a
    document, or a duplicate of it, would be on both sides.

    Raises:
        ValueError: there is no text; shards were made with another tokenizer, for another objective, or of longer
            texts than the phase; nothing can be held out.
    """
    data, split = Path(settings.output_dir) / "data", settings.validation_split_percentage
    if not 0 <= split < 100:
        raise ValueError(f"validation_split_percentage is {split}, expected at least 0 and below 100")
    sources = {phase.train_file or settings.train_file for phase in phases}
    texts = {source: [source] for source in sources if not _is_shards(source)}
    validation = None if settings.validation_file is None else [settings.validation_file]
    if validation is None and holds_out(settings):
        held_out = data / "validation.txt"
        _split(settings, texts, data, held_out)
        validation = [str(held_out)]

    def opened(source: str, inputs: list[str], length: int, name: str) -> ShardDataset:
        if _is_shards(source):
            return _checked(ShardDataset(source), settings, vocabulary, length)
        options = Options(
            objective=PAIRS[settings.objective],
            masking="dynamic",
            scheme=settings.scheme or "subword",
            max_seq_length=length,
            max_predictions_per_seq=settings.max_predictions_per_seq or length,
            mlm_probability=settings.mlm_probability or 0.15,
            dupe_factor=settings.dupe_factor,
            text_field=settings.text_field,
            split_sentences=settings.split_sentences,
        )
        folder = data / f"{name}-{length}"
        shards.build(inputs, str(tokenizer), folder, options)
        return ShardDataset(folder)

    trained = []
    for number, phase in enumerate(phases, 1):
        source = phase.train_file or settings.train_file
        name = "train" if phase.train_file is None else f"train-{number}"
        trained.append(opened(source, texts.get(source, []), phase.max_seq_length, name))
        if not len(trained[-1]):
            raise ValueError(f"{source} holds no text to pre-train on")
    judged = None
    if validation is not None:
        longest = max(phase.max_seq_length for phase in phases)
        judged = opened(validation[0], validation, longest, "validation")
        if not len(judged):
            raise ValueError(f"{validation[0]} holds no text")
    return PretrainingTexts(tuple(trained), judged, _common([part.manifest["options"] for part in trained]))


def _is_shards(source: str) -> bool:
    return (Path(source) / MANIFEST).is_file()


def _split(settings: PretrainSettings, texts: dict[str, list[str]], data: Path, held_out: Path) -> None:
    """Divide the text of the run by documents into two files, of which `texts` names the one to train on."""
    source, part = settings.train_file, settings.validation_split_percentage
    counts = [0, 0]
    data.mkdir(parents=True, exist_ok=True)
    with disk.written_at_once(data / "train.txt") as train, disk.written_at_once(held_out) as validation:
        for document in filter(
            None, read_documents([source], text_field=settings.text_field, split_sentences=settings.split_sentences)
        ):
            number = sum(counts)
            to_validation = int((number + 1) * part / 100) > int(number * part / 100)
            counts[to_validation] += 1
            (validation if to_validation else train).write(("\n".join(document) + "\n\n").encode())
    if not sum(counts):
        raise ValueError(f"{source} holds no text to pre-train on: {len(find_files([source]))} files, all empty")
    if 0 in counts:
        raise ValueError(
            f"{source} has {sum(counts)} documents, of which {part} percent cannot be held out: put blank lines "
            "between documents, give a validation_file, or a validation_split_percentage of 0"
        )
    texts[source] = [str(data / "train.txt")]


def _checked(
    dataset: ShardDataset, settings: PretrainSettings, vocabulary: TokenizerVocabulary, max_seq_length: int
) -> ShardDataset:
    """The shards, if a model of this vocabulary can learn the objective from them."""
    folder, options = dataset.folder, dataset.manifest["options"]
    made_with, ours = dataset.manifest["tokenizer"], vocabulary.digests()["vocabulary_sha256"]
    if made_with["vocabulary_sha256"] != ours:
        raise ValueError(
            f"{folder} was made with another tokenizer: one of {made_with['vocab_size']} tokens (digest "
            f"{made_with['vocabulary_sha256'][:12]}), this one has {vocabulary.size} ({ours[:12]})"
        )
    if settings.objective in ("nsp", "sop") and options["objective"] != settings.objective:
        raise ValueError(
            f"{folder} was made with the objective {options['objective']}, and has no pairs for {settings.objective}"
        )
    if options["max_seq_length"] > max_seq_length:
        raise ValueError(
            f"{folder} was made with max_seq_length {options['max_seq_length']}, more than {max_seq_length}"
        )
    if options["masking"] == "static" and settings.objective == "electra":
        raise ValueError(f"{folder} has static masks, and ELECTRA has its own: make the shards with dynamic masking")
    given = {name: getattr(settings, name) for name in ("scheme", "mlm_probability", "max_predictions_per_seq")}
    if options["masking"] == "static" and (named := [name for name, value in given.items() if value is not None]):
        raise ValueError(f"{folder} has static masks, which {named[0]} cannot change")
    return dataset


def _common(options: list[dict[str, Any]]) -> dict[str, Any]:
    for name in ("masking", "scheme", "mlm_probability"):
        if len(values := {each[name] for each in options}) > 1:
            raise ValueError(f"{name} differs between the phases: {', '.join(map(str, sorted(values)))}")
    return {**options[0], "max_predictions_per_seq": max(each["max_predictions_per_seq"] for each in options)}


class _PaddedMasking(MaskingCollator):
    def __call__(self, features: Any) -> dict[str, Any]:
        return padded(super().__call__(features))


class _PaddedPacking(PackingCollator):
    def __call__(self, features: Any) -> dict[str, Any]:
        return padded(super().__call__(features))


def make_collator(
    settings: PretrainSettings,
    options: dict[str, Any],
    vocabulary: TokenizerVocabulary,
    seed: int,
    max_position_embeddings: int,
) -> Callable[..., dict[str, Any]]:
    """What makes batches of shards with these options; what the settings say of masks goes before what those say.

    Args:
        settings: the run's.
        options: of the manifest.
        vocabulary: of the tokenizer.
        seed: of dynamic masks.
        max_position_embeddings: of the model.
    """
    if options["masking"] == "static":
        packing = _PaddedPacking if settings.plain else PackingCollator
        return packing(max_position_embeddings=max_position_embeddings)
    is_electra = settings.objective == "electra"
    masked, replaced = (ELECTRA_MASKED, ELECTRA_REPLACED) if is_electra else (MASKED, REPLACED)
    return (_PaddedMasking if settings.plain else MaskingCollator)(
        vocab_size=vocabulary.size,
        mask_token_id=vocabulary.ids["mask_token"],
        special_token_ids=vocabulary.special_token_ids,
        scheme=settings.scheme or options["scheme"],
        mlm_probability=settings.mlm_probability or options["mlm_probability"],
        max_predictions=settings.max_predictions_per_seq or options["max_predictions_per_seq"],
        masked=masked,
        replaced=replaced,
        seed=seed,
        max_position_embeddings=max_position_embeddings,
    )

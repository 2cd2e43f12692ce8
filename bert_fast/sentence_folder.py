"""The folder of a sentence-transformers model: how it says that its vectors are made, read and written."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bert_fast.folders import read_json
from bert_fast.ops.pooling import MODES

#: The modules that are understood, in the order they must stand.
MODULES = ("Transformer", "Pooling", "Normalize")

#: The keys of older pooling configurations, in the order in which sentence-transformers joins their vectors.
OLD_POOLING_KEYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}

#: What `write` writes.
FILES = ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json")


@dataclass(frozen=True)
class Recipe:
    """How a folder says its vectors are made.

    Attributes:
        transformer: the folder of the BERT and its tokenizer.
        pooling_modes: of `ops.pooling`; the vectors of several are joined.
        include_prompt: whether the tokens of a prompt are pooled with the rest.
        normalize: scale the vectors to length 1.
        max_seq_length: the most tokens of a text, or None where the folder does not say.
        do_lower_case: lower-case the text before the tokenizer sees it.
        prompts: texts put before every sentence, by name.
        default_prompt_name: the one used when the caller names none.
    """

    transformer: Path
    pooling_modes: tuple[str, ...] = ("mean",)
    include_prompt: bool = True
    normalize: bool = False
    max_seq_length: int | None = None
    do_lower_case: bool = False
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None

    @classmethod
    def read(cls, folder: Path) -> Recipe:
        """From a sentence-transformers folder; a plain checkpoint means the mean of its tokens, as it does there.

        Raises:
            ValueError: a module or pooling mode is unknown; the message lists those known.
        """
        if not (folder / "modules.json").is_file():
            return cls(transformer=folder)
        modules = _modules(folder)
        transformer = folder / modules["Transformer"]
        pooling = read_json(folder / modules["Pooling"] / "config.json")
        sentence = _optional_json(transformer / "sentence_bert_config.json")
        settings = _optional_json(folder / "config_sentence_transformers.json")
        return cls(
            transformer=transformer,
            pooling_modes=_pooling_modes(pooling, folder),
            include_prompt=pooling.get("include_prompt", True),
            normalize="Normalize" in modules,
            max_seq_length=sentence.get("max_seq_length"),
            do_lower_case=sentence.get("do_lower_case", False),
            prompts=settings.get("prompts") or {},
            default_prompt_name=settings.get("default_prompt_name"),
        )


def _modules(folder: Path) -> dict[str, str]:
    """The path of each module in modules.json by the last part of its type."""
    path = folder / "modules.json"
    try:
        modules = [(entry["type"], entry["path"]) for entry in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not a list of modules with a type and a path: {error!r}") from error
    for module_type, _ in modules:
        package, _, rest = module_type.partition(".")
        if package != "sentence_transformers" or rest.rpartition(".")[2] not in MODULES:
            known = ", ".join(MODULES)
            raise ValueError(f"{path} has a module {module_type}; those known are sentence_transformers' {known}")
    names = tuple(module_type.rpartition(".")[2] for module_type, _ in modules)
    if names not in (MODULES, MODULES[:2]):
        raise ValueError(f"{path} has the modules {', '.join(names)}; expected {', '.join(MODULES)}")
    return {name: place for name, (_, place) in zip(names, modules, strict=True)}


def _pooling_modes(config: dict[str, Any], folder: Path) -> tuple[str, ...]:
    """From the new key `pooling_mode` or the old ones."""
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [mode for key, mode in OLD_POOLING_KEYS.items() if config.get(key)] or ["mean"]
    modes = (modes,) if isinstance(modes, str) else tuple(modes)
    for mode in modes:
        if mode not in MODES:
            raise ValueError(f"{folder} asks for pooling {mode!r}, expected one of {', '.join(MODES)}")
    if "weightedmean" in modes and not config.get("include_prompt", True):
        raise ValueError(f"{folder} asks for pooling 'weightedmean' without the prompt, which is not supported")
    return modes


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def write(folder: Path, pooling_mode: str, dimension: int, *, normalize: bool, max_seq_length: int) -> None:
    """Put beside a checkpoint what makes its folder one of sentence-transformers, with the keys that all versions read.

    Args:
        folder: of the checkpoint, which is there.
        pooling_mode: a name of `ops.pooling.MODES`.
        dimension: of the vectors.
        normalize: scale the vectors to length 1.
        max_seq_length: the most tokens of a text.
    """
    names = MODULES if normalize else MODULES[:2]
    paths = ("", "1_Pooling", "2_Normalize")
    (folder / paths[1]).mkdir(exist_ok=True)
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{name}"}
        for index, (name, path) in enumerate(zip(names, paths, strict=False))
    ]
    pooling = {key: mode == pooling_mode for key, mode in OLD_POOLING_KEYS.items()}
    contents: tuple[Any, ...] = (
        modules,
        {"word_embedding_dimension": dimension, **pooling, "include_prompt": True},
        {"max_seq_length": max_seq_length, "do_lower_case": False},
    )
    for name, content in zip(FILES, contents, strict=True):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

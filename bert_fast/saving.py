"""Checkpoints out: folders that a crash cannot damage."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from torch import Tensor, nn

from bert_fast import families, sentence_folder
from bert_fast.config import BertConfig
from bert_fast.disk import sync
from bert_fast.folders import CONFIG_FILE
from bert_fast.loading import WEIGHT_PATTERNS, WEIGHTS_FILE, dtype_name, names_of_each
from bert_fast.sentence_embedding import BertForSentenceEmbedding


def save_pretrained(model: nn.Module, directory: str | Path) -> None:
    """Write `config.json` and `model.safetensors`, which transformers and `from_pretrained` read back.

    Of a model that makes sentence vectors also what makes the folder one of sentence-transformers.

    The folder is built beside its place and put there in one step: whatever interrupts the save leaves either the old
    folder or the new one, whole. Other files of an existing folder (the tokenizer's, say) stay; weights of another
    form do not. An interrupted save may leave a folder `.NAME.HEX.saving` beside it, which nothing reads.
    Where two folders cannot be exchanged, on some file systems or because the process works inside this one, the files
    are instead replaced one by one, each in one step.

    Args:
        model: any model of `bert_fast.modules` or `bert_fast.reference`. Tied weights are written once.
        directory: where to; made with its parents if it is not there.

    Raises:
        ValueError: `directory` is a file.
    """
    directory = Path(directory).expanduser().resolve()
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file, expected a folder")
    directory.parent.mkdir(parents=True, exist_ok=True)
    building = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}.saving")
    building.mkdir()
    try:
        if directory.is_dir():
            _copy_other_files(directory, building)
        write_files(model, building)
        for path in (building / WEIGHTS_FILE, building / CONFIG_FILE, building):
            sync(path)
        _put_in_place(building, directory)
        sync(directory.parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def write_files(model: nn.Module, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Write `config.json` and `model.safetensors` into a folder that is there.

    Args:
        model: as in `save_pretrained`; a subclass goes by the name of ours.
        folder: where to.
        state: the weights by name, where the model has only a shard of them.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = [aliases[0] for aliases in names_of_each(parameters)]
    values = parameters if state is None else state
    weights = {name: values[name].detach().cpu().contiguous() for name in names}
    ours = next(kind for kind in type(model).__mro__ if kind.__module__.startswith("bert_fast."))
    shape = cast(BertConfig, model.config)
    config = shape.to_dict()
    config.pop("torch_dtype", None)  # the older name of the same thing
    is_embedding = isinstance(model, BertForSentenceEmbedding)  # which transformers knows as the encoder that it is
    config |= {
        "architectures": [(families.model_class(shape) if is_embedding else ours).__name__],
        "dtype": dtype_name(next(iter(weights.values())).dtype),
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    write_weights(weights, folder / WEIGHTS_FILE)
    shutil.copymode(folder / CONFIG_FILE, folder / WEIGHTS_FILE)  # safetensors lets only the owner read it
    if isinstance(model, BertForSentenceEmbedding):
        settings, dimension = model.settings, shape.hidden_size
        sentence_folder.write(
            folder,
            settings.pooling_mode,
            dimension,
            normalize=settings.normalize,
            max_seq_length=settings.max_seq_length,
        )


def write_weights(weights: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file; OSError, naming it, where that fails, as on a full disk."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(weights, path, metadata={"format": "pt"})
    except SafetensorError as error:  # also for what the system says
        raise OSError(f"{path.name} cannot be written: {error}") from error


def _copy_other_files(source: Path, target: Path) -> None:
    """All of a checkpoint folder but its own config and weights; subfolders whole."""
    replaced = shutil.ignore_patterns(CONFIG_FILE, *WEIGHT_PATTERNS)

    def ignore(folder: str, names: list[str]) -> set[str]:
        return replaced(folder, names) if Path(folder) == source else set()

    shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True, copy_function=_link, ignore=ignore)


def _link(source: str, target: str) -> None:
    """A second name for the file, or a copy of it where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _put_in_place(building: Path, directory: Path) -> None:
    if not directory.is_dir():
        os.rename(building, directory)
        return
    try:
        if Path.cwd().is_relative_to(directory):
            raise OSError(errno.EBUSY, "the process works in this folder, and would be left in the one taken away")
        _exchange(building, directory)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EINVAL, errno.EXDEV, errno.EBUSY, errno.EPERM):
            raise
        for name in (WEIGHTS_FILE, *sentence_folder.FILES, CONFIG_FILE):
            if (building / name).is_file():
                (directory / name).parent.mkdir(exist_ok=True)
                os.replace(building / name, directory / name)


def _exchange(first: Path, second: Path) -> None:
    """Swap two folders in one step: Linux's renameat2 with RENAME_EXCHANGE, which Python has no name for."""
    at_fdcwd, rename_exchange = -100, 2
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        raise OSError(errno.ENOSYS, "renameat2 is not available")
    if renameat2(at_fdcwd, os.fsencode(first), at_fdcwd, os.fsencode(second), rename_exchange):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(second))

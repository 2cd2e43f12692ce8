"""Checkpoints that survive: whole or not there, whatever ends the process and whenever.

A checkpoint is written into a hidden folder beside its place; every file is synced to the disk and listed, with its
size and checksum, in `manifest.json`; then the folder is renamed. Older ones are taken away only after that, and each
under a hidden name first. So a folder named `checkpoint-N` is whole, unless the disk damaged it: the checksums show.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from bert_fast.disk import checksum, sync

MANIFEST = "manifest.json"

#: The steps so far, as transformers calls it.
STATE_FILE = "trainer_state.json"

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
#: What an interrupted save, or an interrupted pruning, leaves.
_LEFTOVER = re.compile(r"\.checkpoint-\d+\.(saving|old)")


class CheckpointError(OSError, RuntimeError):
    """A checkpoint could not be written, or is not whole."""


def step_of(folder: Path) -> int:
    """The step at which a checkpoint was saved, by its name; ValueError for another name."""
    if match := _CHECKPOINT.fullmatch(folder.name):
        return int(match[1])
    raise ValueError(f"{folder.name} is not the name of a checkpoint, such as checkpoint-500")


def listed(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, whole or not, by rising step."""
    folders = (path for path in output_dir.glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name) and path.is_dir())
    return sorted(folders, key=step_of)


def defect(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None for a whole one. Reads every byte of it."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {MANIFEST} cannot be read: {error!r}"
    for name, (size, digest) in expected.items():
        try:
            if (found := (folder / name).stat().st_size) != size:
                return f"{name} has {found} bytes, expected {size}"
            if checksum(folder / name) != digest:
                return f"the checksum of {name} is not that of the manifest"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def last_whole(output_dir: Path) -> Path | None:
    """The whole checkpoint of the highest step; None where there is no checkpoint at all.

    Those above it are put aside under a hidden name, with a warning that says which, and why.

    Raises:
        CheckpointError: there are checkpoints, but not one is whole.
    """
    damaged: list[tuple[Path, str]] = []
    for folder in reversed(listed(output_dir)):
        reason = defect(folder)
        if reason is None:
            for path, why in damaged:
                _put_aside(path, why)
            return folder
        damaged.append((folder, reason))
    if damaged:
        reasons = "; ".join(f"{path.name}: {why}" for path, why in damaged)
        raise CheckpointError(f"no checkpoint in {output_dir} is whole: {reasons}")
    return None


def chosen(folder: Path, output_dir: Path) -> Path:
    """A checkpoint that somebody named, checked.

    Raises:
        CheckpointError: it is not whole, or the output folder has later ones, which the run would mix with its own.
    """
    if not folder.is_dir():
        raise CheckpointError(f"there is no checkpoint {folder}")
    if reason := defect(folder):
        raise CheckpointError(f"{folder} is not whole: {reason}")
    others = [path for path in listed(output_dir) if not path.samefile(folder)]
    is_inside = folder.resolve().parent == output_dir.resolve()
    if later := [path.name for path in others if not is_inside or step_of(path) > step_of(folder)]:
        raise CheckpointError(f"{output_dir} has {', '.join(later)} beside {folder}: move them away first")
    return folder


def _put_aside(folder: Path, reason: str) -> None:
    aside = folder.with_name(f".{folder.name}.damaged")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    warnings.warn(f"{folder} is not whole: {reason}; it is put aside as {aside.name}", stacklevel=3)


@contextmanager
def staged(folder: Path, *, leader: bool = True, barrier: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Write a checkpoint: yields the hidden folder to write into, and puts it in its place when all is written.

    A folder in its place, which can only be a damaged checkpoint, is replaced. What fails leaves no trace.

    Args:
        folder: the checkpoint's place.
        leader: whether this process makes, lists, syncs and renames the folder; the others only write into it.
        barrier: returns when all processes have called it.

    Raises:
        CheckpointError: something could not be written; the message says what, and which checkpoint is the last whole.
    """
    staging = folder.with_name(f".{folder.name}.saving")
    try:
        if leader:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        barrier()
        yield staging
        barrier()
        if leader:
            _write_manifest(staging)
            _sync_tree(staging)
            _remove(folder)
            staging.rename(folder)
            sync(folder.parent)
        barrier()
    except (OSError, RuntimeError, SafetensorError) as error:
        if leader:
            shutil.rmtree(staging, ignore_errors=True)
        others = [path.name for path in listed(folder.parent) if path != folder]
        kept = f"{', '.join(others)} stayed as before" if others else "there is no other one"
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise CheckpointError(f"{folder.name} could not be saved in {folder.parent}: {reason}; {kept}") from error


def prune(output_dir: Path, limit: int | None, keep: Collection[Path]) -> None:
    """Take away the oldest checkpoints until `limit` are left, or those to keep; None takes none away."""
    folders = listed(output_dir)
    if not limit:
        return
    kept = {path.name for path in keep}
    surplus = len(folders) - max(limit, len(kept))
    for folder in [path for path in folders if path.name not in kept][: max(surplus, 0)]:
        _remove(folder)


def remove_leftovers(output_dir: Path) -> None:
    """Take away what interrupted saves left."""
    for path in output_dir.iterdir():
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path)


def _write_manifest(folder: Path) -> None:
    files = {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": checksum(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")


def _sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def _remove(folder: Path) -> None:
    """Delete a checkpoint, if it is there; half of one never has its name."""
    if folder.exists():
        hidden = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(hidden, ignore_errors=True)
        folder.rename(hidden)
        shutil.rmtree(hidden)

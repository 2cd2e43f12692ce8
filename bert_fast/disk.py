"""Files that are whole or not there, folders that one process has, and the checksums that show it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any, TextIO

LOCK = ".lock"


class FolderBusyError(OSError, RuntimeError):
    """Another process has the folder."""


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path: Path, progress: Callable[[int], object] = lambda num_bytes: None) -> str:
    """The SHA-256 of a file, in hexadecimal digits; `progress` is called with the bytes of each part."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()


@contextmanager
def written_at_once(path: Path) -> Iterator[IO[Any]]:
    """A file that takes the place of `path` when the block ends well, and leaves nothing when it does not."""
    path = path.resolve()  # a link stays one
    writing = path.with_name(f".{path.name}.{uuid.uuid4().hex}.writing")
    try:
        with open(writing, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(writing, path)
    finally:
        writing.unlink(missing_ok=True)


@contextmanager
def text_written_at_once(path: Path) -> Iterator[TextIO]:
    """The same, for text."""
    with written_at_once(path) as file:
        text = TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
        yield text
        text.detach()


def write_json(path: Path, value: Any) -> None:
    """Write a file of JSON that people can read, at once; it is on the disk when this returns."""
    with text_written_at_once(path) as file:
        file.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    sync(path.parent)


def point(link: Path, target: Path) -> None:
    """Let a symbolic link lead to something below the folder it is in, from one moment to the next."""
    staging = link.with_name(f".{link.name}.saving")
    staging.unlink(missing_ok=True)
    staging.symlink_to(target.relative_to(link.parent))
    os.replace(staging, link)


@contextmanager
def locked(output_dir: Path, patience: float = 20.0) -> Iterator[None]:
    """Keep other runs out of a folder, until the end or the death of this process.

    Args:
        output_dir: made if it is not there.
        patience: seconds to wait for the children of a holder that is dead: they inherit the lock.

    Raises:
        FolderBusyError: another run has the folder; the message names its process.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(output_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                holder = os.pread(descriptor, 200, 0).decode(errors="replace")
                if _is_alive(holder) or time.monotonic() > deadline:
                    raise FolderBusyError(
                        f"another run has {output_dir} ({holder or 'of an unknown process'}); "
                        "end it, or choose another output_dir"
                    ) from None
                time.sleep(0.2)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # of the children too, who may outlive the run: a DataLoader's workers
        os.close(descriptor)


def _is_alive(holder: str) -> bool:
    """Whether the process that a lock names runs; one on another machine is taken to."""
    match = re.fullmatch(r"process (\d+) on (.*)", holder)
    if match is None:
        return False
    return match[2] != socket.gethostname() or Path(f"/proc/{match[1]}").exists()

"""Pre-training data as the trainer takes it: shards on the disk, any instance by its number, in constant memory."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

#: What a finished folder has beside its shards; while it is made there is none.
MANIFEST = "manifest.json"
FORMAT = "bert_fast pre-training data 1"


class _Batch(NamedTuple):
    """The columns of a record batch: values per token and where they begin, and values per instance."""

    starts: NDArray[np.int32]
    per_token: dict[str, NDArray[Any]]
    per_instance: dict[str, NDArray[Any]]


class ShardDataset:
    """The instances that `bert-fast data pretrain` made.

    Its shards are Arrow IPC files, mapped into memory: opening reads none of them, and an instance its own pages.
    It can be pickled, and given to the workers of a `DataLoader`.

    Args:
        folder: what the command was given as `--output`.

    Attributes:
        manifest: what `manifest.json` says: `options`, among them `objective` ("nsp", "sop" or "none"), `masking`
            ("static" or "dynamic") and `scheme`; `tokenizer` with its digests and ids; `statistics`.

    Raises:
        ValueError: the folder holds no such data, or is not finished, or a shard is missing or has another size.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        for entry in self.manifest["shards"]:
            path = self.folder / entry["file"]
            if not path.is_file() or path.stat().st_size != entry["size"]:
                found = f"has {path.stat().st_size} bytes, expected {entry['size']}" if path.is_file() else "is missing"
                raise ValueError(f"{path} {found}: make the data anew")
        counts = [entry["num_instances"] for entry in self.manifest["shards"]]
        self._ends = np.cumsum(counts, dtype=np.int64)
        self._shards: list[list[_Batch] | None] = [None] * len(counts)

    def __reduce__(self) -> tuple[type[ShardDataset], tuple[Path]]:
        return ShardDataset, (self.folder,)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """An instance.

        Returns:
            input_ids, token_type_ids (num_tokens,), integers; `next_sentence_label`, an int, 0 where the second segment
            follows the first one and 1 where it does not (NSP) or comes before it (SOP); if the masks are static,
            `labels` (num_tokens,), -100 where nothing is to be predicted; if they are dynamic, `word_ids`
            (num_tokens,), -1 for [CLS] and [SEP].

        Raises:
            IndexError: there is none of that number.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"instance {index} of {len(self)}")
        index %= len(self)
        number = int(np.searchsorted(self._ends, index, side="right"))
        place, row = divmod(index - (int(self._ends[number - 1]) if number else 0), self.manifest["batch_size"])
        batch = self._batches(number)[place]
        start, stop = batch.starts[row], batch.starts[row + 1]
        return {
            **{name: values[start:stop] for name, values in batch.per_token.items()},
            **{name: int(values[row]) for name, values in batch.per_instance.items()},
        }

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """(num_instances,) tokens of each instance, [CLS] and [SEP] included."""
        shards = (self._batches(number) for number in range(len(self._shards)))
        return np.concatenate([np.diff(batch.starts) for shard in shards for batch in shard])

    def _batches(self, number: int) -> list[_Batch]:
        """Those of a shard. Its file is closed, as thousands of shards would be too many open ones; the map stays."""
        batches = self._shards[number]
        if batches is None:
            import pyarrow as pa

            with pa.memory_map(str(self.folder / self.manifest["shards"][number]["file"])) as file:
                reader = pa.ipc.open_file(file)
                batches = [_columns(reader.get_batch(place)) for place in range(reader.num_record_batches)]
            self._shards[number] = batches
        return batches


def read_manifest(folder: Path) -> dict[str, Any]:
    """`manifest.json` of a finished folder; ValueError for anything else."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} holds no finished pre-training data: it has no {MANIFEST}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{path} is not of {FORMAT}")
    return manifest


def _columns(batch: Any) -> _Batch:
    """Views of what is mapped; nothing is read."""
    per_token, per_instance = {}, {}
    starts = np.zeros(1, np.int32)
    for name in batch.schema.names:
        column = batch.column(name)
        if hasattr(column, "offsets"):
            starts = column.offsets.to_numpy(zero_copy_only=True)
            per_token[name] = column.values.to_numpy(zero_copy_only=True)
        else:
            per_instance[name] = column.to_numpy(zero_copy_only=True)
    return _Batch(starts, per_token, per_instance)

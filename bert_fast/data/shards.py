"""Text -> shards for pre-training: in constant memory, in several processes, to the same bytes whatever interrupts it.

The text is tokenized into files beside the shards (`corpus.py`), and a shard is made of a range of documents and a
duplicate (`instances.py`). Every file appears whole, under its name, or not at all. What a run is to make is written
down first, with the digests of the text and the tokenizer, and compared by a later run before it goes on.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bert_fast import disk
from bert_fast.data.corpus import Corpus, write_corpus
from bert_fast.data.encoding import TOKENIZER, Encoder, TokenizerVocabulary
from bert_fast.data.instances import BATCH, Instances, Maker, Options
from bert_fast.data.pretraining import FORMAT, MANIFEST, read_manifest
from bert_fast.data.text import find_files, read_sentences
from bert_fast.data.workers import map_in_order
from bert_fast.ladder import read_names
from bert_fast.terminal import progress_bar

#: What is made on the way, and taken away at the end.
BUILDING = ".building"
PLAN = "plan.json"

#: Bytes of text that are worth the second that it takes to start a process.
BYTES_PER_WORKER = 1 << 21

#: What `ENOSPC` and its kin mean to whoever waits for the data.
_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


class Shard(NamedTuple):
    """Documents `first` to `last - 1` in one duplicate."""

    number: int
    dupe: int
    first: int
    last: int

    @property
    def name(self) -> str:
        """Of its file."""
        return f"shard-{self.number:05d}.arrow"


def build(
    inputs: Sequence[str | Path],
    tokenizer: str,
    output: str | Path,
    options: Options,
    *,
    entities: str | Path | None = None,
    num_workers: int | None = None,
) -> dict[str, Any]:
    """Make a folder of shards, which `ShardDataset` reads, or go on where that was interrupted.

    Args:
        inputs: files and folders of text.
        tokenizer: a model: a folder, a Hub id, or `demo`.
        output: the folder.
        options: what is made.
        entities: a file of names, as `ladder.read_names` takes it, whose tokens are hidden together; for the schemes
            that go by words.
        num_workers: processes; if it is not given as many as there are processors, fewer for little text. The data do
            not depend on it. They are started afresh, so that a script has to be under `if __name__ == "__main__":`.

    Returns:
        The manifest, as `ShardDataset.manifest` has it.

    Raises:
        ValueError: there is no text, a line cannot be read, options do not go together, or the folder holds something
            else or was begun with another text or other options; the message says what.
        OSError: a file cannot be read or written. What is finished stays.
    """
    if entities is not None and not options.marks_words:
        raise ValueError("entities are given, which static masks of the scheme subword do not ask for")
    if options.scheme == "entity" and entities is None:
        raise ValueError("the scheme entity needs a file of entities")
    if num_workers is not None and num_workers < 1:
        raise ValueError(f"num_workers is {num_workers}, expected at least 1")
    files, vocabulary, folder = find_files(inputs), TokenizerVocabulary.read(tokenizer), Path(output)
    worth = 1 + sum(path.stat().st_size for path in files) // BYTES_PER_WORKER
    workers = num_workers or min(len(os.sched_getaffinity(0)), worth)
    names = () if entities is None else tuple(read_names(entities))
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, expected a folder")
    for given in map(Path, inputs):
        if given.is_dir() and folder.resolve().is_relative_to(given.resolve()):
            raise ValueError(f"{folder} is in {given}, whose files are the text; choose a folder elsewhere")
    with _explained(folder), disk.locked(folder):
        plan = {
            "format": FORMAT,
            "options": asdict(options),
            "inputs": _fingerprints(files),
            "entities": None if entities is None else disk.checksum(Path(entities)),
            "tokenizer": {**vocabulary.digests(), "vocab_size": vocabulary.size, "ids": vocabulary.ids},
        }
        if (folder / MANIFEST).is_file():
            manifest = read_manifest(folder)
            _compare(folder, manifest, plan)
        else:
            building = _begin(folder, plan, vocabulary)
            encoder = partial(Encoder, vocabulary, words=options.words, entities=names, marked=options.marks_words)
            try:
                _tokenize(building, files, encoder, vocabulary.ids["unk_token"], options, workers)
            except ValueError:  # the text has to change, and then nothing of this is of use
                (folder / TOKENIZER).unlink()
                shutil.rmtree(building)
                raise
            manifest = _finish(folder, plan, _make(folder, options, vocabulary, workers))
        _tidy(folder)
        return manifest


def write_shard(maker: Maker, folder: Path, shard: Shard) -> dict[str, Any]:
    """Write a shard and, when it is there, what is in it; returns the latter."""
    import pyarrow as pa

    path = folder / shard.name
    counts = {"num_instances": 0, "num_tokens": 0, "num_predictions": 0, "num_label_1": 0}
    with _explained(folder):
        with disk.written_at_once(path) as file:
            writer = None
            for columns in maker.columns(shard.dupe, shard.first, shard.last):
                batch = _record_batch(columns)
                writer = pa.ipc.new_file(file, batch.schema) if writer is None else writer
                writer.write_batch(batch)
                counts["num_instances"] += len(columns.lengths)
                counts["num_tokens"] += int(columns.lengths.sum())
                if "labels" in columns.per_token:
                    counts["num_predictions"] += int((columns.per_token["labels"] >= 0).sum())
                if "next_sentence_label" in columns.per_instance:
                    counts["num_label_1"] += int(columns.per_instance["next_sentence_label"].sum())
            if writer is not None:
                writer.close()
        entry = {"file": shard.name, "size": path.stat().st_size, "sha256": disk.checksum(path), **counts}
        disk.sync(folder)
        disk.write_json(_entry_file(folder, shard), entry)
        return entry


def _record_batch(columns: Instances) -> Any:
    import pyarrow as pa

    starts = np.concatenate([[0], columns.lengths.cumsum()]).astype(np.int32)
    arrays = {name: pa.ListArray.from_arrays(starts, values) for name, values in columns.per_token.items()}
    return pa.RecordBatch.from_pydict(arrays | {name: pa.array(v) for name, v in columns.per_instance.items()})


def _begin(folder: Path, plan: dict[str, Any], vocabulary: TokenizerVocabulary) -> Path:
    """The folder of what is made on the way, with the plan in it: this one, or the same one of an earlier run."""
    building = folder / BUILDING
    if (building / PLAN).is_file():
        _compare(folder, json.loads((building / PLAN).read_text(encoding="utf-8")), plan)
    elif others := sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")):
        raise ValueError(f"{folder} holds {others[0]}, and no pre-training data; choose another folder")
    else:
        shutil.rmtree(building, ignore_errors=True)  # of a run that ended before its plan was there, or while tidying
        building.mkdir()
        disk.write_json(building / PLAN, plan)
    with disk.written_at_once(folder / TOKENIZER) as file:  # after the plan, without which it would be a stranger's
        file.write(vocabulary.text.encode())
    return building


def _tokenize(
    building: Path, files: Sequence[Path], encoder: Callable[[], Encoder], unknown: int, options: Options, workers: int
) -> None:
    """All text; ValueError if there is too little of it."""
    read = partial(read_sentences, text_field=options.text_field, split_sentences=options.split_sentences)
    sentences = (sentence for path in files for sentence in read(path))
    writing = write_corpus(building, sentences, encoder, unknown, num_workers=workers, part=options.shard_tokens)
    with progress_bar(what="tokenising", unit=" sentences", unit_scale=True) as bar, closing(writing) as counts:
        for count in counts:
            bar.update(count)
    found = len(Corpus(building))
    if not found:
        raise ValueError(f"there is no text in {', '.join(map(str, files[:3]))}{' ...' if len(files) > 3 else ''}")
    if found == 1 and options.objective == "nsp":
        raise ValueError(
            "the text is one document, and next-sentence prediction (nsp) has no other one to draw a random sentence "
            "from: put a blank line between documents, or choose the objective sop or none"
        )


def _make(folder: Path, options: Options, vocabulary: TokenizerVocabulary, workers: int) -> list[dict[str, Any]]:
    """All shards that are not there yet; what is in each, in order."""
    corpus = Corpus(folder / BUILDING)
    parts = corpus.parts(options.shard_tokens)
    shards = [
        Shard(dupe * len(parts) + number, dupe, first, last)
        for dupe in range(options.dupe_factor)
        for number, (first, last) in enumerate(parts)
    ]
    entries = {shard: _entry(folder, shard) for shard in shards}
    missing = [shard for shard, entry in entries.items() if entry is None]
    maker = partial(Maker, folder / BUILDING, options, vocabulary)
    total = options.dupe_factor * corpus.counts.tokens
    with progress_bar(total=total, what="making shards", unit=" tokens", unit_scale=True) as bar:
        bar.update(sum(corpus.num_tokens(shard.first, shard.last) for shard in shards if entries[shard]))
        work = partial(_write_shard, folder)
        try:
            with closing(map_in_order(work, missing, min(workers, max(len(missing), 1)), maker)) as made:
                for shard, entry in made:
                    entries[shard] = entry
                    bar.update(corpus.num_tokens(shard.first, shard.last))
        finally:
            _remove_unfinished(folder)
    return [entry for entry in entries.values() if entry is not None]


def _write_shard(folder: Path, maker: Maker, shard: Shard) -> dict[str, Any]:
    return write_shard(maker, folder, shard)


def _finish(folder: Path, plan: dict[str, Any], entries: list[dict[str, Any]]) -> dict[str, Any]:
    counts = asdict(Corpus(folder / BUILDING).counts)
    counts = {name: counts[name] for name in sorted(counts.keys() - {"events", "finished"})}
    for name in ("num_instances", "num_tokens", "num_predictions", "num_label_1"):
        counts[name] = sum(entry[name] for entry in entries)
    manifest = {**plan, "statistics": counts, "batch_size": BATCH, "shards": entries}
    disk.write_json(folder / MANIFEST, manifest)
    return manifest


def _tidy(folder: Path) -> None:
    """Take away what is not needed any more, of this run and of interrupted ones."""
    shutil.rmtree(folder / BUILDING, ignore_errors=True)
    _remove_unfinished(folder)


def _remove_unfinished(folder: Path) -> None:
    """What processes left that ended while they wrote."""
    for path in folder.glob(".*.writing"):
        path.unlink(missing_ok=True)


def _fingerprints(files: Sequence[Path]) -> list[dict[str, Any]]:
    size = sum(path.stat().st_size for path in files)
    with progress_bar(total=size, what="checking the text", unit="B", unit_scale=True) as bar:
        return [
            {"file": str(path), "size": path.stat().st_size, "sha256": disk.checksum(path, bar.update)}
            for path in files
        ]


def _compare(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """ValueError that says in what two plans differ, if they do; names of files may."""
    pairs = [(name, before["options"].get(name), value) for name, value in now["options"].items()]
    changed = [f"{name} was {old!r} and is {new!r}" for name, old, new in pairs if old != new]
    old, new = ([(entry["size"], entry["sha256"]) for entry in plan["inputs"]] for plan in (before, now))
    if old != new:
        files = [entry["file"] for entry, size in zip(now["inputs"], new, strict=True) if size not in old]
        changed.append(f"the text changed{f' in {files[0]}' if files else ', by its files or their order'}")
    changed += [f"the {name} changed" for name in ("tokenizer", "entities") if before[name] != now[name]]
    if changed:
        raise ValueError(
            f"{folder} was begun with something else: {'; '.join(changed)}. Choose another folder, or delete this one"
        )


def _entry_file(folder: Path, shard: Shard) -> Path:
    return folder / BUILDING / f"{shard.name}.json"


def _entry(folder: Path, shard: Shard) -> dict[str, Any] | None:
    """What is in a finished shard; None for one that is not."""
    file, path = _entry_file(folder, shard), folder / shard.name
    if not file.is_file() or not path.is_file():
        return None
    entry = json.loads(file.read_text(encoding="utf-8"))
    return entry if path.stat().st_size == entry["size"] else None


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Says of a full disk what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL or error.filename == str(folder):
            raise
        advice = "what is finished stays, and the same command goes on from there"
        raise OSError(error.errno, f"{os.strerror(error.errno)}; {advice}", str(folder)) from error

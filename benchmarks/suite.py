"""What `benchmarks.run` measures: each function times its contenders, a process each, and gives rows."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter

import torch

from benchmarks.cases import MODELS, SWEEP, SWEEP_MODEL, ModelCases, build_model
from benchmarks.peak import Peak, best
from benchmarks.peers import BASELINE, SUBJECT, Peer
from benchmarks.processes import compare_workers, workers
from bert_fast.benchmarking import Row, Work, check_lengths, measured_row, parse_case
from bert_fast.folders import DEMO
from bert_fast.timing import MAX_ERROR, using_threads

#: Largest relative error of a contender. The peers decide for themselves what they round, and bert_fast's int8 is
#: rounded as theirs: the bounds tell a wrong model from a coarse one.
MAX_PEER_ERROR = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 5e-2, "int8": 1.0}
MAX_OWN_ERROR = {**MAX_ERROR, "int8": 0.1}


@dataclass(frozen=True)
class Settings:
    """What all rows of a run share; `repeats` is the samples of each contender."""

    machine: Peak
    threads: int
    repeats: int
    dtypes: Sequence[str]
    peers: Sequence[Peer]
    device: str = "cpu"


def bench_encoder(settings: Settings, model: ModelCases, cases: Sequence[str]) -> Iterator[Row]:
    """Forward passes of a model over these batches, in every precision, all against transformers' float32 answer.

    Raises:
        WrongAnswerError: an answer is too far from that.
        WorkerError: a contender failed.
        ValueError: a case is unknown or too long for the model.
    """
    batches = [parse_case(text) for text in cases]
    exact = build_model(model.source).to(settings.device)
    check_lengths(batches, model.title, exact.config.max_position_embeddings)
    for dtype in settings.dtypes:
        contenders = [
            contender
            for contender in (BASELINE, *settings.peers, SUBJECT)
            if dtype in contender.precisions(settings.device)
        ]
        print(f"timing {model.title} in {dtype}: {', '.join(c.name for c in contenders)}", file=sys.stderr)
        specs = {contender.name: contender.spec(model.source, dtype, settings.device) for contender in contenders}
        max_error = {name: (MAX_OWN_ERROR if name == SUBJECT.name else MAX_PEER_ERROR)[dtype] for name in specs}
        with workers(specs, settings.threads, settings.device) as started:
            for case in batches:
                inputs = case.inputs(exact.config.vocab_size, settings.device)
                with using_threads(settings.threads), torch.inference_mode():
                    expected = exact(**inputs).last_hidden_state.cpu()
                timings, memory = compare_workers(
                    started,
                    inputs,
                    settings.repeats,
                    max_error=max_error,
                    expected=expected,
                    part=itemgetter(inputs["attention_mask"].bool().cpu()),  # what stands in padding is nobody's answer
                )
                work = Work.of_case(case, exact.config, model=model.title, dtype=dtype)
                yield measured_row(timings, work, peak_gops=best(settings.machine, dtype), memory=memory)


def bench_sweep(settings: Settings) -> Iterator[Row]:
    """Throughput over the number of texts and their length; without what compiles each shape anew."""
    cases = list(dict.fromkeys(case for series in SWEEP.values() for case in series))
    peers = [peer for peer in settings.peers if not peer.compiles_shapes]
    few = Settings(
        settings.machine, settings.threads, min(settings.repeats, 3), settings.dtypes, peers, settings.device
    )
    return bench_encoder(few, MODELS[SWEEP_MODEL], cases)


def bench_strings(settings: Settings, count: int, optimum_python: str) -> list[Row]:
    """`encode` of `count` texts by sentence-transformers and by bert_fast: a row for each precision of the latter.

    Each has its own tokenizer and order of batches. `padded_tokens` is what sentence-transformers computes, which sorts
    the texts by length. All contenders are timed in the same rounds.
    """
    from benchmarks.peers.strings import BATCH_SIZE, specs, texts
    from bert_fast import Embedder

    given = texts(count)
    embedder = Embedder(DEMO, device="cpu")
    lengths = sorted(embedder.tokenizer(given, embedder.max_seq_length).lengths.tolist(), reverse=True)
    padded = sum(len(batch) * batch[0] for batch in (lengths[i : i + BATCH_SIZE] for i in range(0, count, BATCH_SIZE)))
    dtypes = [dtype for dtype in settings.dtypes if dtype in SUBJECT.cpu]
    peers, ours = specs(DEMO, dtypes, optimum_python)
    print(f"timing encode of {count} texts: {', '.join((*peers, *ours))}", file=sys.stderr)
    with workers({**peers, **ours}, settings.threads) as started:
        max_error = {name: MAX_OWN_ERROR[name] if name in ours else MAX_PEER_ERROR["float32"] for name in started}
        timings, memory = compare_workers(started, given, settings.repeats, max_error=max_error)
    rows = []
    for dtype in dtypes:
        names = {**{name: name for name in peers}, SUBJECT.name: dtype}
        work = Work.of(
            lengths,
            embedder.model.config,
            model=MODELS["minilm"].title,
            case=f"{count} texts",
            dtype=dtype,
            padded_tokens=padded,
        )
        rows.append(
            measured_row(
                {name: timings[key] for name, key in names.items()},
                work,
                peak_gops=best(settings.machine, dtype),
                memory={name: memory[key] for name, key in names.items()},
            )
        )
    return rows

"""What `benchmarks.run` measures: each function times its contenders, a process each, and gives rows."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import itemgetter
from typing import Any

import torch

from benchmarks import kernels
from benchmarks.budget import Budget
from benchmarks.cases import MODELS, SWEEP, SWEEP_MODEL, KernelCase, ModelCases, Workload, build_model
from benchmarks.peak import Peak, best
from benchmarks.peers import BASELINE, PEERS, SUBJECT, Peer
from benchmarks.processes import Crew, WorkerError, compare_workers, workers
from bert_fast.benchmarking import Cost, Row, Work, check_lengths, measured_row, parse_case
from bert_fast.folders import DEMO
from bert_fast.timing import MAX_ERROR, Timing, WrongAnswerError, using_threads

#: Largest relative error of a contender. The peers decide for themselves what they round, and bert_fast's int8 is
#: rounded as theirs: the bounds tell a wrong model from a coarse one.
MAX_PEER_ERROR = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 5e-2, "int8": 1.0, "float8_e4m3fn": 5e-2}
MAX_OWN_ERROR = {**MAX_ERROR, "int8": 0.1, "float8_e4m3fn": 0.25}


@dataclass(frozen=True)
class Settings:
    """What all rows of a run share.

    Attributes:
        repeats: samples of each contender.
        budget: no row is begun when it is spent, and none ended.
        left_out: gets a sentence for everything that was to be measured and was not.
    """

    machine: Peak
    threads: int
    repeats: int
    dtypes: Sequence[str]
    peers: Sequence[Peer]
    device: str = "cpu"
    budget: Budget = field(default_factory=Budget)
    left_out: list[str] = field(default_factory=list)


def measure(
    settings: Settings, crew: Crew, label: str, arguments: Any, names: Sequence[str] | None = None, **options: Any
) -> tuple[dict[str, Timing], dict[str, Cost]] | None:
    """`compare_workers` of a crew, or of these of it; a contender that fails, or is wrong, costs its own figures only.

    A peer that fails is ended. bert_fast is started anew, unless it cannot be built; then it is no longer of the crew.
    None, with the reason in `settings.left_out`, when it or the time is missing.
    """
    while settings.budget.left > 0:
        try:
            started = crew.ready()
            chosen = {name: worker for name, worker in started.items() if names is None or name in names}
            return compare_workers(chosen, arguments, settings.repeats, **options)
        except (WorkerError, WrongAnswerError) as error:
            note(settings, f"{label}: {error}")
            if error.contender != SUBJECT.name:
                crew.end(error.contender)
                continue
            if isinstance(error, WorkerError):
                crew.end(error.contender, again=error.request != "build")
            return None
    note(settings, f"{label}: no time was left")
    return None


def note(settings: Settings, sentence: str) -> None:
    """Say at once what is not measured, and keep it; of a traceback its end."""
    first, *lines = (line.strip() for line in sentence.splitlines() if line.strip())
    settings.left_out.append(" ".join([first, *lines[-1:]]))
    print(f"left out: {sentence}", file=sys.stderr)


def bench_encoder(settings: Settings, model: ModelCases, cases: Sequence[str]) -> Iterator[Row]:
    """Forward passes of a model over these batches, in every precision, all against transformers' float32 answer.

    Raises:
        ValueError: a case is unknown or too long for the model.
    """
    batches = [parse_case(text) for text in cases]
    for dtype in settings.dtypes:
        if settings.budget.left == 0:
            note(settings, f"{model.title} {dtype}, {' '.join(cases)}: no time was left")
            continue
        contenders = [
            contender
            for contender in (BASELINE, *settings.peers, SUBJECT)
            if dtype in contender.precisions(settings.device)
        ]
        print(f"timing {model.title} in {dtype}: {', '.join(c.name for c in contenders)}", file=sys.stderr)
        specs = {contender.name: contender.spec(model.source, dtype, settings.device) for contender in contenders}
        max_error = {name: (MAX_OWN_ERROR if name == SUBJECT.name else MAX_PEER_ERROR)[dtype] for name in specs}
        with Crew(specs, settings.threads, settings.device, settings.budget) as crew:
            exact = build_model(model.source).to(settings.device)  # meanwhile the others build theirs
            check_lengths(batches, model.title, exact.config.max_position_embeddings)
            for case in batches:
                if SUBJECT.name not in crew.specs:
                    break
                inputs = case.inputs(exact.config.vocab_size)
                real = itemgetter(inputs["attention_mask"].bool())  # what stands in padding is nobody's answer
                with using_threads(settings.threads), torch.inference_mode():
                    on_device = {name: tensor.to(settings.device) for name, tensor in inputs.items()}
                    expected = real(exact(**on_device).last_hidden_state).cpu()
                measured = measure(
                    settings,
                    crew,
                    f"{model.title} {case.name} {dtype}",
                    inputs,
                    max_error=max_error,
                    expected=expected,
                    part=real,
                )
                if measured:
                    work = Work.of_case(case, exact.config, model=model.title, dtype=dtype)
                    timings, costs = measured
                    yield measured_row(timings, work, peak_gops=best(settings.machine, dtype), costs=costs)


def bench_workloads(settings: Settings, workloads: Sequence[Workload]) -> Iterator[Row]:
    """Forward passes of each workload, in its precision."""
    for workload in workloads:
        yield from bench_encoder(replace(settings, dtypes=[workload.dtype]), MODELS[workload.model], workload.cases)


def bench_kernels(settings: Settings, cases: Sequence[KernelCase]) -> Iterator[Row]:
    """Kernels alone, against PyTorch's own, all against the definition in float32; `model` of a row is the op."""
    has_varlen = settings.device == "cuda" and not PEERS["varlen_attn"].missing()
    crew = Crew(kernels.specs(settings.device, has_varlen), settings.threads, settings.device, settings.budget)
    with crew:
        for case in cases:
            if SUBJECT.name not in crew.specs:
                break
            with torch.inference_mode():
                expected = kernels.truth(case, settings.device)
            measured = measure(
                settings,
                crew,
                f"{case.op} {case.name} {case.dtype}",
                case,
                kernels.contenders(case, list(crew.specs)),
                max_error=MAX_ERROR[case.dtype],
                expected=expected,
                part=partial(kernels.sample, case),
            )
            if measured:
                timings, costs = measured
                yield measured_row(
                    timings, kernels.work(case), peak_gops=best(settings.machine, case.dtype), costs=costs
                )


def bench_sweep(settings: Settings) -> Iterator[Row]:
    """Throughput over the number of texts and their length; without what compiles each shape anew."""
    cases = list(dict.fromkeys(case for series in SWEEP.values() for case in series))
    peers = [peer for peer in settings.peers if not peer.compiles_shapes]
    few = replace(settings, repeats=min(settings.repeats, 3), peers=peers)
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
        timings, costs = compare_workers(started, given, settings.repeats, max_error=max_error)
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
                costs={name: costs[key] for name, key in names.items()},
            )
        )
    return rows

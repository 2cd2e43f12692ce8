"""Training, timed: whole steps of bert_fast beside transformers', a process for each, in interleaved rounds.

    python -m benchmarks.train [--threads N] [--repeats N] [--contenders NAME ...] [--cases N ...]
                               [--device cuda] [--seconds N] [--compile-seconds N]
    python -m benchmarks.train --profile [NAME]

A step is forward, backward, clipping, AdamW (fused) and freeing the gradients, with dropout. The texts are the same for
all, in transformers as its default collator pads them, and sorted by length first (`group_by_length`). Loss and norm
of the gradient of the first batch, without dropout, are compared with transformers' in float32 before anything is
timed. Into `benchmarks/results/<device>/train.json`, with its tables next to it, after every case.

torch.compile is timed only where it is faster than without, which a first sample tells.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from benchmarks import peak, report, run, targets
from benchmarks.budget import Budget
from benchmarks.cases import GPU_TRAINING, MODELS, QUICK_TRAINING, TRAINING, TrainCase
from benchmarks.peak import best
from benchmarks.processes import ROOT, Crew, WorkerError
from benchmarks.steps import Steps
from benchmarks.suite import Settings, measure, note
from benchmarks.tables import TrainMeasured, TrainRow
from benchmarks.training import (
    BASELINE,
    DEFAULT_TRAINEES,
    SUBJECT,
    TRAINEES,
    Relative,
    Request,
    Training,
    TrainingWorker,
    config_of,
)
from bert_fast.benchmarking import Cost
from bert_fast.timing import Timing, WrongAnswerError, using_threads

#: Largest root mean square of the relative errors of loss and norm of the gradient, against transformers in float32.
MAX_TRAINING_ERROR = {"float32": 1e-4, "bfloat16": 5e-2}

#: Seconds that torch.compile may take in all, of a run of ten minutes. What it compiled stays in its cache.
COMPILE_SECONDS = 60.0


def main() -> None:
    """Measure what the command line asks for."""
    options = _options()
    if options.profile:
        with using_threads(options.threads):
            for case in cases_of(options):
                print(profile(case, options.profile, options.device))
        return
    load_before = list(os.getloadavg())
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    budget = Budget(options.seconds)
    on_gpu = options.device == "cuda"
    machine = peak.measure_cuda() if on_gpu else peak.measure_cpu(options.threads, options.quick)
    settings = Settings(machine, options.threads, options.repeats, (), (), options.device, budget)
    compiling = replace(settings, left_out=[])  # that torch.compile is slower is nobody's failure
    head, dirty = run.commit()
    device = torch.cuda.get_device_name() if on_gpu else run.cpu_name()
    result: report.Result = {
        "command": run.shown("benchmarks.train", sys.argv[1:]),
        "date": date,
        "commit": head,
        "dirty": dirty,
        "device": device,
        "threads": options.threads,
        "versions": run.versions([]),
        "load_average": {"before": load_before, "after": load_before},
        "peak": machine,
        "rows": [],
        "sweep": [],
        "strings": [],
        "train": [],
        "left_out": [],
    }
    folder = run.slug(device if on_gpu else f"{device} {options.threads} threads")
    output = options.output or ROOT / "benchmarks" / "results" / folder / "train.json"
    try:
        for row in bench_training(settings, compiling, cases_of(options), options.contenders, options.compile_seconds):
            result["train"].append(row)
            result["load_average"]["after"] = list(os.getloadavg())
            result["left_out"] = [*settings.left_out, *compiling.left_out]
            report.write(result, output)
    except (KeyboardInterrupt, WorkerError, WrongAnswerError) as error:
        note(settings, f"the rest: {str(error) or 'interrupted'}")
    result["left_out"] = [*settings.left_out, *compiling.left_out]
    if not result["train"]:
        raise SystemExit("nothing was measured, and nothing is written")
    report.save(result, output)
    print(report.tables(result))
    if not on_gpu:
        print(f"\n{targets.table(targets.judge({'train': result}, targets.CPU_TRAINING))}")
    print(f"written: {output}", file=sys.stderr)
    if settings.left_out:
        raise SystemExit(f"{len(settings.left_out)} left out, see above")


def bench_training(
    settings: Settings,
    compiling: Settings,
    cases: Sequence[TrainCase],
    names: Sequence[str],
    compile_seconds: float,
) -> Iterator[TrainRow]:
    """Steps of each case by these contenders, all compared with transformers in float32.

    Args:
        settings: of the run.
        compiling: the same, with its own list of what torch.compile leaves out.
        cases, names: what to train, and by whom.
        compile_seconds: that torch.compile may take in all.
    """
    trainees = {name: trainee for name, trainee in TRAINEES[settings.device].items() if name in names}
    specs = {name: trainee.spec(settings.device) for name, trainee in trainees.items()}
    max_error = {name: MAX_TRAINING_ERROR[trainee.dtype] for name, trainee in trainees.items()}
    with Crew({}, settings.threads, settings.device, settings.budget, TrainingWorker) as crew:
        for case in cases:
            config = config_of(case)
            steps = Steps.of(case, config.vocab_size)
            same = steps.computed_tokens("grouped") == steps.computed_tokens("padded")  # no padding, nothing to group
            wanted = [name for name, trainee in trainees.items() if not (same and trainee.layout == "grouped")]
            crew.specs = {name: specs[name] for name in wanted}  # one that failed in the case before begins anew
            label = f"{MODELS[case.model].title} {case.task} {case.batch}"
            print(f"timing {label}: {', '.join(wanted)}", file=sys.stderr)
            try:
                compile_seconds -= drop_slower_compiled(compiling, crew, steps, label, compile_seconds)
                baseline = cast(TrainingWorker, crew.ready()[BASELINE])
                baseline.give(steps)
                relative = Relative(baseline.exact())
            except WorkerError as error:
                note(settings, f"{label}: {error}")
                crew.end(error.contender)
                continue
            measured = measure(
                settings, crew, label, steps, wanted, max_error=max_error, part=relative, expected=relative.right
            )
            if measured:
                yield trained_row(*measured, steps, settings)


def drop_slower_compiled(settings: Settings, crew: Crew, steps: Steps, label: str, seconds: float) -> float:
    """End the compiled contenders that do not compile in time, or are then slower than the same one uncompiled.

    Returns:
        The seconds that this took.
    """
    began = time.monotonic()
    trainees = TRAINEES[settings.device]
    for name in [name for name in crew.specs if trainees[name].compiled]:
        (plain,) = (
            t.name for t in trainees.values() if t.model == "transformers" and t.layout == trainees[name].layout
        )
        left = min(began + seconds - time.monotonic(), settings.budget.left)
        if left <= 0:
            note(settings, f"{label}: {name}: no time was left to compile")
            crew.end(name)
            continue
        worker = crew.ready()[name]
        try:
            with worker.within(Budget(left)):
                worker.give(steps)
                worker.warm_up(0)
                milliseconds = 1e3 * worker.sample() / steps.case.steps
        except WorkerError as error:
            note(settings, f"{label}: {error}")
            crew.end(name)
            continue
        if plain not in crew.specs:
            continue
        other = crew.ready()[plain]
        other.give(steps)
        other.warm_up(0)
        without = 1e3 * other.sample() / steps.case.steps
        if milliseconds >= without:
            note(settings, f"{label}: {name} takes {milliseconds:.0f} ms a step, {without:.0f} ms uncompiled")
            crew.end(name)
    return time.monotonic() - began


def trained_row(timings: Mapping[str, Timing], costs: Mapping[str, Cost], steps: Steps, settings: Settings) -> TrainRow:
    """What was measured, as results files hold it; times and tokens are those of a step."""
    case, config = steps.case, config_of(steps.case)
    count, flops = case.steps, steps.flops(config)
    contenders: dict[str, TrainMeasured] = {}
    for name, timing in timings.items():
        trainee = TRAINEES[settings.device][name]
        gflops, rate = 1e-9 * flops / timing.median, best(settings.machine, trainee.dtype)
        contenders[name] = {
            "dtype": trainee.dtype,
            "layout": trainee.layout,
            "computed_tokens": steps.computed_tokens(trainee.layout) / count,
            "median_ms": 1e3 * timing.median / count,
            "quartiles_ms": [1e3 * quartile / count for quartile in timing.quartiles],
            "gflops": gflops,
            "of_peak": gflops / rate if rate else None,
            "error": timing.error,
            "activations_mb": costs[name].activations_mb,
        }
    return {
        "model": MODELS[case.model].title,
        "task": case.task,
        "case": case.batch,
        "steps": count,
        "texts": steps.batch_size,
        "tokens": sum(steps.lengths) / count,
        "predicted": steps.predicted / count,
        "flops": flops / count,
        "contenders": contenders,
    }


def profile(case: TrainCase, name: str, device: str, rows: int = 40) -> str:
    """A table of what the steps of one contender spend their time in, by op; of all steps, after as many untimed."""
    trainee = TRAINEES[device][name]
    training, steps = Training(trainee, device), Steps.of(case, config_of(case).vocab_size)
    request = Request(case, "steps", steps.first(trainee.layout), steps.batches(trainee.layout))
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    losses: Tensor = training(request)
    with torch.profiler.profile(activities=activities) as profiler:
        losses = training(request)
        losses.cpu()  # waits for a GPU
    table = profiler.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=rows, max_name_column_width=50)
    return f"{name}, {MODELS[case.model].title} {case.task} {case.batch}, {case.steps} steps:\n{table}"


def cases_of(options: argparse.Namespace) -> Sequence[TrainCase]:
    """Those that the command line asks for."""
    known = QUICK_TRAINING if options.quick else GPU_TRAINING if options.device == "cuda" else TRAINING
    return [
        case
        for case in known
        if (not options.models or case.model in options.models) and (not options.tasks or case.task in options.tasks)
    ]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time whole training steps of bert_fast and transformers.")
    parser.add_argument("--models", nargs="+", choices=MODELS, help="all that there are cases of when not given")
    parser.add_argument("--tasks", nargs="+", choices=("classification", "mlm"), help="both when not given")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--contenders", nargs="+", metavar="NAME", help=f"of {', '.join(TRAINEES['cpu'])}")
    parser.add_argument("--compile-seconds", type=float, metavar="N", default=COMPILE_SECONDS, help="for torch.compile")
    parser.add_argument("--seconds", type=float, metavar="N", help="stop then, with what was measured; no end if not")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run? Its figures mean nothing")
    parser.add_argument("--output", type=Path, help="results file; benchmarks/results/<device>/train.json if not given")
    parser.add_argument(
        "--profile", nargs="?", const=SUBJECT, metavar="NAME", help="print what a contender's time goes into, by op"
    )
    options = parser.parse_args()
    for name in ("threads", "repeats"):
        if (value := getattr(options, name)) < 1:
            parser.error(f"--{name} is {value}, expected at least 1")
    if options.seconds is not None and not options.seconds > 0:
        parser.error(f"--seconds is {options.seconds}, expected more than 0")
    if not options.compile_seconds >= 0:
        parser.error(f"--compile-seconds is {options.compile_seconds}, expected at least 0")
    if options.quick and options.output is None and options.profile is None:
        parser.error("--quick needs --output: its figures are no results")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no GPU")
    if not cases_of(options):
        parser.error("there is no case of these models and tasks")
    known = TRAINEES[options.device]
    options.contenders = options.contenders or DEFAULT_TRAINEES[options.device]
    for name in (*options.contenders, *([options.profile] if options.profile else [])):
        if name not in known:
            parser.error(f"contender {name!r} is not one of {', '.join(known)}")
    if missing := {BASELINE, SUBJECT} - set(options.contenders):
        parser.error(f"--contenders lacks {missing.pop()}: ratios are between it and the others")
    return options


if __name__ == "__main__":
    main()

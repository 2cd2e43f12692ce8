"""The search for hyperparameters: many fine-tunings, a line for each, and the best one kept."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from bert_fast import disk
from bert_fast.benchmarking import markdown_table
from bert_fast.folders import read_json
from bert_fast.lines import decoded, json_value
from bert_fast.loading import WEIGHT_PATTERNS
from bert_fast.recipes.finetune import FinetuneSettings, finetune
from bert_fast.recipes.spaces import PUBLISHED, Range, Space, check_space, drawn_point, grid_points
from bert_fast.terminal import progress_bar

#: What a search leaves in its folder.
TRIALS_FILE = "trials.jsonl"
TABLE_FILE = "trials.md"
DEFINITION_FILE = "search.json"
BEST = "best"

#: What a trial says while it runs, in its own folder.
LOG_FILE = "log.txt"

#: Points that are drawn at random before a search with a model of the scores begins.
STARTUP = 10


@dataclass
class SearchSettings:
    """What a search is told.

    Attributes:
        base: what all trials have in common; its `output_dir` is the folder of the search. A trial with a step that is
            not finite fails, unless the arguments say `on_nan`.
        space: what is varied, among the arguments of training.
        trials: None tries every point of the space; a number draws as many, by what the ones before have scored.
        seeds: each point is trained with each of these, and judged by the mean of their scores.
        metric: of the validation examples, higher is better; None for the task's main one.
        seed: of the points that are drawn.
        keep_all: keep the weights of all trials, not of the best one only.
    """

    base: FinetuneSettings
    space: Space = field(default_factory=lambda: dict(PUBLISHED))
    trials: int | None = None
    seeds: tuple[int, ...] = (42,)
    metric: str | None = None
    seed: int = 0
    keep_all: bool = False


@dataclass(frozen=True)
class Trial:
    """One fine-tuning of a search: a line of `trials.jsonl`.

    Attributes:
        number: from 1; also the name of its folder below `trials`.
        parameters: its point of the space.
        seed: of the training.
        score: on the validation examples; None if it failed.
        metrics: all of these examples'.
        seconds: of the whole trial, as far as it ran in one go.
        error: why it failed; None if it did not.
    """

    number: int
    parameters: dict[str, Any]
    seed: int
    score: float | None
    metrics: dict[str, float]
    seconds: float
    error: str | None = None


@dataclass(frozen=True)
class SearchResult:
    """What came of a search: its trials, the best of them, and its model's folder."""

    trials: list[Trial]
    best: Trial
    folder: Path

    def __str__(self) -> str:
        return f"{trials_table(self.trials)}\n\nthe best: trial {self.best.number}, its model is {self.folder}"


def search(settings: SearchSettings) -> SearchResult:
    """Fine-tune at many points of a space, and keep the best model, as `best` in the folder of the search.

    A search that was interrupted goes on when it is started again: finished trials are not repeated, the one that was
    running goes on from its last checkpoint.

    Raises:
        ValueError: the settings are impossible; the folder has a search that was another one; every trial failed.
        FolderBusyError: another search has the folder.
    """
    if settings.base.validation_file is None and settings.base.data_dir is None:
        raise ValueError("a search needs a validation_file, whose score says which trial is the best")
    if not settings.seeds:
        raise ValueError("seeds is empty, expected at least one")
    if settings.trials is not None and settings.trials < 1:
        raise ValueError(f"trials is {settings.trials}, expected at least 1")
    check_space(settings.space, grid=settings.trials is None)
    output_dir = Path(settings.base.output_dir)
    with disk.locked(output_dir):
        _same_search(settings, output_dir / DEFINITION_FILE)
        done = read_trials(output_dir)
        total = (settings.trials or len(grid_points(settings.space))) * len(settings.seeds)
        with progress_bar(total=total, initial=min(len(done), total), what="trials", unit=" trials", show=True) as bar:
            for number, parameters, seed in _missing(settings, done, total):
                bar.set_postfix_str(", ".join(f"{name} {value}" for name, value in parameters.items()))
                trial = _run(settings, number, parameters, seed)
                _append(output_dir / TRIALS_FILE, trial)
                done.append(trial)
                _tidy(settings, done)
                bar.update()
        best = _tidy(settings, done)
        if best is None:
            raise ValueError(f"all {len(done)} trials failed, the last one: {done[-1].error}")
        return SearchResult(done, best, output_dir / BEST)


def _missing(settings: SearchSettings, done: list[Trial], total: int) -> Iterator[tuple[int, dict[str, Any], int]]:
    """Number, point and seed of each trial that is not done; `done` grows meanwhile."""
    grid = grid_points(settings.space) if settings.trials is None else []
    while len(done) < total:
        place, seed = divmod(len(done), len(settings.seeds))
        if grid:
            point = grid[place]
        elif seed:
            point = done[-1].parameters
        else:
            tried = [(trials[0].parameters, mean_score(trials)) for trials in points(done)]
            point = drawn_point(settings.space, tried, settings.seed, STARTUP)
        yield len(done) + 1, point, settings.seeds[seed]


def points(trials: Sequence[Trial]) -> list[list[Trial]]:
    """The trials of each point, in the order in which the points were tried; a point drawn twice counts once more."""
    found: list[list[Trial]] = []
    for trial in trials:
        if found and found[-1][0].parameters == trial.parameters and trial.seed not in {t.seed for t in found[-1]}:
            found[-1].append(trial)
        else:
            found.append([trial])
    return found


def mean_score(trials: Sequence[Trial]) -> float | None:
    """Of one point; None if any of its trials failed."""
    scores = [trial.score for trial in trials if trial.score is not None]
    return float(np.mean(scores)) if len(scores) == len(trials) else None


def best_trial(trials: Sequence[Trial]) -> Trial | None:
    """Of the point with the best mean, the trial with the best score; the first of several; None if all failed."""
    ranked = [(mean_score(group), group) for group in points(trials)]
    scored = [(score, group) for score, group in ranked if score is not None]
    if not scored:
        return None
    _, group = max(scored, key=lambda pair: pair[0])
    return max(group, key=lambda trial: trial.score or 0.0)


def _run(settings: SearchSettings, number: int, parameters: dict[str, Any], seed: int) -> Trial:
    from bert_fast.training.faults import is_out_of_memory

    base, folder = settings.base, _folder(settings, number)
    arguments = {"on_nan": "stop", "disable_tqdm": True, **base.arguments, **parameters, "seed": seed}
    if arguments.get("save_only_model"):  # a trial that was interrupted cannot go on
        shutil.rmtree(folder, ignore_errors=True)
    run = dataclasses.replace(base, output_dir=str(folder), arguments=arguments, resume=folder.exists())
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    try:
        with (folder / LOG_FILE).open("a", encoding="utf-8") as log, redirect_stdout(log):
            result = finetune(run)
    except (FloatingPointError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        return Trial(number, parameters, seed, None, {}, time.perf_counter() - start, str(error) or repr(error))
    metrics = next(values for split, values in result.metrics.items() if split.startswith("validation"))
    metric = settings.metric or result.main_metric
    if metric not in metrics:
        raise ValueError(f"metric is {metric!r}, expected one of {', '.join(metrics)}")
    seconds, score = time.perf_counter() - start, metrics[metric]
    if not math.isfinite(score):
        return Trial(number, parameters, seed, None, {}, seconds, f"{metric} is {score}")
    return Trial(number, parameters, seed, score, metrics, seconds)


def _folder(settings: SearchSettings, number: int) -> Path:
    return Path(settings.base.output_dir) / "trials" / f"{number:03}"


# Files


def _same_search(settings: SearchSettings, file: Path) -> None:
    """Write down what is searched, or ValueError if something else was begun in the folder."""
    base = dataclasses.asdict(settings.base)
    for name in ("output_dir", "resume"):
        base.pop(name)
    space = {name: dataclasses.asdict(v) if isinstance(v, Range) else list(v) for name, v in settings.space.items()}
    definition = {
        "space": space,
        "method": "grid" if settings.trials is None else "drawn",
        "seeds": list(settings.seeds),
        "metric": settings.metric,
        "seed": settings.seed,
        **base,
    }
    definition = json.loads(json.dumps(definition))
    if not file.exists():
        disk.write_json(file, definition)
        return
    before = read_json(file)
    if changed := [name for name in definition if before.get(name) != definition[name]]:
        differences = "; ".join(f"{name} was {before.get(name)} and is {definition[name]}" for name in changed)
        raise ValueError(f"{file.parent} has another search: {differences}. Choose another output_dir")


def read_trials(output_dir: str | Path) -> list[Trial]:
    """The finished trials of a search; a last line that was not finished is cut off."""
    file = Path(output_dir) / TRIALS_FILE
    if not file.exists():
        return []
    content = file.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(file, whole)
    trials = []
    for where, line in decoded(BytesIO(content[:whole]), str(file)):
        try:
            trials.append(Trial(**json_value(line, where)))
        except TypeError as error:
            raise ValueError(f"{where} is not a trial: {error}") from error
    return trials


def _append(file: Path, trial: Trial) -> None:
    """A line in one write, on the disk when this returns."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, (json.dumps(dataclasses.asdict(trial), ensure_ascii=False) + "\n").encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _tidy(settings: SearchSettings, trials: Sequence[Trial]) -> Trial | None:
    """Write the table, let `best` lead to the best trial so far, and delete the weights of the others."""
    output_dir, best = Path(settings.base.output_dir), best_trial(trials)
    if trials:
        with disk.text_written_at_once(output_dir / TABLE_FILE) as file:
            file.write(f"# Search\n\n{trials_table(trials)}\n")
    if best is None:
        return None
    disk.point(output_dir / BEST, _folder(settings, best.number))
    for trial in trials:
        folder = _folder(settings, trial.number)
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        if trial is not best and not settings.keep_all:
            for pattern in WEIGHT_PATTERNS:
                for file_ in folder.glob(pattern):
                    file_.unlink()
    return best


def trials_table(trials: Sequence[Trial]) -> str:
    """A Markdown table, a line for each trial, the best points first and those that failed last."""
    scored = [(mean_score(group), group) for group in points(trials)]
    ranked = [group for _, group in sorted(scored, key=lambda pair: (pair[0] is None, -(pair[0] or 0.0)))]
    several = any(len(group) > 1 for group in ranked)
    lines = []
    for group in ranked:
        mean = mean_score(group)
        for trial in group:
            line = {
                "trial": str(trial.number),
                **{name: f"{v:.4g}" if isinstance(v, float) else str(v) for name, v in trial.parameters.items()},
            }
            line |= {"seed": str(trial.seed), "score": "-" if trial.score is None else f"{trial.score:.4f}"}
            if several:
                line["mean"] = "-" if mean is None else f"{mean:.4f}"
            line |= {"seconds": f"{trial.seconds:.1f}", "error": " ".join((trial.error or "").split())[:80]}
            lines.append(line)
    if not any(line["error"] for line in lines):
        lines = [{name: cell for name, cell in line.items() if name != "error"} for line in lines]
    return markdown_table(lines)

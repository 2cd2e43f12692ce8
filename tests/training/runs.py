"""Training in processes of their own, which tests end, starve and watch.

They are forked by a server that has imported everything and run nothing, so that each starts in milliseconds.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import tiny
import torch
from transformers import TrainerCallback

from bert_fast.training import checkpoints
from bert_fast.training.trainer import Trainer

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["bert_fast.training.trainer", "matplotlib.figure", "matplotlib.backends.backend_svg"])


def start(function: Callable[..., None], *args: Any) -> Any:
    """A process that calls the function; its output comes with the test's."""
    process = SERVER.Process(target=_quietly, args=(function, *args))
    process.start()
    return process


def run(function: Callable[..., None], *args: Any) -> int:
    """The exit status of a process that calls the function; negative for the signal that ended it."""
    process = start(function, *args)
    process.join(120)
    assert process.exitcode is not None, "the process did not end"
    return process.exitcode


def _quietly(function: Callable[..., None], *args: Any) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    function(*args)


def trainer(output_dir: Path, **options: Any) -> Trainer:
    """Of a masked language model with dropout, on batches by tokens."""
    arguments = tiny.arguments(output_dir, **{"max_tokens_per_batch": 60, **options})
    return Trainer(tiny.masked_lm(), arguments, train_dataset=tiny.examples(), data_collator=tiny.masking())


def train(output_dir: Path, steps: int, options: dict[str, Any]) -> None:
    """Train, from the last checkpoint if there is one."""
    trainer(output_dir, max_steps=steps, **options).train(resume_from_checkpoint=True)


def train_in_little_space(output_dir: Path, num_bytes: int, report: Path) -> None:
    """Save step 1; in step 2 no file can grow beyond `num_bytes`. Writes down the error."""

    class Starve(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))

    starving = trainer(output_dir, max_steps=3, save_strategy="steps", save_steps=1)
    starving.add_callback(Starve)
    try:
        starving.train()
    except checkpoints.CheckpointError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        report.write_text(str(error))


SAVING = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}

#: Sizes, in bytes, beyond which no file grows: the process ends in the middle of the model, or of the optimiser.
SIZES = (1_000, 30_000, 70_000, 150_000)


def die_everywhere(folder: Path, report: Path) -> None:
    """From a run with `checkpoint-1`: save `checkpoint-2` and prune, killed at one change of the disk after the other.

    Writes down for each what it was, the signal, the whole checkpoints left, and how a run that was resumed ended.
    """
    output_dir, outcomes = folder / "run", []
    resumed: dict[str, Any] = {}
    gc.freeze()  # transformers collects garbage when a run begins, and would look through every library each time
    deaths: list[Callable[[int], None]] = [partial(_die_at, index) for index in range(200)]
    for die in [*(partial(_die_beyond, size) for size in SIZES), *deaths]:
        shutil.rmtree(output_dir, ignore_errors=True)
        shutil.copytree(folder / "before", output_dir)
        status, operation = _forked(partial(_save_and, die, output_dir))
        if not status:
            break
        whole = [path.name for path in checkpoints.listed(output_dir) if checkpoints.defect(path) is None]
        state = str([(path.relative_to(output_dir), path.stat().st_size) for path in sorted(output_dir.rglob("*"))])
        if state not in resumed:
            ended, _ = _forked(lambda channel: train(output_dir, 2, SAVING))
            resumed[state] = [ended, sorted(path.name for path in output_dir.rglob("*checkpoint*"))]
        outcomes.append({"operation": operation, "signal": -status, "whole": whole, "resumed": resumed[state]})
    report.write_text(json.dumps(outcomes))


def _forked(function: Callable[[int], None]) -> tuple[int, str]:
    """Exit status of a fork that calls the function with a channel to write to, and what it wrote."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            function(writing)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as channel:
        said = channel.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


def _save_and(die: Callable[[int], None], output_dir: Path, channel: int) -> None:
    class Armed(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            die(channel)

    armed = trainer(output_dir, max_steps=2, **SAVING)
    armed.add_callback(Armed)
    armed.train(resume_from_checkpoint=True)


def _die_at(index: int, channel: int) -> None:
    """Kill this process before the change of the disk of this number, counted from the start of the save."""
    changes: list[str] = []

    def watch(event: str, values: tuple[Any, ...]) -> None:
        opens = event == "open" and isinstance(values[2], int) and values[2] & (os.O_WRONLY | os.O_RDWR)
        if opens or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"):
            changes.append(event)
            if ".jsonl" in str(values[0]):
                changes.pop()
            elif len(changes) > index:
                os.write(channel, f"{event} {Path(str(values[0])).name}".encode())
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def _die_beyond(size: int, channel: int) -> None:
    """End this process in the middle of the first file that grows beyond a size: the default of SIGXFSZ."""
    os.write(channel, f"file of {size}".encode())
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

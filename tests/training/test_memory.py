"""Memory stays with the process while it trains, and goes back after it.

In processes of their own: what a process has freed before decides how the C library serves it.
"""

import json
import platform
import resource
import statistics
from pathlib import Path

import pytest
import runs
import tiny
import torch
import transformers

from bert_fast.modules import BertForSequenceClassification
from bert_fast.training import Trainer, kept_memory

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")

#: Rows of a table of words whose gradient is larger than what glibc would ever keep by itself, 32 MiB.
MANY_WORDS = 300_000


def model() -> BertForSequenceClassification:
    config = tiny.config()
    config.vocab_size = MANY_WORDS
    return BertForSequenceClassification(config).train()


def faults() -> int:
    """How often the system had to hand out pages so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def resident() -> int:
    """Pages."""
    return int(Path("/proc/self/statm").read_text().split()[1])


def faults_of_a_step(model: BertForSequenceClassification) -> float:
    """Of the later ones of several."""
    counts = []
    for _ in range(6):
        before = faults()
        model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([1]), loss_only=True).loss.backward()
        model.zero_grad()
        counts.append(faults() - before)
    return statistics.median(counts[2:])


def watch_steps(report: Path) -> None:
    """Faults of a step and resident pages: before, within and after."""
    trained = model()
    seen = [(faults_of_a_step(trained), resident())]
    with kept_memory():
        seen.append((faults_of_a_step(trained), resident()))
    seen.append((faults_of_a_step(trained), resident()))
    report.write_text(json.dumps(seen))


def watch_trainer(folder: Path, report: Path, kept: bool) -> None:
    """Faults of the last steps of a run, ours or as transformers alone would run it."""
    steps = []

    class Watched(Trainer):
        def training_step(self, *args, **options):
            steps.append(faults())
            return super().training_step(*args, **options)

    trainer = Watched(model(), tiny.arguments(folder, max_steps=8), train_dataset=tiny.padded())
    trainer.train() if kept else transformers.Trainer.train(trainer)
    report.write_text(json.dumps(steps[-1] - steps[-3]))


def test_a_step_uses_the_memory_of_the_one_before(tmp_path):
    report = tmp_path / "report.json"
    assert runs.run(watch_steps, report) == 0
    (fresh, before), (again, kept), (after, given_back) = json.loads(report.read_text())
    table = model().bert.embeddings.word_embeddings.weight.nbytes // resource.getpagesize()
    assert fresh > 100  # not one for each page: the system may hand out several at once
    assert again < fresh / 10
    assert kept > before + table / 2
    assert given_back < before + table / 2
    assert after > fresh / 2


def test_the_trainer_keeps_it(tmp_path):
    counts = []
    for kept in (True, False):
        report = tmp_path / f"{kept}.json"
        assert runs.run(watch_trainer, tmp_path / str(kept), report, kept) == 0
        counts.append(json.loads(report.read_text()))
    assert counts[0] < counts[1] / 3

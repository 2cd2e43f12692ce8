"""Memory stays with the process while it trains, and goes back after it."""

import platform
import resource
import statistics
from pathlib import Path

import pytest
import tiny
import torch
import transformers

from bert_fast.modules import BertForSequenceClassification
from bert_fast.training import Trainer, kept_memory

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")

#: Rows of a table of words whose gradient is larger than what glibc would ever keep by itself, 32 MiB.
MANY_WORDS = 300_000


@pytest.fixture(autouse=True)
def _no_poison():
    torch.utils.deterministic.fill_uninitialized_memory = False


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


def test_a_step_uses_the_memory_of_the_one_before():
    config = tiny.config()
    config.vocab_size = MANY_WORDS
    model = BertForSequenceClassification(config).train()
    num_pages = model.bert.embeddings.word_embeddings.weight.nbytes // resource.getpagesize()
    fresh = faults_of_a_step(model)  # the system may hand out several pages at once
    assert fresh > 100
    before = resident()
    with kept_memory():
        assert faults_of_a_step(model) < fresh / 10
        assert resident() > before + num_pages / 2
    assert resident() < before + num_pages / 2, "the memory does not go back"
    assert faults_of_a_step(model) > fresh / 2


def test_the_trainer_keeps_it(tmp_path):
    config = tiny.config()
    config.vocab_size = MANY_WORDS

    class Watched(Trainer):
        def training_step(self, *args, **options):
            steps.append(faults())
            return super().training_step(*args, **options)

    counts = []
    for kept in (True, False):
        steps = []
        trainer = Watched(
            BertForSequenceClassification(config),
            tiny.arguments(tmp_path / str(kept), max_steps=8),
            train_dataset=tiny.padded(),
        )
        trainer.train() if kept else transformers.Trainer.train(trainer)
        counts.append(steps[-1] - steps[-3])
    assert counts[0] < counts[1] / 10

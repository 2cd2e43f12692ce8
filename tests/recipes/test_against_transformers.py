"""transformers' `Trainer` on the same data, seeds and recipe: the same score within the seeds' spread, in more time."""

import statistics

import pytest

from benchmarks import finetune


@pytest.mark.peers  # a comparison of times, which a crowded machine disturbs
def test_the_same_score_in_less_time(capsys):
    runs = finetune.compare(["bert_fast", "transformers"], "short", seeds=(0, 1), epochs=3)
    with capsys.disabled():
        print(f"\n{finetune.table(runs)}")
    ours, theirs = runs["bert_fast"], runs["transformers"]
    assert min(run.accuracy for run in ours + theirs) > 0.7
    # Each has another head for a seed, and other dropout: 40 examples, of which seeds differ in up to four.
    means = [statistics.mean(run.accuracy for run in of_one) for of_one in (ours, theirs)]
    assert abs(means[0] - means[1]) <= 0.1
    seconds = [statistics.median(run.seconds for run in of_one) for of_one in (ours, theirs)]
    assert seconds[0] < seconds[1]

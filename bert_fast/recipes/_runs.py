"""What all runs have in common: the arguments that suit them, and what they leave beside a model."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import torch

from bert_fast import __version__

#: What is known of a run, for its report and its card.
RESULTS_FILE = "results.json"


def training_arguments(output_dir: str, suited: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
    """`TrainingArguments`: what was given, then what suits this kind of run, then what suits every one."""
    from bert_fast.training import TrainingArguments

    common = {
        "save_total_limit": 2,  # the best and the last
        "report_to": "none",
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    return TrainingArguments(output_dir, **{**common, **suited, **given})


def versions() -> dict[str, str]:
    """Of what a run depends on."""
    import transformers

    return {
        "bert_fast": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }

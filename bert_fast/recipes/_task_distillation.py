"""The trainer of a task with a teacher."""

from __future__ import annotations

from bert_fast.recipes._task_trainer import TaskTrainer
from bert_fast.training.distillation import DistillationTrainer


class TaskDistillation(DistillationTrainer, TaskTrainer):
    """Learns as the one, and evaluates as the other."""

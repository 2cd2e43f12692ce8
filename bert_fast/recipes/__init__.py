"""Whole runs, each what a command does: pre-training, fine-tuning, transfer, evaluation, search, distillation."""
